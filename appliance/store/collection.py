"""What gc leaves in the repository for everybody: which packs it is about to drop.

    gc/NUMBER.condemned     packs nobody may come to rely on any more, and the sessions that may already do
    gc/NUMBER.sweeping      put before the first of them is deleted

    writer                                   gc
    1 put a shared lock (a session)          1 put the condemned list
    2 read the condemned lists               2 list the sessions; they go into a second object, NUMBER.sessions
    3 rely on no condemned pack              3 wait until these have ended; then look once more what lives, copy
                                               that, and delete

Whichever came first, one sees the other: a session that gc did not list put its lock after that, so it reads the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from appliance.errors import AlreadyExists, IntegrityError, ObjectNotFound, VersionUnsupported
from appliance.store.backend.base import Backend

__all__ = ["Collection", "condemn", "finish", "load", "mark_sweeping", "put_sessions"]

PREFIX: Final = "gc/"
_VERSION: Final = 1


@dataclass(slots=True)
class Collection:
    """One condemned list. `sessions` is None until gc has listed them: then it is not known who has to end."""

    number: int
    packs: set[bytes] = field(default_factory=set)
    sessions: set[str] | None = None
    sweeping: bool = False


def load(backend: Backend) -> list[Collection]:
    """Every collection that has not been finished, oldest first; the last finished one is kept, without packs."""
    found: dict[int, Collection] = {}
    for info in backend.list(PREFIX):
        number, _, what = info.name.removeprefix(PREFIX).partition(".")
        if not number.isdigit():
            continue
        try:
            values = _decoded(info.name, backend.get(info.name))
        except ObjectNotFound:
            continue
        one = found.setdefault(int(number), Collection(int(number)))
        if what == "condemned":
            one.packs = {bytes.fromhex(pack) for pack in values["packs"]}
        elif what == "sessions":
            one.sessions = set(values["sessions"])
        elif what == "sweeping":
            one.sweeping = True
    return [found[number] for number in sorted(found)]


def condemn(backend: Backend, packs: Iterable[bytes]) -> Collection:
    """Durably tell everybody. The caller holds the maintenance lock; if it lost it, the name is taken and we go on
    with the next.
    """
    number = max((one.number for one in load(backend)), default=0) + 1
    chosen = set(packs)
    while True:
        try:
            _put(backend, number, "condemned", {"packs": sorted(pack.hex() for pack in chosen)})
        except AlreadyExists:
            number += 1
        else:
            return Collection(number, chosen)


def put_sessions(backend: Backend, one: Collection, sessions: Iterable[str]) -> None:
    one.sessions = set(sessions)
    _put(backend, one.number, "sessions", {"sessions": sorted(one.sessions)})


def mark_sweeping(backend: Backend, one: Collection) -> None:
    if not one.sweeping:
        one.sweeping = True
        _put(backend, one.number, "sweeping", {})


def finish(backend: Backend, one: Collection) -> None:
    """After its packs are gone. Its `sweeping` stays until the next is finished: by it others see that packs went."""
    for earlier in load(backend):
        if earlier.number < one.number and not earlier.packs:
            for what in ("sessions", "sweeping"):
                backend.delete(_name(earlier.number, what))
    backend.delete(_name(one.number, "condemned"))
    backend.delete(_name(one.number, "sessions"))


def _put(backend: Backend, number: int, what: str, values: dict[str, Any]) -> None:
    backend.put(_name(number, what), json.dumps({"format": _VERSION, **values}).encode())


def _name(number: int, what: str) -> str:
    return f"{PREFIX}{number:010d}.{what}"


def _decoded(name: str, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
        version = values["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(object=name, reason="it cannot be read") from error
    if version != _VERSION:
        raise VersionUnsupported(object=name, version=version, supported=_VERSION)
    return dict(values)
