"""How finely the past of continuous capture is kept, by age; what that asks to be done now. Pure.

    every write     for `journal` seconds: the journal itself
    a minute        for `minutes`: a point for each minute, made from the journal
    an hour         for `hours`: of each hour the newest of these points

A point of a minute is made when the minute is over, not when the journal ends: it is what later instants are counted
from, and then the journal can be forgotten at once. Records go only up to a point that exists. What people and
schedules made (another reason, or a label) stays whatever its age; so do all points as young as the journal.

When it does not keep up, or the spool fills, it gets coarser, in this order and no further than needed:

    1  the spool forgets what was shipped (instants are fetched then), or, where nothing is shipped, what is in points:
       every write for less than `journal`
    2  a point for each 5 minutes, then for each hour: writes that overwrite each other are then stored once
    3  the tap process goes over to epochs (the spool's limit): a gap
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from appliance.timeline.instant import MADE, Made, starts
from appliance.timeline.spans import CapturedSpan

__all__ = ["FULL", "Plan", "Tiers", "Wanted", "counted_from", "plan", "replaced", "step_for"]

MINUTE: Final = 60
HOUR: Final = 3600
# Shares of the spool's limit: from the first on the journal is kept for less time, then points get coarser.
FULL: Final = 0.7
_FULLER: Final = 0.85
_FULLEST: Final = 0.95
# So many steps behind, the next coarser one is taken.
_BEHIND: Final = 10


@dataclass(frozen=True, slots=True)
class Tiers:
    """For how many seconds. Each is at least as long as the one before counts."""

    journal: float = 4 * 3600.0
    minutes: float = 2 * 86400.0
    hours: float = 90 * 86400.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A point to be made: the state at that time; of an ended span its last one, at `sequence`."""

    span: CapturedSpan
    time: datetime
    sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """`make` oldest first, `step` seconds apart; `drop` are ids of points that no tier keeps."""

    step: int
    make: tuple[Wanted, ...]
    drop: tuple[str, ...]


def step_for(used: float, behind: float) -> int:
    """Seconds between two points: `used` is the share of the spool's limit, `behind` the seconds not yet in points."""
    if used >= _FULLEST or behind > _BEHIND * 5 * MINUTE:
        return HOUR
    if used >= _FULLER or behind > _BEHIND * MINUTE:
        return 5 * MINUTE
    return MINUTE


def plan(
    points: Sequence[Made], spans: Sequence[CapturedSpan], tiers: Tiers, now: datetime, *,
    used: float = 0.0, done: datetime | None = None, step: int | None = None,
) -> Plan:  # fmt: skip
    """What is to be made and what may go. `done`: up to then every point was made, also where nothing was written and
    none is to be seen. `step` in seconds is chosen by how far behind that is and how full the spool, unless given."""
    open_from = max((at for span in spans if (at := _made_until(span, points, done))), default=None)
    behind = (spans[-1].end - open_from).total_seconds() if open_from else 0.0
    step = step or step_for(used, behind)
    make = [one for span in spans for one in _missing(span, points, tiers, now, step, done)]
    return Plan(step, tuple(make), tuple(_no_more(points, spans, tiers, now)))


def replaced(
    points: Sequence[Made], spans: Sequence[CapturedSpan], journal: str, upto: datetime, done: datetime | None
) -> int:
    """Up to which record that journal is not needed for anything after `upto`: points stand for what was before.

    0 when nothing may be forgotten. Every later number that can be reached still can afterwards. `done`: up to then
    every point was made that could be.
    """
    last = 0
    for span in (one for one in spans if one.journal == journal):
        found = starts(span, points)
        past = not span.open and span.end <= upto
        if past and (not found or found[-1].sequence == span.last or (done is not None and done >= span.end)):
            last = span.last
            continue
        old = [one.sequence for one in found if one.time <= upto]
        return max(last, old[-1] if old else 0)
    return last


def counted_from(points: Sequence[Made], spans: Sequence[CapturedSpan], tiers: Tiers, now: datetime) -> set[str]:
    """Ids of the points that the first records which are kept follow: of each span the last one that is older than the
    journal, or its first."""
    limit = now - timedelta(seconds=tiers.journal)
    found: set[str] = set()
    for span in (one for one in spans if one.open or one.end >= limit):
        reach = starts(span, points)
        before = [one for one in reach if one.time <= limit]
        found |= {one.point for one in before[-1:] or reach[:1]}
    return found


def _made_until(span: CapturedSpan, points: Sequence[Made], done: datetime | None) -> datetime | None:
    """Up to when its points were made; None when none of it can be reached."""
    found = starts(span, points)
    if not found:
        return None
    return min(done, span.end) if done is not None and done > span.start else max(one.time for one in found)


def _missing(
    span: CapturedSpan, points: Sequence[Made], tiers: Tiers, now: datetime, step: int, done: datetime | None
) -> list[Wanted]:
    start = _made_until(span, points, done)
    if start is None or span.end < now - timedelta(seconds=tiers.hours):
        return []
    wide = HOUR if span.end < now - timedelta(seconds=tiers.minutes) else step
    first, last = math.floor(start.timestamp() / wide) + 1, math.floor(span.end.timestamp() / wide)
    make = [Wanted(span, datetime.fromtimestamp(n * wide, UTC)) for n in range(first, last + 1)]
    ended = (
        not span.open
        and (done is None or done < span.end)
        and all(one.sequence != span.last for one in starts(span, points))
    )
    return [*make, Wanted(span, span.end, span.last)] if ended else make


def _no_more(points: Sequence[Made], spans: Sequence[CapturedSpan], tiers: Tiers, now: datetime) -> list[str]:
    """Ids of made points that are not the newest of their minute or hour, as long as that counts."""
    needed = {base.point for span in spans for base in span.bases if _age(span.end, now) <= tiers.journal}
    needed |= counted_from(points, spans, tiers, now)
    found: list[str] = []
    seen: set[tuple[str, int, int]] = set()
    for point in sorted(points, key=lambda one: (one.time, one.id), reverse=True):
        age = _age(point.time, now)
        if point.reason != MADE or point.label or age <= tiers.journal:
            continue
        width = MINUTE if age <= tiers.minutes else HOUR
        # The state at 10:00 stands for the minute that ends then, so a minute does not hold its beginning.
        slot = (point.timeline, width, math.ceil(point.time.timestamp() / width))
        kept = age <= tiers.hours and slot not in seen
        seen.add(slot)
        if not kept and point.id not in needed:
            found.append(point.id)
    return found


def _age(time: datetime, now: datetime) -> float:
    return (now - time).total_seconds()
