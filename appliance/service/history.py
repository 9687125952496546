"""points, diff: what the history of a domain holds, and in what two instants of it differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.errors import DiskNotFound
from appliance.extents import Extent
from appliance.model import Consistency, DiskKind, DiskPoint, Point
from appliance.service.capturing import missing
from appliance.service.naming import uuid_of
from appliance.timeline.catalogue import Gap, Summary
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["Difference", "History", "diff", "history", "resolve"]


@dataclass(frozen=True, slots=True)
class History:
    """The points of one domain, oldest first, and what is missing between them."""

    domain: str
    uuid: str
    points: list[Summary]
    gaps: list[Gap]


@dataclass(frozen=True, slots=True)
class Difference:
    """One disk between two points. `extents` is lazy: reading it computes the difference, in units of `unit` bytes."""

    disk: str
    size: int
    unit: int
    extents: Iterator[Extent]


def history(session: Session, name: str, now: datetime | None = None, measure: bool = True) -> History:
    """Everything about one domain; `measure` as for the catalogue's points. Raises as `uuid_of`."""
    uuid, domain = uuid_of(session, name, reading=True)
    record = session.record(uuid)
    found = session.catalogue.points(uuid, measure)
    _tell_tests(session, found)
    every, continuous = (record.every, record.continuous) if record else (None, False)
    spans = Ledger(session.home.ledger(uuid)).spans()
    return History(domain, uuid, found, missing(found, every, spans, continuous, now or datetime.now(UTC)))


def _tell_tests(session: Session, points: list[Summary]) -> None:
    """What test boots showed since: a point itself is never written again."""
    from appliance.service.image import evidence

    marks = evidence.known(session)
    for one in points:
        mark = marks.get(one.id)
        if mark is not None and mark.booted:
            one.consistency = Consistency.BOOTED.value
        elif mark is not None:
            one.notes = (*one.notes, "it did not boot as a test: see `rewind image evidence`")


def resolve(
    session: Session, name: str, when: str, now: datetime | None = None, *, taken: bool = False, passing: bool = False
) -> Point:  # fmt: skip
    """The point that `when` names, complete, also where only continuous capture has it and it is to be made (`taken`:
    only one that is there; `passing`: for this session only, no point is left behind). Raises NoSuchPoint,
    AmbiguousPoint, InGap, and what `service.instant` raises."""
    from appliance.service import instant

    return instant.resolve(session, name, when, now, taken=taken, passing=passing)


def diff(
    session: Session, name: str, older: str, newer: str, disk: str | None = None, unit: int = CHUNK
) -> tuple[Point, Point, list[Difference]]:
    """Both points and the differing extents of each disk: whole chunks, or exact to `unit` bytes
    (4096 reads both sides of every differing chunk). To be read before the session is closed; no point is made of an
    instant that only continuous capture has. Raises DiskNotFound."""
    a, b = resolve(session, name, older, passing=True), resolve(session, name, newer, passing=True)
    before, after = _disks(a), _disks(b)
    if disk is not None and disk not in before | after:
        raise DiskNotFound(domain=name, disk=disk, disks=", ".join(sorted(before | after)))
    wanted = [disk] if disk else sorted(before | after)
    return a, b, [_difference(session, one, before.get(one), after.get(one), unit) for one in wanted]


def _disks(point: Point) -> dict[str, DiskPoint]:
    return {one.disk: one for one in point.disks if one.kind is DiskKind.DISK}


def _difference(session: Session, name: str, a: DiskPoint | None, b: DiskPoint | None, unit: int) -> Difference:
    from appliance.timeline.diff import changed_extents

    size = max(one.size for one in (a, b) if one is not None)
    found = changed_extents(session.repository, a.map if a else None, b.map if b else None, unit)
    return Difference(name, size, unit, found)
