"""What a domain's continuous capture covered: pure functions of what the ledger says.

    began ─ confirmed ─ … ─ ended           a span: every write was seen from `first` to `last`
             │        └ branch: a revert    what follows is a span of its own, whose first base is the point gone to
             └ based: a point that is exact at one place of the span; from there on any write can be reached

Nothing is claimed that was not confirmed: a span whose writer died ends where it was last seen to run, and a line
that cannot be read ends it before that line. A state at a number is its base and the records after it; both lie in one
span, because between two spans something was written that nobody saw. Orders are by file, not by clock: clocks are set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from appliance.timeline.catalogue import Gap

__all__ = ["Base", "Branch", "CapturedSpan", "Event", "Line", "captured", "gaps", "open_span", "span_at", "state_at"]

# The capture is looked at once a second; this long without a word is no longer a late look.
_SILENT = timedelta(seconds=5)
_NO_BASE = "the capture had no baseline yet"
_NO_WORD = "the process that captured ended without a word"
_DAMAGED = "the ledger is damaged here"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the ledger. `what` is began, confirmed, ended, stopped, based, branch, event, or empty for one that
    cannot be read; fields that a kind does not have are empty. Numbers ascend; of a confirmed place or an end, `upto`
    is that of the last line before it: what that line says was seen to hold."""

    what: str
    time: datetime
    number: int = 0
    upto: int = 0
    span: str = ""
    journal: str = ""
    sequence: int = 0
    reason: str = ""
    point: str = ""
    timeline: str = ""
    kind: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A point that is the state of all disks after record `sequence` of the journal and before the next one."""

    journal: str
    sequence: int
    time: datetime
    point: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A revert under the capture: after record `sequence` the disks were `point`, on a timeline of its own."""

    journal: str
    sequence: int
    time: datetime
    point: str
    timeline: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something of the capture that a person may ask for later: a fallback, a degraded tier, lost discards."""

    kind: str
    time: datetime
    detail: str


@dataclass(frozen=True, slots=True)
class CapturedSpan:
    """Records `first` < n <= `last` are all writes of all disks between two instants, on one timeline.

    `end` is the last instant at which the capture was seen to run; should the clock have been set back meanwhile, the
    latest that it showed, and `seen` what it showed last. `reason_ended` is empty while it runs; `timeline` is empty
    unless the span began with a revert. `bases` ascend by sequence. `stopped` is when it was given up on purpose: from
    then on nothing was to be captured.
    """

    id: str
    journal: str
    first: int
    last: int
    start: datetime
    end: datetime
    seen: datetime
    reason_ended: str = ""
    bases: tuple[Base, ...] = ()
    timeline: str = ""
    branched: bool = False
    stopped: datetime | None = None

    @property
    def open(self) -> bool:
        return not self.reason_ended

    @property
    def base_points(self) -> tuple[str, ...]:
        """Ids of the points from which writes of this span can be reached."""
        return tuple(one.point for one in self.bases)

    @property
    def since(self) -> datetime | None:
        """The first instant of it that can be reached; None when there is none."""
        found = self.bases[0].time if self.bases and self.bases[0].sequence <= self.last else None
        return found if found is not None and found <= self.end else None

    def usable(self, sequence: int) -> tuple[Base, ...]:
        """Bases from which record `sequence` can be reached, nearest first; none outside of the span."""
        if not self.first <= sequence <= self.last:
            return ()
        return tuple(reversed(self.bases[: bisect_right(self.bases, sequence, key=lambda one: one.sequence)]))


@dataclass(slots=True)
class _Making:
    """A span while its lines are read. `last`, `time` and `upto` are the last confirmed place. `points` have the number
    of branches before them; both come with their lines' numbers."""

    span: CapturedSpan
    last: int
    time: datetime
    upto: int = 0
    branches: list[tuple[int, Branch]] = field(default_factory=list)
    points: list[tuple[int, int, Base]] = field(default_factory=list)


def captured(lines: Iterable[Line]) -> list[CapturedSpan]:
    """The spans that these lines prove, in the order in which they were captured; a revert divides one."""
    making: list[_Making] = []
    for line in lines:
        one = making[-1] if making and making[-1].span.open else None
        if line.what == "began":
            if one:
                _end(one, _NO_WORD)
            fresh = CapturedSpan(line.span, line.journal, line.sequence, line.sequence, *(line.time,) * 3)
            making.append(_Making(fresh, line.sequence, line.time))
        elif making and line.what == "stopped":
            # Process and verb may both say it: the first one counts.
            making[-1].span = replace(making[-1].span, stopped=making[-1].span.stopped or line.time)
            if one:
                _end(one, _NO_WORD)
        elif one and line.what == "":
            _end(one, _DAMAGED)
        elif one and line.what == "based" and _within(line, one, making):
            _take(line, one)
        elif one and line.what == "branch" and line.journal == one.span.journal:
            branch = Branch(line.journal, line.sequence, line.time, line.point, line.timeline)
            one.branches.append((line.number, branch))
        elif one and line.what in ("confirmed", "ended") and line.span == one.span.id:
            _seen(one, line)
    return [piece for one in making for piece in _divided(one)]


def open_span(lines: Sequence[Line]) -> Line | None:
    """The line that began the span which is still open."""
    for line in reversed(lines):
        if line.what in ("", "ended", "stopped"):
            return None
        if line.what == "began":
            return line
    return None


def _end(one: _Making, reason: str) -> None:
    one.span = replace(one.span, reason_ended=reason)


def _seen(one: _Making, line: Line) -> None:
    one.last, one.time, one.upto = max(one.last, line.sequence), max(one.time, line.time), max(one.upto, line.upto)
    one.span = replace(one.span, seen=line.time)
    if line.what == "ended":
        _end(one, line.reason or _NO_WORD)


def _within(line: Line, one: _Making, making: Sequence[_Making]) -> bool:
    """Whether a point was taken in this span, the last one. A higher number than the span began with was given out in
    it. With that number itself it may be of before, written down late: then the time has to tell, if the clock was not
    set back between the two spans."""
    if line.span or line.journal != one.span.journal or line.sequence != one.span.first:
        return line.span in ("", one.span.id) and line.journal == one.span.journal and line.sequence >= one.span.first
    set_back = len(making) > 1 and making[-2].time > one.span.start
    return line.time >= one.span.start and not set_back


def _take(line: Line, one: _Making) -> None:
    """Put a point after the branches that precede it. At a branch's own number only a clock could tell of a point that
    comes after it in the ledger; if it tells that the point preceded the branch, it may have been set back."""
    before = sum(1 for _, branch in one.branches if branch.sequence <= line.sequence)
    if not any(b.sequence == line.sequence and line.time <= b.time for _, b in one.branches):
        one.points.append((line.number, before, Base(line.journal, line.sequence, line.time, line.point)))


def _divided(one: _Making) -> list[CapturedSpan]:
    """The span cut at its branches. Points and branches after which nobody looked are left out: a point may hold writes
    that nobody saw, and after a branch maybe nothing was captured."""
    pieces: list[CapturedSpan] = []
    rest, origin = one.span, list[Base]()
    known = [branch for number, branch in one.branches if number <= one.upto]
    for number, branch in enumerate(known):
        until = max(rest.start, branch.time)
        left = f"a revert to {branch.point}"
        bases = _sorted(origin, one, number)
        pieces.append(replace(rest, last=branch.sequence, end=until, reason_ended=left, bases=bases, stopped=None))
        origin = [Base(branch.journal, branch.sequence, branch.time, branch.point)]
        rest = replace(one.span, first=branch.sequence, start=branch.time, timeline=branch.timeline, branched=True)
    end = max(rest.start, one.time)
    return [*pieces, replace(rest, last=one.last, end=end, bases=_sorted(origin, one, len(known)))]


def _sorted(origin: list[Base], one: _Making, before: int) -> tuple[Base, ...]:
    own = [base for number, branches, base in one.points if number <= one.upto and branches == before]
    return tuple(sorted([*origin, *own], key=lambda base: base.sequence))


def gaps(spans: Sequence[CapturedSpan], now: datetime) -> list[Gap]:
    """What cannot be reached, oldest first, from the first moment that was to be captured until now.

    A gap whose length the clock hides, because it was set back, has none; it is listed all the same.
    """
    found: list[Gap] = []
    place, reason, joined = (spans[0].start if spans else now), _NO_BASE, False
    for number, span in enumerate(spans):
        if number and spans[number - 1].stopped is not None:
            place, reason, joined = span.start, _NO_BASE, False
        if span.since is not None:
            if not (joined and span.branched) and (span.since > place or reason != _NO_BASE):
                found.append(Gap(place, max(place, span.since), reason))
            place, reason, joined = span.end, span.reason_ended, True
        else:
            joined = False
        if span.stopped is not None and span.stopped > place:
            found.append(Gap(place, span.stopped, reason))
    last = spans[-1] if spans else None
    if last is None or last.stopped is not None:
        return found
    if last.since is None or not last.open or abs(now - last.seen) > _SILENT:
        found.append(Gap(place, max(place, now), reason or "the capture has not been seen to run since"))
    return found


def span_at(spans: Sequence[CapturedSpan], time: datetime) -> CapturedSpan | None:
    """The span that holds the instant. When the clock was set back and it came twice, the earlier one: going back too
    far loses less than going back too little."""
    return next((one for one in spans if one.since is not None and one.since <= time <= one.end), None)


def state_at(spans: Sequence[CapturedSpan], journal: str, sequence: int) -> tuple[Base, ...]:
    """Bases for the state after record `sequence`, nearest first; none when no span proves every record in between.

    At the very number at which a revert branched off it is the state that was left: the other one is a point.
    """
    for one in spans:
        found = one.usable(sequence) if one.journal == journal else ()
        if found:
            return found
    return ()
