"""image reader: what reads guests on xfs, btrfs, LUKS or md, made once on a host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.text import clock
from appliance.errors import GuestUnreadable, ImageError, ToolFailed
from appliance.units import format_size

if TYPE_CHECKING:
    from appliance.service.image.readers import Kept

__all__ = ["reader_command"]


@click.group("reader", no_args_is_help=False, short_help="What reads guests on xfs, btrfs, LUKS or md.")
def reader_command() -> None:
    """What reads guests on xfs, btrfs, LUKS or md: a small system for libguestfs, made once on a host.

    Guests on ext4, on partitions or LVM, are read without it. It is made of this host's packages, and again after an
    upgrade of libguestfs or QEMU: `doctor` tells when.
    """


@verb("build", ImageError, ToolFailed, GuestUnreadable)
@click.option("--kernel", metavar="WHAT",
              help="A Debian package or a .deb file (default: this host's newest kernel).")  # fmt: skip
def _build(context: Context, kernel: str | None) -> None:
    """Make the reader, or make it anew, and start it once. Takes a minute and 700 MiB of the home."""
    from appliance.service.image import readers

    what: str | Path | None = Path(kernel) if kernel and kernel.endswith(".deb") else kernel
    with context.session() as session:
        kept = readers.make(session, what)
    _emit(context, kept)


@verb("show")
def _show(context: Context) -> None:
    """Show the reader of this host, and whether it is of use."""
    from appliance.service.image import readers

    with context.session() as session:
        kept = readers.shown(session)
    if kept:
        _emit(context, kept)
    else:
        context.output.note("no reader; `rewind image reader build` makes it")


@verb("remove")
def _remove(context: Context) -> None:
    """Remove the reader. Guests that need it are refused then."""
    from appliance.service.image import readers

    with context.session() as session:
        readers.remove(session)
    context.output.emit(records.ImageRemoved("reader", "reader"), "the reader is removed")


def _emit(context: Context, kept: Kept) -> None:
    record = records.ImageReader(kept.path, kept.created, kept.kernel, kept.qemu, kept.size, kept.unfit)
    state = f"refused, {kept.unfit}: `rewind image reader build`" if kept.unfit else "ready"
    text = f"{clock(kept.created)}  kernel {kept.kernel}  {format_size(kept.size)}  {state}"
    context.output.emit(record, text)


for _one in (_build, _show, _remove):
    reader_command.add_command(_one)
