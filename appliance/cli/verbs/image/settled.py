"""image settle: what a domain that was brought up has done to itself, and its boot medium taken away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.secrets import luks_keys, luks_option
from appliance.errors import (
    ConfigError,
    ConnectError,
    DomainNotFound,
    GuestUnreadable,
    ImageError,
    NotSettled,
    NotSupported,
)

if TYPE_CHECKING:
    from appliance.service.image.settling import Settled

__all__ = ["settle_command"]

_WORDS = {"done": "done", "nothing": "nothing to do", "left": "left as it was", "failed": "FAILED"}


@verb("settle", ConnectError, ConfigError, DomainNotFound, GuestUnreadable, ImageError, NotSettled, NotSupported)
@click.argument("name")
@luks_option
def settle_command(context: Context, name: str, luks_key: tuple[str, ...]) -> None:
    """Take the boot medium from a domain that was started with --settle, if its disk starts by itself now.

    The domain has to be shut off and its disks its own. What its steps came to is read from its disk and told; where
    the disk cannot start by itself the medium stays, and it is said why.
    """
    from appliance.service.image import settling

    with context.session() as session:
        found = settling.settle(session, name, luks_keys(luks_key))
    steps = tuple(records.ImageStep(one.name, one.outcome, one.said) for one in found.steps)
    lines = [f"{one.name:12} {_WORDS[one.outcome]:14}  {'; '.join(one.said)}".rstrip() for one in steps]
    lines.append(_upshot(found))
    context.output.emit(records.ImageSettled(found.name, found.alone, steps, found.medium), "\n".join(lines))
    if not found.alone:
        raise NotSettled(name=name, reason=found.reason, hint=_hint(found))


def _upshot(found: Settled) -> str:
    medium = "no boot medium is attached" if found.medium is None else f"{found.medium} is not needed any more"
    if found.alone:
        return f"{found.name} starts from its own disk; {medium}"
    return f"{found.name} has no boot medium" if found.medium is None else f"{found.medium} stays attached"


def _hint(found: Settled) -> str:
    if found.last:
        then = "then the next start from its boot medium tries again"
        return f"remove {found.last} in the guest once it has what it lacks; {then}"
    if not found.again:
        return f"have `virsh edit {found.name}` put the disk that its loader step names first, and take the medium away"
    if found.medium is None:
        return "attach the medium that `rewind image start` made for it: each start from it tries again"
    return "each start from its boot medium tries again; a package that the guest lacks can be installed before"
