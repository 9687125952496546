"""diff: in what two instants of a domain differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.errors import DiskNotFound
from appliance.extents import Extent
from appliance.model import DiskKind, DiskPoint, Point
from appliance.service.instant import resolve
from appliance.units import CHUNK

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["Difference", "diff"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One disk between two points. `extents` is lazy: reading it computes the difference, in units of `unit` bytes."""

    disk: str
    size: int
    unit: int
    extents: Iterator[Extent]


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
