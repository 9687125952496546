"""image settle: what a domain that was brought up has done to itself, and its boot medium taken away."""

from __future__ import annotations

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.secrets import luks_keys, luks_option
from appliance.errors import ConfigError, ConnectError, DomainNotFound, GuestUnreadable, ImageError

__all__ = ["settle_command"]

_WORDS = {"done": "done", "nothing": "nothing to do", "left": "left as it was", "failed": "FAILED"}


@verb("settle", ConnectError, ConfigError, DomainNotFound, GuestUnreadable, ImageError)
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
    if found.alone:
        lines.append(f"{name} starts from its own disk now; {found.medium} is not needed any more")
    else:
        lines.append(f"{name} needs {found.medium} to start: it stays attached")
    context.output.emit(records.ImageSettled(found.name, found.alone, steps, found.medium), "\n".join(lines))
