"""image template: what images are made from, made beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.text import clock
from appliance.errors import ImageError, NoSpace, NoSuchTemplate, ToolFailed, WrongKey
from appliance.units import format_size

__all__ = ["template_command"]


@click.group("template", no_args_is_help=False, short_help="What images are made from.")
def template_command() -> None:
    """What images are made from: a default kernel, boot loaders, and our own initrd. Made beforehand."""


@verb("build", ImageError, ToolFailed, NoSpace, WrongKey)
@click.option("--kernel", metavar="WHAT", help="A Debian package, a .deb file, or `/` for this host's newest kernel.")
def _build(context: Context, kernel: str | None) -> None:
    """Make a template and keep it in the repository. Takes minutes and downloads packages."""
    from appliance.service.image import templates
    from images.template.build import DEFAULT_KERNEL

    what: str | Path = kernel or DEFAULT_KERNEL
    if kernel and (kernel.endswith(".deb") or kernel.startswith("/")):
        what = Path(kernel)
    with context.session() as session:
        kept = templates.make(session, what)
    _emit(context, kept)


@verb("list", WrongKey)
def _list(context: Context) -> None:
    """List the templates, the oldest first."""
    from appliance.service.image import templates

    with context.session() as session:
        found = templates.listing(session)
    for one in found:
        _emit(context, one)
    if not found:
        context.output.note("no templates; `rewind image template build` makes one")


@verb("remove", NoSuchTemplate, WrongKey)
@click.argument("name", metavar="ID")
def _remove(context: Context, name: str) -> None:
    """Forget a template. Images that were made from it go on working."""
    from appliance.service.image import templates

    with context.session() as session:
        templates.remove(session, name)
    context.output.emit(records.ImageRemoved("template", name), f"template {name} is forgotten")


def _emit(context: Context, kept: Any) -> None:
    record = records.ImageTemplate(kept.id, kept.created, kept.release, kept.packages, kept.stored_bytes)
    text = f"{kept.id}  {clock(kept.created)}  kernel {kept.release}  {format_size(kept.stored_bytes)}"
    context.output.emit(record, text)


for _one in (_build, _list, _remove):
    template_command.add_command(_one)
