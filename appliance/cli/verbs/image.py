"""image: bootable images of a point for other hardware, and what they are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, domain_argument, rate_option
from appliance.cli.secrets import luks_keys, luks_option
from appliance.cli.settling import after_options, chosen, sizes_of
from appliance.cli.text import clock, counted
from appliance.cli.verbs.readers import reader_command
from appliance.cli.verbs.settled import settle_command
from appliance.cli.verbs.streaming import emit_running, emit_streamed, serve_command
from appliance.cli.verbs.verification import evidence_command, verify_command
from appliance.errors import (
    AlreadyExists,
    AmbiguousPoint,
    BadInventory,
    ConfigError,
    ConnectError,
    DomainNotFound,
    DriversMissing,
    GuestUnreadable,
    ImageError,
    InGap,
    Locked,
    NoSpace,
    NoSuchPoint,
    NoSuchTarget,
    NoSuchTemplate,
    NotProtected,
    NotRecoverable,
    NotSigned,
    NotSupported,
    RestoreError,
    TargetExists,
    ToolFailed,
    WrongKey,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.image.making import Planned
    from appliance.service.image.targets import Target
    from images.model import Inventory

__all__ = ["image_command"]

_POINT = (NotProtected, NoSuchPoint, AmbiguousPoint, InGap, NotRecoverable, WrongKey, GuestUnreadable)
_WHEN = click.option(
    "--at", "when", required=True, metavar="WHEN", shell_complete=complete_when,
    help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).",
)  # fmt: skip
_TARGET = click.option("--target", required=True, metavar="NAME", help="The hardware that it is for.")
_TEMPLATE = click.option("--template", default="", metavar="ID", help="The template (default: the newest).")
_FILE = click.Path(path_type=Path, exists=True)
_DOCUMENT = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("image", no_args_is_help=False, short_help="Bootable images of a point, for other hardware.")
def image_command() -> None:
    """Bootable images of a point, for other hardware: one boot, of the guest's own kernel.

    Once: `image template build`, and for guests on xfs, btrfs, LUKS or md `image reader build`. For each kind of
    hardware: `image target add`. Then `image plan` tells which drivers an image would have and why, and `image build`
    makes it. The guest and its disks are not touched by any of these.
    """


# --- targets --------------------------------------------------------------------------------------------------------


@image_command.group("target", no_args_is_help=False, short_help="The hardware that images are made for.")
def target_command() -> None:
    """The hardware that images are made for. It is looked up, never booted."""


@verb("add", ConnectError, DomainNotFound, BadInventory, AlreadyExists, ToolFailed, WrongKey)
@click.argument("name", required=False)
@click.option("--domain", metavar="DOMAIN", help="A libvirt domain's.")
@click.option("--xml", type=_DOCUMENT, metavar="FILE", help="What a libvirt domain of this XML would have.")
@click.option("--qemu", type=_DOCUMENT, metavar="FILE", help="What this QEMU command line would have.")
@click.option("--script", type=_DOCUMENT, metavar="FILE", help="A machine's: what `image target script` printed on it.")
@click.option("--redfish", type=_DOCUMENT, metavar="FILE", help="A machine's: a document of its management controller.")
@click.option("--profile", metavar="KIND", help="A kind of machine that is known (`image target profiles`).")
@click.option("--replace", is_flag=True, help="Put it in the place of the target that has the name now.")
def _target_add(context: Context, name: str | None, replace: bool, domain: str | None, **sources: Any) -> None:
    """Add a target called NAME (default: what its source calls it), from one source."""
    from appliance.service.image import targets

    given = {kind: value for kind, value in {"domain": domain, **sources}.items() if value is not None}
    if len(given) != 1:
        raise click.UsageError("name one source: --domain, --xml, --qemu, --script, --redfish or --profile")
    with context.session() as session:
        definition = session.hypervisor().domain(domain).definition() if domain else ""
        kind, value = next(iter(given.items()))
        inventory = _inventory(kind, value, definition, name or "")
        if kind == "xml":
            definition = _text(value)
        kept = targets.add(session, inventory, definition, replace)
    lines = [f"target {kept.inventory.name} is kept: {_hardware(kept.inventory)}", *_notes(kept.inventory)]
    _emit_target(context, kept, "\n".join(lines))


def _notes(inventory: Inventory) -> list[str]:
    return [f"  note: {note}" for note in inventory.notes]


def _inventory(kind: str, value: Any, definition: str, name: str) -> Inventory:
    from images import hardware

    sources: dict[str, Callable[[], Inventory]] = {
        "domain": lambda: hardware.from_xml(definition, target=name, source="libvirt"),
        "xml": lambda: hardware.from_xml(_text(value), target=name),
        "qemu": lambda: hardware.from_qemu(_text(value), target=name),
        "script": lambda: hardware.from_script_output(_text(value), target=name),
        "redfish": lambda: hardware.from_redfish(_text(value), target=name),
        "profile": lambda: hardware.profile(value, target=name),
    }
    return sources[kind]()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(reason=f"{path} cannot be read as text: {error}") from error


@verb("list", WrongKey)
def _target_list(context: Context) -> None:
    """List the targets."""
    from appliance.service.image import targets

    with context.session() as session:
        found = targets.listing(session)
    for one in found:
        _emit_target(context, one, f"{one.inventory.name:20} {_hardware(one.inventory)}")
    if not found:
        context.output.note("no targets; `rewind image target add` adds one")


@verb("show", NoSuchTarget, WrongKey)
@click.argument("name")
def _target_show(context: Context, name: str) -> None:
    """Show a target's devices."""
    from appliance.service.image import targets

    with context.session() as session:
        found = targets.find(session, name)
    lines = [f"{found.inventory.name}: {_hardware(found.inventory)}, from {found.inventory.source}"]
    for device in found.inventory.devices:
        carries = f" carries {', '.join(device.carries)}" if device.carries else ""
        lines.append(f"  {device.slot or '-':14} {device.modalias}  {device.description}{carries}".rstrip())
    lines += _notes(found.inventory)
    _emit_target(context, found, "\n".join(lines))


@verb("remove", NoSuchTarget, WrongKey)
@click.argument("name")
def _target_remove(context: Context, name: str) -> None:
    """Forget a target. Images that were made for it are not touched."""
    from appliance.service.image import targets

    with context.session() as session:
        targets.remove(session, name)
    context.output.emit(records.ImageRemoved("target", name), f"target {name} is forgotten")


@verb("profiles")
def _target_profiles(context: Context) -> None:
    """List the kinds of machines that are known."""
    from images import hardware

    for name in hardware.profile_names():
        context.output.emit(records.ImageProfile(name, hardware.about(name)), f"{name:20} {hardware.about(name)}")


@verb("script")
def _target_script(context: Context) -> None:
    """Print the script that tells a machine's hardware: run it there by `sh`, keep its output for `add --script`."""
    from images import hardware

    sys.stdout.write(hardware.script())


def _emit_target(context: Context, target: Target, text: str) -> None:
    one = target.inventory
    record = records.ImageTarget(
        one.name, one.source, one.firmware.value, one.secure_boot, len(one.devices), tuple(nic.mac for nic in one.nics),
        target.added, one.model_dump(mode="json"),
    )  # fmt: skip
    context.output.emit(record, text)


def _hardware(one: Inventory) -> str:
    secure = " with Secure Boot" if one.secure_boot else ""
    return f"{one.firmware.name}{secure}, {counted(len(one.devices), 'device')}, {counted(len(one.nics), 'NIC')}"


# --- templates ------------------------------------------------------------------------------------------------------


@image_command.group("template", no_args_is_help=False, short_help="What images are made from.")
def template_command() -> None:
    """What images are made from: a default kernel, boot loaders, and our own initrd. Made beforehand."""


@verb("build", ImageError, ToolFailed, NoSpace, WrongKey)
@click.option("--kernel", metavar="WHAT", help="A Debian package, a .deb file, or `/` for this host's newest kernel.")
def _template_build(context: Context, kernel: str | None) -> None:
    """Make a template and keep it in the repository. Takes minutes and downloads packages."""
    from appliance.service.image import templates
    from images.template.build import DEFAULT_KERNEL

    what: str | Path = kernel or DEFAULT_KERNEL
    if kernel and (kernel.endswith(".deb") or kernel.startswith("/")):
        what = Path(kernel)
    with context.session() as session:
        kept = templates.make(session, what)
    _emit_template(context, kept)


@verb("list", WrongKey)
def _template_list(context: Context) -> None:
    """List the templates, the oldest first."""
    from appliance.service.image import templates

    with context.session() as session:
        found = templates.listing(session)
    for one in found:
        _emit_template(context, one)
    if not found:
        context.output.note("no templates; `rewind image template build` makes one")


@verb("remove", NoSuchTemplate, WrongKey)
@click.argument("name", metavar="ID")
def _template_remove(context: Context, name: str) -> None:
    """Forget a template. Images that were made from it go on working."""
    from appliance.service.image import templates

    with context.session() as session:
        templates.remove(session, name)
    context.output.emit(records.ImageRemoved("template", name), f"template {name} is forgotten")


def _emit_template(context: Context, kept: Any) -> None:
    record = records.ImageTemplate(kept.id, kept.created, kept.release, kept.packages, kept.stored_bytes)
    text = f"{kept.id}  {clock(kept.created)}  kernel {kept.release}  {format_size(kept.stored_bytes)}"
    context.output.emit(record, text)


# --- drivers --------------------------------------------------------------------------------------------------------


@image_command.group("drivers", no_args_is_help=False, short_help="Kernel modules that guests do not have themselves.")
def drivers_command() -> None:
    """Kernel modules that guests do not have themselves, each for exactly one kernel release."""


@verb("add", ImageError, GuestUnreadable, NoSpace, WrongKey)
@click.argument("path", type=_FILE, metavar="PATH")
@click.option("--release", default="", metavar="RELEASE", help="Refuse what is for another kernel release.")
def _drivers_add(context: Context, path: Path, release: str) -> None:
    """Keep the kernel modules of a folder, a .deb, an .rpm or one .ko file in the repository."""
    from appliance.service.image import drivers

    with context.session() as session:
        kept = drivers.add(session, path, release)
    _emit_drivers(context, kept)


@verb("list", WrongKey)
def _drivers_list(context: Context) -> None:
    """List what is kept, by kernel release."""
    from appliance.service.image import drivers

    with context.session() as session:
        found = drivers.listing(session)
    for one in found:
        _emit_drivers(context, one)
    if not found:
        context.output.note("no drivers besides the guests' own; `rewind image drivers add` adds some")


@verb("remove", ImageError, WrongKey)
@click.argument("name")
def _drivers_remove(context: Context, name: str) -> None:
    """Forget what `list` calls NAME."""
    from appliance.service.image import drivers

    with context.session() as session:
        drivers.remove(session, name)
    context.output.emit(records.ImageRemoved("drivers", name), f"drivers {name} are forgotten")


def _emit_drivers(context: Context, one: Any) -> None:
    record = records.ImageDrivers(one.name, one.release, one.digest, one.modules, one.size)
    text = f"{one.name}: {counted(one.modules, 'module')} for kernel {one.release}, {format_size(one.size)}"
    context.output.emit(record, text)


# --- plan, build ----------------------------------------------------------------------------------------------------


@verb("plan", *_POINT, NoSuchTarget, NoSuchTemplate, DriversMissing)
@domain_argument()
@_WHEN
@_TARGET
@_TEMPLATE
@luks_option
@click.option("--all", "all_of", is_flag=True, help="Also list each default driver that is left out.")
@after_options
def _plan(
    context: Context, domain: str, when: str, target: str, template: str, luks_key: tuple[str, ...], all_of: bool,
    after: Any,
) -> None:  # fmt: skip
    """Tell which drivers an image of DOMAIN for a target would have, and why. Nothing is written.

    With --settle and its like also what the guest lacks for that.

    Where a driver is missing that has to be there the plan ends as `build` would: refused, with the list.
    """
    from appliance.service.image import making
    from images.drivers.plan import refuse_if_missing

    with context.session() as session:
        keys = luks_keys(luks_key)
        planned = making.plan(session, domain, when, target, template, keys, after=chosen(after))
    _emit_plan(context, planned, all_of)
    refuse_if_missing(planned.plan)


def _emit_plan(context: Context, planned: Planned, all_of: bool) -> None:
    from images.drivers import report

    document = report.document(planned.plan)
    rows = list(report.rows(planned.plan, all_of=all_of))
    wide = max((len(row[0]) for row in rows), default=0)
    client = planned.plan.client
    lines = [
        f"{client.host} at {clock(planned.time)}: {client.os_name}, kernel {client.release}, for {document['target']}"
    ]
    lines += [f"  {name:{wide}}  {verdict:8}  {role:10}  {reason}" for name, verdict, role, reason in rows]
    lines += report.summary(planned.plan)
    lines += [f"warning: {one}" for one in planned.plan.warnings]
    record = records.ImagePlan(
        planned.domain, planned.point, planned.time, planned.template, planned.reader, client.host, client.release,
        document["target"], document["mode"], document["buildable"], document["command_line"], document["rename"],
        document["counts"], tuple(document["load"]), tuple(document["decisions"]), tuple(document["warnings"]),
    )  # fmt: skip
    context.output.emit(record, "\n".join(lines))


@verb("build", *_POINT, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, TargetExists, ImageError, NoSpace)
@domain_argument()
@_WHEN
@_TARGET
@_TEMPLATE
@click.option("--media", default="iso", show_default=True, metavar="LIST",
              help="What to make, with commas between: uki, esp, iso, usb, pxe, disk.")  # fmt: skip
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for the image.")  # fmt: skip
@luks_option
@after_options
def _build(
    context: Context, domain: str, when: str, target: str, template: str, media: str, folder: Path,
    luks_key: tuple[str, ...], after: Any,
) -> None:  # fmt: skip
    """Make a bootable image of DOMAIN as of WHEN for a target.

    It has the guest's own kernel and exactly the drivers that this hardware needs. It starts the guest from its disks,
    restored or served, wherever they are attached. A driver that nobody has is told before anything is written.
    """
    from appliance.service.image import making

    wanted = [one.strip() for one in media.split(",") if one.strip()]
    with context.session() as session:
        keys = luks_keys(luks_key)
        made = making.build(session, domain, when, target, wanted, folder, template, keys, after=chosen(after))
    built = made.built
    files = tuple(
        records.ImageFile(name, path, built.sizes[name], built.digests[name]) for name, path in built.files.items()
    )
    record = records.ImageBuilt(
        made.planned.domain, made.planned.point, made.planned.time, target, built.template, built.folder, files,
        built.modules, dict(built.seconds), made.planned.plan.warnings,
    )  # fmt: skip
    lines = [f"{one.name:8} {format_size(one.size_bytes):>9}  {one.path}" for one in files]
    lines += [f"warning: {one}" for one in made.planned.plan.warnings]
    lines.append(f"{counted(len(built.modules), 'driver')} of kernel {made.planned.plan.client.release}")
    context.output.emit(record, "\n".join(lines))


# --- bring up -------------------------------------------------------------------------------------------------------


@verb("start", *_POINT, ConnectError, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, AlreadyExists,
      TargetExists, NotSupported, ImageError, RestoreError, Locked, NoSpace)  # fmt: skip
@domain_argument()
@_WHEN
@_TARGET
@_TEMPLATE
@click.option("--name", required=True, metavar="NEW", help="What the new domain is called.")
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for its disks and its boot medium.")  # fmt: skip
@click.option("--new-macs", is_flag=True, help="Give its network cards new addresses instead of the target's own.")
@click.option("--background", is_flag=True, help="Return as soon as it runs; its disks are filled all the same.")
@rate_option("Fill its disks with at most this much a second (50M).")
@click.option("--size", "sizes", multiple=True, metavar="DISK=BYTES", callback=sizes_of,
              help="Make the guest's DISK (vda) this large (20G): smaller as far as its partitions allow.")  # fmt: skip
@luks_option
@after_options
def _start(
    context: Context, domain: str, when: str, target: str, template: str, name: str, folder: Path, new_macs: bool,
    background: bool, rate: int | None, sizes: dict[str, int], luks_key: tuple[str, ...], after: Any,
) -> None:  # fmt: skip
    """Start DOMAIN as of WHEN as a new domain on a target's hardware, at once.

    What it reads comes from the repository until its own disks are filled, which goes on beside it. DOMAIN itself is
    not touched and need not exist any more. It starts from the medium in DIR.
    """
    from appliance.service.image import starting

    with context.session() as session:
        made = starting.start(
            session, domain, when, target, name, folder, template=template, keys=luks_keys(luks_key), rate=rate or 0,
            new_macs=new_macs, after=chosen(after), sizes=sizes,
            warned=lambda them: context.output.tell("\n".join(f"warning: {one}" for one in them)),
        )  # fmt: skip
        record = records.ImageStarted(
            made.name, made.uuid, made.point, made.target, made.disks, made.image, made.seconds, made.warnings
        )
        took = format_duration(made.seconds)
        context.output.emit(record, f"{name} runs after {took}; `rewind image list` tells how far its disks are")
        if not background:
            with context.output.meter(f"disks of {name}") as meter:
                emit_running(context, starting.follow(session, name, meter.update))


@verb("list")
def _list(context: Context) -> None:
    """List the domains and machines that were brought up, and how far their disks are."""
    from appliance.service.image import starting, streaming

    with context.session() as session:
        session.instance  # noqa: B018  a folder that is no home has brought up nothing either, and must not look the same
        found, served = starting.listing(session), streaming.listing(session)
    for one in found:
        emit_running(context, one)
    for machine in served:
        emit_streamed(context, machine)
    if not found and not served:
        context.output.note("nothing was brought up from here; `rewind image start` and `serve` do it")


@verb("resume", ConfigError, RestoreError, Locked)
@click.argument("name")
def _resume(context: Context, name: str) -> None:
    """Go on filling the disks of a domain or machine that was brought up, after this host was restarted."""
    from appliance.service.image import starting, streaming

    with context.session() as session, context.output.meter(f"disks of {name}") as meter:
        if streaming.known(session, name):
            streaming.resume(session, name)
            emit_streamed(context, streaming.follow(session, name, meter.update))
        else:
            starting.resume(session, name)
            emit_running(context, starting.follow(session, name, meter.update))


@verb("forget", ConnectError, Locked)
@click.argument("name")
@click.option("--force", is_flag=True, help="Also a machine that still needs it: what it has written is lost.")
def _forget(context: Context, name: str, force: bool) -> None:
    """Forget a domain or machine that was brought up and needs the repository no more, or is gone."""
    from appliance.service.image import starting, streaming

    with context.session() as session:
        served = streaming.known(session, name)
        if served:
            streaming.forget(session, name, force)
        else:
            starting.forget(session, name)
    context.output.emit(records.ImageRemoved("served" if served else "started", name), f"{name} is forgotten")


for _group, _verbs in (
    (target_command, (_target_add, _target_list, _target_show, _target_remove, _target_profiles, _target_script)),
    (template_command, (_template_build, _template_list, _template_remove)),
    (drivers_command, (_drivers_add, _drivers_list, _drivers_remove)),
    (image_command, (_plan, _build, _start, serve_command, _list, _resume, settle_command, _forget, verify_command,
                     evidence_command, reader_command)),
):  # fmt: skip
    for _one in _verbs:
        _group.add_command(_one)
