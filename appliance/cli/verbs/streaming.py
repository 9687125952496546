"""image serve: a machine that is no domain of ours boots from a point, and fills its own disks from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, domain_argument, duration_option
from appliance.cli.secrets import luks_keys, luks_option
from appliance.errors import (
    AlreadyExists,
    AmbiguousPoint,
    ConfigError,
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
    WrongKey,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.image.starting import Running
    from appliance.service.image.streaming import Served, Streamed

__all__ = ["emit_running", "emit_streamed", "serve_command"]

_POINT = (NotProtected, NoSuchPoint, AmbiguousPoint, InGap, NotRecoverable, WrongKey, GuestUnreadable)
_PATIENCE = 600
# A machine that lives is heard every few seconds.
_SILENT = 30.0


def _local(_ctx: click.Context, _param: click.Parameter, values: Any) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if wrong := [disk for disk, device in pairs.items() if not (disk and device)]:
        raise click.BadParameter(f"{wrong[0]!r} is not DISK=DEVICE, like vda=/dev/nvme0n1")
    return pairs


@verb("serve", *_POINT, ConfigError, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, NotSupported,
      AlreadyExists, ImageError, RestoreError, Locked, NoSpace)  # fmt: skip
@domain_argument()
@click.option("--at", "when", required=True, metavar="WHEN", shell_complete=complete_when,
              help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).")  # fmt: skip
@click.option("--target", required=True, metavar="NAME", help="The hardware that it is for.")
@click.option("--listen", required=True, metavar="ADDRESS:PORT", help="Where this host answers the machine.")
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for the image. It has the secret of the session.")  # fmt: skip
@click.option("--stream/--copy-first", "stream", default=True, show_default=True,
              help="Start at once and fill the local disks meanwhile, or fill them first.")  # fmt: skip
@click.option("--name", metavar="NAME", help="What the session is called (default: as the target).")
@click.option("--media", default="iso", show_default=True, metavar="LIST",
              help="What to make, with commas between: uki, esp, iso, usb, pxe, disk.")  # fmt: skip
@click.option("--template", default="", metavar="ID", help="The template (default: the newest).")
@click.option("--reach", default="", metavar="ADDRESS:PORT", help="How the machine gets here, if not as --listen.")
@click.option("--address", "own", default="dhcp", show_default=True, metavar="ADDRESS/PREFIX",
              help="The machine's address for this alone: one that nobody has, the guest neither.")  # fmt: skip
@click.option("--gateway", default="", metavar="ADDRESS", help="Its way here, when it is in another network.")
@click.option("--nic", "mac", default="", metavar="MAC", help="The card that it uses (default: the first with a link).")
@click.option("--local", multiple=True, metavar="DISK=DEVICE", callback=_local,
              help="Put DISK on this local disk: its node, or a part of its serial number.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Also local disks that are not empty: their content is lost.")
@click.option("--blank", is_flag=True, help="A promise that local disks read as zeros: less is written to them.")
@duration_option("--patience", text="How long its reads and writes wait while nobody answers (default 10m).")
@click.option("--insecure", is_flag=True, help="No encryption, and whoever connects may read and write.")
@click.option("--background", is_flag=True, help="Return as soon as it is served.")
@luks_option
def serve_command(
    context: Context, domain: str, when: str, target: str, folder: Path, name: str | None, media: str, template: str,
    stream: bool, background: bool, patience: float | None, luks_key: tuple[str, ...], **choices: Any,
) -> None:  # fmt: skip
    """Let a machine boot DOMAIN as of WHEN, whatever it is: nothing of it is known but its hardware.

    It starts from the image in DIR. Its root comes from here, encrypted, and what it writes is kept here, until its own
    disks are full; then it needs nobody. While this host does not answer it waits. It may lose its power and start
    again from the same image. The point is not changed.
    """
    from appliance.service.image import streaming

    wanted = [one.strip() for one in media.split(",") if one.strip()]
    chosen = streaming.Choices(mode="stream" if stream else "copy", patience=int(patience or _PATIENCE), **choices)
    with context.session() as session:
        made = streaming.serve(
            session, domain, when, target, name or target, folder, wanted, chosen, template=template,
            keys=luks_keys(luks_key),
        )  # fmt: skip
        _emit_served(context, made)
        if not background:
            with context.output.meter(f"disks of {made.name}") as meter:
                emit_streamed(context, streaming.follow(session, made.name, meter.update))


def _emit_served(context: Context, made: Served) -> None:
    built = made.built
    files = tuple(
        records.ImageFile(name, path, built.sizes[name], built.digests[name]) for name, path in built.files.items()
    )
    record = records.ImageServed(
        made.name, made.point, made.target, made.mode, made.address, made.secure, built.folder, files, made.seconds,
        made.warnings,
    )  # fmt: skip
    lines = [f"{one.name:8} {format_size(one.size_bytes):>9}  {one.path}" for one in files]
    lines += [f"warning: {one}" for one in made.warnings]
    took = format_duration(made.seconds)
    lines.append(f"{made.name} is served at {made.address} after {took}: start the machine from the image")
    context.output.emit(record, "\n".join(lines))


def emit_running(context: Context, one: Running) -> None:
    """One domain's line."""
    record = records.ImageRunning(
        one.name, one.point, one.phase, one.done_bytes, one.total_bytes, one.left, one.error
    )  # fmt: skip
    words = {
        "pulling": f"filling {', '.join(one.left)}: {format_size(one.done_bytes)} of {format_size(one.total_bytes)}",
        "off": f"off, and still needs the repository for {', '.join(one.left)}",
        "done": "done: its disks are its own",
        "stopped": "nobody fills its disks any more: `rewind image resume` goes on",
        "gone": f"gone: there is no such domain any more; `rewind image forget {one.name}` ends what is kept for it",
    }
    error = f" ({one.error})" if one.error and one.phase != "gone" else ""
    context.output.emit(record, f"{one.name:20} {words.get(one.phase, one.phase)}{error}")


def emit_streamed(context: Context, one: Streamed) -> None:
    """One session's line."""
    record = records.ImageStreamed(
        one.name, one.point, one.target, one.mode, one.phase, one.done_bytes, one.total_bytes, one.left_bytes, one.rate,
        one.answers, one.silent_seconds, one.read_bytes, one.written_bytes, one.boots, one.service_seconds,
        one.service_read_bytes, one.left, one.error,
    )  # fmt: skip
    far = f"{', '.join(one.left)}: {format_size(one.done_bytes)} of {format_size(one.total_bytes)}"
    far += f", {format_size(one.left_bytes)} left"
    far += f" at {format_size(one.rate)}/s" if one.rate else ""
    words = {
        "waiting": "served, and no machine has come yet",
        "booting": f"its machine boots, or runs from here; {format_size(one.read_bytes)} were read",
        "pulling": f"filling {far}",
        "copying": f"copying {far}",
        "done": "done: the machine's disks are its own",
        "stopped": "nobody serves it any more: `rewind image resume` goes on",
    }
    remarks = [one.error] if one.error else []
    if one.phase not in ("done", "stopped"):
        remarks += [] if one.answers else ["no machine is answered now"]
        if one.silent_seconds is not None and one.silent_seconds >= _SILENT:
            remarks.append(f"nothing was heard of its machine for {format_duration(one.silent_seconds)}")
    remark = f" ({'; '.join(remarks)})" if remarks else ""
    context.output.emit(record, f"{one.name:20} {words[one.phase]}{remark}")
