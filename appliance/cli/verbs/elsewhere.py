"""export, restore: a point as a disk that other programs read, and as a new domain."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, domain_argument, rate_option
from appliance.cli.text import clock
from appliance.errors import (
    AlreadyExists,
    AmbiguousPoint,
    ConnectError,
    DiskNotFound,
    InGap,
    Locked,
    NoSpace,
    NoSuchPoint,
    NotProtected,
    NotRecoverable,
    NotSupported,
    PermissionDenied,
    TargetExists,
    WrongKey,
)
from appliance.units import format_duration, format_size

__all__ = ["export_command", "restore_command"]

_POINT = (NotProtected, NoSuchPoint, AmbiguousPoint, InGap, NotRecoverable, DiskNotFound, WrongKey)


@verb("export", *_POINT, PermissionDenied)
@domain_argument()
@click.option(
    "--at",
    "when",
    required=True,
    metavar="WHEN",
    shell_complete=complete_when,
    help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).",
)
@click.option("--disk", "disks", multiple=True, metavar="TARGET", help="Only this disk; may be repeated. Default: all.")
@click.option(
    "--writable", is_flag=True, help="Take writes, into a throw-away overlay: the point itself never changes."
)
@click.option(
    "--socket", type=click.Path(path_type=Path), metavar="FILE", help="Where to listen (default: in the home)."
)
def export_command(
    context: Context, domain: str, when: str, disks: tuple[str, ...], writable: bool, socket: Path | None
) -> None:
    """Serve a point of DOMAIN as NBD disks until Ctrl-C.

    Prints one NBD URI for each disk, for nbdinfo, nbdcopy, qemu-img, guestfish, qemu-system. Works while libvirt is
    down, and for domains that are gone.
    """
    from appliance.service.elsewhere import export

    with context.session() as session, export(session, domain, when, disks, writable, socket) as served:
        for one in served.disks:
            record = records.Export(served.domain, served.point, served.time, one.disk, one.size, one.uri, writable)
            context.output.emit(record, f"{one.disk}: {one.uri}")
        context.output.note(f"{served.domain} at {clock(served.time)}; Ctrl-C ends it")
        try:
            served.wait()
        except KeyboardInterrupt:
            return


@verb("restore", *_POINT, ConnectError, Locked, AlreadyExists, TargetExists, NotSupported, NoSpace, PermissionDenied)
@domain_argument()
@click.option(
    "--at",
    "when",
    required=True,
    metavar="WHEN",
    shell_complete=complete_when,
    help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).",
)
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Where the new disks are written; made if it does not exist.")  # fmt: skip
@click.option("--name", metavar="NEW", help="Define a new domain of this name. Without: only disks and its definition.")
@click.option("--disk", "disks", multiple=True, metavar="TARGET", help="Only this disk; may be repeated. Default: all.")
@rate_option("Write at most this much a second (50M).")
@click.option("--format", "image_format", type=click.Choice(["qcow2", "raw"]), default="qcow2", show_default=True)
def restore_command(
    context: Context, domain: str, when: str, folder: Path, name: str | None, disks: tuple[str, ...],
    image_format: str, rate: int | None,
) -> None:  # fmt: skip
    """Write whole new disks of DOMAIN as of WHEN somewhere else, and a new domain of them.

    The domain itself is not touched and need not exist any more. Files that exist are never overwritten. A protected
    domain that is gone and restored whole under its own name keeps its UUID, so its protection and history go on.
    """
    from appliance.service.elsewhere import restore

    with context.session() as session, context.output.meter(f"restore of {domain}") as meter:
        made = restore(session, domain, when, folder, name, disks, image_format, rate or 0, meter.update)
    record = records.Restored(
        made.domain, made.point, made.time, made.name, made.defined, made.definition, made.files, made.written_bytes,
        made.seconds, made.left_out,
    )  # fmt: skip
    lines = [str(path) for path in made.files]
    if made.definition:
        lines.append(str(made.definition))
    lines += [f"left out: {one}" for one in made.left_out]
    speed = f"{format_size(made.written_bytes)} written in {format_duration(made.seconds)}"
    lines.append(f"{made.name} is defined, shut off; {speed}" if made.defined else speed)
    context.output.emit(record, "\n".join(lines))
