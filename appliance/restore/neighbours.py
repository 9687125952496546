"""Reverts of the other homes on this host that have not ended: who takes a point of such a disk, or reverts it, works
on what is neither state, and that home's `resume` writes over the result.

A running guest shows it by the revert's nodes in its block graph, a guest that is off by nothing: its images have no
mark, and with the keeper dead nobody holds their lock. So the homes are found, and asked. Their intents decide, so
that what tells where a home is cannot go stale:

    its libvirt hook                   is there through a reboot
    a link beside the host's locks     of every home that reverts, also of a bare QEMU; goes with those locks
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from appliance.config import Home
from appliance.errors import RestoreError, RevertUnderWay
from appliance.hypervisor import hostlock
from appliance.restore import fence
from appliance.restore import intent as intents
from appliance.restore.intent import Intent

__all__ = ["announce", "refuse_half_way"]

_LINK = "home-"


def announce(home: Home) -> None:
    """Let the other homes find this one, from before its first revert on. Raises PermissionDenied."""
    path = home.path.resolve()
    link = hostlock.folder() / (_LINK + hashlib.sha256(os.fsencode(path)).hexdigest()[:16])
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)


def refuse_half_way(home: Home, hooks: Path, names: Sequence[str], uuid: str, domain: str) -> None:
    """Raises RevertUnderWay, with the home in the hint, while another home's revert of this domain or of one of its
    images has not ended. `names` are the domain's locks on this host: see `hostlock`."""
    for other in _others(home, hooks):
        for one in _pending(other, uuid):
            if _is_about(one, names):
                command = f"rewind --home {shlex.quote(str(other.path))} resume {shlex.quote(one.domain)}"
                raise RevertUnderWay(
                    domain=domain, point=one.point, hint=f"home {other.path} began it: `{command}` ends it"
                )


def _is_about(one: Intent, names: Sequence[str]) -> bool:
    """By the domain, and only else by its images: to ask for these may take long where they are far away."""
    by_domain = set(hostlock.names_of(one.uuid, ()))
    if by_domain & set(names):
        return True
    return len(names) > 1 and bool(set(names) & set(hostlock.names_of(one.uuid, [disk.source for disk in one.disks])))


def _others(home: Home, hooks: Path) -> list[Home]:
    named = (*hostlock.folder().glob(_LINK + "*"), *fence.homes(hooks))
    mine = home.path.resolve()  # a home that was moved behind a link is none other
    return [Home(path) for path in sorted({one.resolve() for one in named}) if path != mine]


def _pending(other: Home, uuid: str) -> Iterator[Intent]:
    """What cannot be read counts only when it is about this domain: a folder of another user's is none of ours."""
    try:
        found = sorted(entry.name for entry in (other.path / "reverts").iterdir())
    except OSError:
        return
    for name in found:
        try:
            intent = intents.load(other, name)
        except RestoreError:
            if name == uuid:
                raise
            continue
        if intent is not None and not intent.ended:
            yield intent
