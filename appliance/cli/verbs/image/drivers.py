"""image drivers: kernel modules that guests do not have themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.text import counted
from appliance.errors import GuestUnreadable, ImageError, NoSpace, WrongKey
from appliance.units import format_size

__all__ = ["drivers_command"]


@click.group("drivers", no_args_is_help=False, short_help="Kernel modules that guests do not have themselves.")
def drivers_command() -> None:
    """Kernel modules that guests do not have themselves, each for exactly one kernel release."""


@verb("add", ImageError, GuestUnreadable, NoSpace, WrongKey)
@click.argument("path", type=click.Path(path_type=Path, exists=True), metavar="PATH")
@click.option("--release", default="", metavar="RELEASE", help="Refuse what is for another kernel release.")
def _add(context: Context, path: Path, release: str) -> None:
    """Keep the kernel modules of a folder, a .deb, an .rpm or one .ko file in the repository."""
    from appliance.service.image import drivers

    with context.session() as session:
        kept = drivers.add(session, path, release)
    _emit(context, kept)


@verb("list", WrongKey)
def _list(context: Context) -> None:
    """List what is kept, by kernel release."""
    from appliance.service.image import drivers

    with context.session() as session:
        found = drivers.listing(session)
    for one in found:
        _emit(context, one)
    if not found:
        context.output.note("no drivers besides the guests' own; `rewind image drivers add` adds some")


@verb("remove", ImageError, WrongKey)
@click.argument("name")
def _remove(context: Context, name: str) -> None:
    """Forget what `list` calls NAME."""
    from appliance.service.image import drivers

    with context.session() as session:
        drivers.remove(session, name)
    context.output.emit(records.ImageRemoved("drivers", name), f"drivers {name} are forgotten")


def _emit(context: Context, one: Any) -> None:
    record = records.ImageDrivers(one.name, one.release, one.digest, one.modules, one.size)
    text = f"{one.name}: {counted(one.modules, 'module')} for kernel {one.release}, {format_size(one.size)}"
    context.output.emit(record, text)


for _one in (_add, _list, _remove):
    drivers_command.add_command(_one)
