"""The options that tell what is to become of a guest once it runs on other hardware, of `build` and of `start`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from appliance.units import parse_size

if TYPE_CHECKING:
    from images.settle.choice import After

__all__ = ["after_options", "chosen", "sizes_of"]

_F = TypeVar("_F", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--settle", is_flag=True,
                 help="Once it runs, its own tools make its disk start by itself on this hardware."),
    click.option("--identity", type=click.Choice(["keep", "new"]), default="keep", show_default=True,
                 help="New: host name, machine id, SSH host keys and addresses (by DHCP) of its own."),
    click.option("--keep", multiple=True, type=click.Choice(["host-name", "machine-id", "ssh-keys", "addresses"]),
                 help="With a new identity: what it keeps of the old one all the same. May be repeated."),
    click.option("--host-name", default="", metavar="NAME", help="Its host name instead of the old one."),
    click.option("--grow", is_flag=True, help="Its root takes the room that a larger disk has."),
)  # fmt: skip


def after_options(function: _F) -> Callable[..., Any]:
    """The function gets `after`, for `chosen`."""

    @functools.wraps(function)
    def call(
        *args: Any, settle: bool, identity: str, keep: tuple[str, ...], host_name: str, grow: bool, **rest: Any
    ) -> Any:
        if keep and identity != "new":
            raise click.UsageError("--keep goes with --identity new: without it everything is kept")
        return function(*args, after=(settle, identity, host_name, grow, keep), **rest)

    wrapped: Callable[..., Any] = call
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def chosen(after: tuple[bool, Any, str, bool, tuple[str, ...]]) -> After:
    """Imported when it is used: a help text needs none of it."""
    from images.settle.choice import After

    return After(*after)


def sizes_of(_ctx: click.Context, _param: click.Parameter, values: Any) -> dict[str, int]:
    """Disk to bytes, from words like `vda=20G`."""
    found = {}
    for value in values:
        disk, _, text = value.partition("=")
        try:
            found[disk] = parse_size(text)
        except ValueError:
            disk = ""
        if not disk:
            raise click.BadParameter(f"{value!r} is not DISK=BYTES, like vda=20G")
    return found
