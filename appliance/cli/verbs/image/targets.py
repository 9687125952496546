"""image target: the hardware that images are made for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.text import counted
from appliance.errors import (
    AlreadyExists,
    BadInventory,
    ConfigError,
    ConnectError,
    DomainNotFound,
    NoSuchTarget,
    ToolFailed,
    WrongKey,
)

if TYPE_CHECKING:
    from appliance.service.image.targets import Target
    from images.model import Inventory

__all__ = ["target_command"]

_DOCUMENT = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group("target", no_args_is_help=False, short_help="The hardware that images are made for.")
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
def _add(context: Context, name: str | None, replace: bool, domain: str | None, **sources: Any) -> None:
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
    _emit(context, kept, "\n".join(lines))


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
def _list(context: Context) -> None:
    """List the targets."""
    from appliance.service.image import targets

    with context.session() as session:
        found = targets.listing(session)
    for one in found:
        _emit(context, one, f"{one.inventory.name:20} {_hardware(one.inventory)}")
    if not found:
        context.output.note("no targets; `rewind image target add` adds one")


@verb("show", NoSuchTarget, WrongKey)
@click.argument("name")
def _show(context: Context, name: str) -> None:
    """Show a target's devices."""
    from appliance.service.image import targets

    with context.session() as session:
        found = targets.find(session, name)
    lines = [f"{found.inventory.name}: {_hardware(found.inventory)}, from {found.inventory.source}"]
    for device in found.inventory.devices:
        carries = f" carries {', '.join(device.carries)}" if device.carries else ""
        lines.append(f"  {device.slot or '-':14} {device.modalias}  {device.description}{carries}".rstrip())
    lines += _notes(found.inventory)
    _emit(context, found, "\n".join(lines))


@verb("remove", NoSuchTarget, WrongKey)
@click.argument("name")
def _remove(context: Context, name: str) -> None:
    """Forget a target. Images that were made for it are not touched."""
    from appliance.service.image import targets

    with context.session() as session:
        targets.remove(session, name)
    context.output.emit(records.ImageRemoved("target", name), f"target {name} is forgotten")


@verb("profiles")
def _profiles(context: Context) -> None:
    """List the kinds of machines that are known."""
    from images import hardware

    for name in hardware.profile_names():
        context.output.emit(records.ImageProfile(name, hardware.about(name)), f"{name:20} {hardware.about(name)}")


@verb("script")
def _script(context: Context) -> None:
    """Print the script that tells a machine's hardware: run it there by `sh`, keep its output for `add --script`."""
    from images import hardware

    sys.stdout.write(hardware.script())


def _emit(context: Context, target: Target, text: str) -> None:
    one = target.inventory
    record = records.ImageTarget(
        one.name, one.source, one.firmware.value, one.secure_boot, len(one.devices), tuple(nic.mac for nic in one.nics),
        target.added, one.model_dump(mode="json"),
    )  # fmt: skip
    context.output.emit(record, text)


def _hardware(one: Inventory) -> str:
    secure = " with Secure Boot" if one.secure_boot else ""
    return f"{one.firmware.name}{secure}, {counted(len(one.devices), 'device')}, {counted(len(one.nics), 'NIC')}"


for _one in (_add, _list, _show, _remove, _profiles, _script):
    target_command.add_command(_one)
