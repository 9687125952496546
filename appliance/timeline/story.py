"""What happened to a domain between two instants, ready to be drawn or printed: pure functions of what others know.

    points, timelines   ─┐                 lanes    one for each timeline, from its beginning to the next one's
    spans, gaps          ├─► Story ─►      buckets  how much was written in each of N equal parts of the time
    journal's segments  ─┘                 the rest as it was, cut to the window

How much was written is what the journal's segments say, and nothing where it was kept and says nothing; where there is
none, what each point differs from the one before it, spread over the time between the two: the least that was written,
since a block that changes twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate

from appliance.model import Timeline
from appliance.timeline.catalogue import Gap, Summary
from appliance.timeline.instant import starts
from appliance.timeline.spans import Base, Branch, CapturedSpan, Event

__all__ = ["Bucket", "Flow", "Known", "Lane", "Mark", "Story", "reachable", "tell"]


@dataclass(frozen=True, slots=True)
class Flow:
    """Bytes that were written between two instants; the two may be equal."""

    start: datetime
    end: datetime
    bytes: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A label in the journal."""

    time: datetime
    label: str
    journal: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Known:
    """All that is known of a domain's past, in any order; `flows` are the journal's, `covered` the times of which it
    tells all, `lived` are timelines that are known to have been the present though there may be no point on them."""

    points: Sequence[Summary]
    timelines: Sequence[Timeline] = ()
    spans: Sequence[CapturedSpan] = ()
    gaps: Sequence[Gap] = ()
    branches: Sequence[Branch] = ()
    events: Sequence[Event] = ()
    flows: Sequence[Flow] = ()
    marks: Sequence[Mark] = ()
    lived: Sequence[str] = ()
    covered: Sequence[tuple[datetime, datetime]] = ()


@dataclass(frozen=True, slots=True)
class Bucket:
    """`bytes` were written in `seconds` from `start` on. `exact`: every write counts, else only what differs."""

    start: datetime
    seconds: float
    bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Lane:
    """One timeline within the window: it was the present from `start` to `end`. `origin` is the point that it continues
    from, `parent` the timeline of that; None for the first of a history."""

    timeline: str
    start: datetime
    end: datetime
    points: tuple[Summary, ...]
    parent: str | None = None
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """What is shown. Everything ascends by time and touches the window."""

    since: datetime
    until: datetime
    buckets: tuple[Bucket, ...]
    lanes: tuple[Lane, ...]
    spans: tuple[CapturedSpan, ...]
    gaps: tuple[Gap, ...]
    branches: tuple[Branch, ...]
    events: tuple[Event, ...]
    marks: tuple[Mark, ...]

    @property
    def points(self) -> tuple[Summary, ...]:
        return tuple(sorted((one for lane in self.lanes for one in lane.points), key=lambda one: (one.time, one.id)))

    @property
    def gap_seconds(self) -> float:
        """Of the window, how much was not captured."""
        cut = ((max(one.start, self.since), min(one.end, self.until)) for one in self.gaps)
        return sum((end - start).total_seconds() for start, end in cut if end > start)


def tell(known: Known, since: datetime, until: datetime, buckets: int) -> Story:
    """The story between two instants, `since` before `until`, with that many buckets of equal length."""
    return Story(
        since, until, tuple(_buckets(known, since, until, buckets)), tuple(_lanes(known, since, until)),
        tuple(one for one in known.spans if one.start <= until and one.end >= since),
        tuple(one for one in known.gaps if one.start <= until and one.end >= since),
        tuple(one for one in known.branches if since <= one.time <= until),
        tuple(one for one in known.events if since <= one.time <= until),
        tuple(sorted((one for one in known.marks if since <= one.time <= until), key=lambda one: one.sequence)),
    )  # fmt: skip


def reachable(
    spans: Sequence[CapturedSpan], points: Sequence[Summary], held: Mapping[str, Sequence[tuple[int, int]]]
) -> list[CapturedSpan]:
    """The spans with the bases that are of use today: the point is still there, and so is every record from it to the
    end of the span. `held` are the (first, last) numbers of each journal that are kept, in any order."""
    return [_reachable(span, points, _run(held.get(span.journal, ()), span.last)) for span in spans]


def _reachable(span: CapturedSpan, points: Sequence[Summary], first: int) -> CapturedSpan:
    kept = (one for one in starts(span, points) if one.sequence >= min(first - 1, span.last))
    return replace(span, bases=tuple(Base(one.journal, one.sequence, one.time, one.point) for one in kept))


def _run(held: Sequence[tuple[int, int]], last: int) -> int:
    """The first number from which on everything up to `last` is held; last + 1 when not even that is."""
    first = last + 1
    for begin, end in sorted(held, reverse=True):
        if end >= first - 1:
            first = min(first, begin)
    return first


def _lanes(known: Known, since: datetime, until: datetime) -> list[Lane]:
    """Timelines in the order in which they were the present. Where nobody wrote down when one began, it was with its
    first point."""
    lived = _lived(known)
    origins = {name: one for name, one in _origins(known).items() if name in lived}
    begin = {name: start for name, (start, _, _) in origins.items()}
    for point in known.points:
        begin[point.timeline] = min(point.time, begin.get(point.timeline, point.time))
    order = sorted(begin, key=lambda name: (begin[name], name))
    lanes = []
    for number, name in enumerate(order):
        end = begin[order[number + 1]] if number + 1 < len(order) else until
        mine = [one for one in known.points if one.timeline == name and since <= one.time <= until]
        if begin[name] <= until and (end >= since or mine):
            _, parent, origin = origins.get(name, (since, None, None))
            points = tuple(sorted(mine, key=lambda one: (one.time, one.id)))
            lanes.append(Lane(name, max(begin[name], since), min(max(end, since), until), points, parent, origin))
    return lanes


def _lived(known: Known) -> set[str]:
    """The timelines that were the present once. A revert writes its own down before it changes anything, so one that
    was given up has left a timeline that nothing continues from and of which there is nothing."""
    parents = {one.id: one.parent for one in known.timelines}
    signs = [one.timeline for some in (known.points, known.branches, known.spans) for one in some]
    waiting = {*signs, *known.lived, *(name for name, parent in parents.items() if parent is None)}
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= {one for one in (parents.get(name),) if one is not None} - found
    return found


def _origins(known: Known) -> dict[str, tuple[datetime, str | None, str | None]]:
    """Of each timeline: its beginning, the timeline it left, the point it continues from."""
    homes = {one.id: one.timeline for one in known.points}
    found: dict[str, tuple[datetime, str | None, str | None]] = {
        one.timeline: (one.time, homes.get(one.point), one.point) for one in known.branches if one.timeline
    }
    return found | {one.id: (one.created, one.parent, one.origin) for one in known.timelines}


def _buckets(known: Known, since: datetime, until: datetime, count: int) -> list[Bucket]:
    length = (until - since) / count
    written, differs = _spread(known.flows, since, length, count), _spread(_changes(known.points), since, length, count)
    seen = _touched(known, since, length, count)
    # The sums are rounded and not the parts, so that the parts add up.
    sums = [0, *(round(one) for one in accumulate(written[n] if n in seen else differs[n] for n in range(count)))]
    seconds = length.total_seconds()
    return [Bucket(since + n * length, seconds, sums[n + 1] - sums[n], n in seen) for n in range(count)]


def _changes(points: Iterable[Summary]) -> list[Flow]:
    """What each point differs from the one that it is counted against. Without one nothing is known of when."""
    times = {one.id: one.time for one in points}
    return [
        Flow(min(times[one.since], one.time), one.time, one.changed_bytes)
        for one in points
        if one.since in times and one.changed_bytes
    ]


def _spread(flows: Iterable[Flow], since: datetime, length: timedelta, count: int) -> list[float]:
    """Bytes of each bucket; a flow's are spread evenly over its time."""
    found = [0.0] * count
    for flow in flows:
        low, high = (flow.start - since) / length, (max(flow.end, flow.start) - since) / length
        if high == low:
            if 0 <= low < count:
                found[int(low)] += flow.bytes
            continue
        for n in range(max(0, int(low)), min(count, int(high) + 1)):
            share = (min(high, n + 1) - max(low, n)) / (high - low)
            found[n] += flow.bytes * max(0.0, share)
    return found


def _touched(known: Known, since: datetime, length: timedelta, count: int) -> set[int]:
    """The buckets of which the journal tells: those that it has writes of, and what it covers."""
    found: set[int] = set()
    for start, stop in (*((one.start, max(one.end, one.start)) for one in known.flows), *known.covered):
        low, high = (start - since) / length, (stop - since) / length
        if high >= 0:
            found |= set(range(max(0, int(low)), min(count, int(high) + 1)))
    return found
