"""doctor: what on this host hinders or endangers protection, one sentence each, and the exact remedy.

    known       builds of QEMU with defects that endanger guests, ours or other people's tools on them
    host        tools, space, home, key, clock, hook, repository
    domains     every domain's disks, confinement, leftovers, and whether QEMU can reach our sockets

A check that cannot be made is itself a finding: doctor ends with a table, never with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import RewindError
from appliance.service.doctor import domains, host
from appliance.service.doctor.finding import Check, fail

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["Check", "examine", "fix"]


def examine(session: Session, domain: str | None = None) -> Iterator[Check]:
    """All checks, or those of one domain, and what fails of the key and the repository that it depends on. Changes
    nothing."""
    there = session.home.instance_file.exists()
    groups: list[Callable[[Session], Iterator[Check]]] = [*(host.CHECKS if there else host.WITHOUT_HOME)]
    for group in groups if domain is None else host.FOR_EACH_DOMAIN if there else ():
        found = _guarded(group.__name__.replace("_", " "), group, session)
        # What only deserves a look would make each domain look bad.
        yield from (one for one in found if domain is None or one.status == "fail")
    yield from _guarded("domains", lambda one: domains.check(one, domain), session)


def fix(session: Session) -> None:
    """Do what doctor can do itself: install the hook that fences a domain during a revert. Raises FenceError."""
    from appliance.restore.fence import install

    install(session.home, Path(session.settings.hook_directory))


def _guarded(name: str, group: Callable[[Session], Iterator[Check]], session: Session) -> Iterator[Check]:
    try:
        yield from group(session)
    except RewindError as error:
        yield fail(name, error.message, error.hint)
    except OSError as error:
        yield fail(name, f"cannot be examined: {error}", "run it as root")
