"""Any instant under continuous capture: which point it is counted from, and up to which record of the journal.

    #81726                       a record's number; plain digits too, when no id and no label is meant
    #81726?                      also one that nobody has confirmed: of the last moment before everything died
    14:02:11.250                 a time within a span of the ledger: the last record before anything later

    span     ├──base────────base──────────base────┤     bases: points of the ledger, and those made from the journal
    wanted                         ^                     start: the nearest base before it, on the same timeline

A point that somebody took in the very second that is typed is meant, as ever; one that was made from the journal is
not, for it may hold what was written later in that second.

A number is looked for in the newest journal that has it: an old one is reached by its times. Where a revert branched
off, the number of the switch is the state that was left. When the clock was set back and a time came twice, the earlier
one is meant, for the reason that `when` gives: going back too far loses less than going back too little.

All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Final, Protocol, TypeVar

from appliance.errors import InGap
from appliance.timeline.spans import Branch, CapturedSpan, span_at
from appliance.timeline.when import Kept, described

__all__ = [
    "MADE", "UNSEEN", "Made", "Start", "Window", "at_number", "at_time", "base_for", "nearest", "number_of", "refuse",
    "starts", "unseen", "window",
]  # fmt: skip

# The reason of a point that nobody took and that the journal can make again. It is exact at its number for certain.
MADE: Final = "journal"
# That of one made of writes that were recorded after the capture was last seen to be whole.
UNSEEN: Final = "unseen"

_NUMBER = re.compile(r"#?(\d{1,19})")


class Made(Kept, Protocol):
    """What is asked of a point here; model.Point and the catalogue's summaries have it."""

    @property
    def reason(self) -> str: ...
    @property
    def timeline(self) -> str: ...
    @property
    def journal(self) -> str: ...
    @property
    def sequence(self) -> int | None: ...


P = TypeVar("P", bound=Made)


@dataclass(frozen=True, slots=True)
class Start:
    """A point, and where it is to be counted from: that may not be what the point says itself, when a revert went to
    it. `timeline` is the one that its successors belong to."""

    point: str
    journal: str
    sequence: int
    time: datetime
    timeline: str


@dataclass(frozen=True, slots=True)
class Window:
    """The number that a time means is in start.sequence <= number <= upto, of the start's journal."""

    start: Start
    upto: int


def number_of(text: str) -> int | None:
    """The number of a record, if it can be one."""
    match = _NUMBER.fullmatch(text.strip())
    return int(match[1]) if match else None


def starts(span: CapturedSpan, points: Iterable[Made]) -> list[Start]:
    """Everything that a record of the span can be counted from and that still exists, ascending by number. What was
    made from the journal is exact at its number, whether the ledger tells of it or not."""
    known = {point.id: point for point in points}
    found: dict[tuple[int, str], Start] = {}
    for base in span.bases:
        if (point := known.get(base.point)) is not None:
            timeline = span.timeline or point.timeline
            found[base.sequence, base.point] = Start(base.point, base.journal, base.sequence, base.time, timeline)
    timelines = {one.timeline for one in found.values()} | ({span.timeline} - {""})
    for point in known.values():
        if point.journal != span.journal or point.sequence is None or point.reason != MADE:
            continue
        # At the very first number it may be the end of the span before: what was written between them is in neither.
        if span.first < point.sequence <= span.last and (point.timeline in timelines or not timelines):
            found[point.sequence, point.id] = Start(
                point.id, point.journal, point.sequence, point.time, point.timeline
            )  # fmt: skip
    return [found[key] for key in sorted(found)]


def base_for(points: Sequence[P], spans: Sequence[CapturedSpan], journal: str, sequence: int, domain: str) -> Start:
    """The nearest point from which the record can be reached. Raises InGap with the nearest instants that can be."""
    for span in spans:
        inside = span.journal == journal and span.first <= sequence <= span.last
        if inside and (found := nearest(span, points, sequence)) is not None:
            return found
    raise InGap(domain=domain, when=f"write {sequence}", **_around_number(spans, points, journal, sequence))


def at_number(points: Sequence[P], spans: Sequence[CapturedSpan], number: int, domain: str) -> Start:
    """As `base_for`, in the newest journal that has the number."""
    journals = list(dict.fromkeys(span.journal for span in reversed(spans)))
    chosen = next((j for j in journals if any(s.journal == j and s.first <= number <= s.last for s in spans)), None)
    return base_for(points, spans, chosen or (journals[0] if journals else ""), number, domain)


def at_time(
    points: Sequence[P], spans: Sequence[CapturedSpan], time: datetime, text: str, domain: str,
    zone: tzinfo | None = None,
) -> Window | None:  # fmt: skip
    """Where to look for the last record before anything later than that time; None when no span holds the time.

    With the clock set back, what comes first in the journal counts, whatever the times of later bases say. Raises InGap
    when every point that it could be counted from was forgotten.
    """
    span = span_at(spans, time)
    if span is None:
        return None
    found = window(span, points, time)
    if found is None:
        raise refuse(points, spans, "the points before it were forgotten", time, text, domain, zone)
    return found


def window(span: CapturedSpan, points: Iterable[Made], time: datetime) -> Window | None:
    """As `at_time`, of a span; None when no point of it is older."""
    found = starts(span, points)
    later = next((number for number, one in enumerate(found) if one.time > time), len(found))
    return Window(found[later - 1], found[later].sequence if later < len(found) else span.last) if later else None


def nearest(span: CapturedSpan, points: Iterable[Made], sequence: int) -> Start | None:
    """The nearest point of the span from which the record can be reached."""
    return next((one for one in reversed(starts(span, points)) if one.sequence <= sequence), None)


def unseen(
    points: Iterable[Made], spans: Sequence[CapturedSpan], branches: Sequence[Branch], sequence: int
) -> Start | None:  # fmt: skip
    """Where a record is to be counted from that follows the last confirmed one of a span, when capture died before it
    was seen once more; None for one that is in a span, or of none, or behind a revert that was not confirmed either.
    That all writes before it were recorded is likely, and nobody knows it: it is no part of what is covered."""
    if any(span.first < sequence <= span.last for span in spans):
        return None  # the first number of a span may be the last one before it, in another state
    for number, span in reversed(list(enumerate(spans))):
        if span.last < sequence:
            after = next((one for one in spans[number + 1 :] if one.journal == span.journal), None)
            beyond = after is not None and sequence > after.first
            return None if beyond or _reverted(spans, branches, span, sequence) else nearest(span, points, span.last)
    return None


def _reverted(
    spans: Sequence[CapturedSpan], branches: Sequence[Branch], span: CapturedSpan, sequence: int
) -> bool:  # fmt: skip
    """Whether the disks were reverted between the span's last record and that one."""
    known = [one.first for one in spans if one.branched and one.journal == span.journal]
    told = [one.sequence for one in branches if one.journal == span.journal]
    inside = range(span.last, sequence)
    alone = span.reason_ended.startswith("a revert of ")
    return alone or sum(one in inside for one in told) > sum(one in inside for one in known)


def refuse(
    points: Sequence[P], spans: Sequence[CapturedSpan], reason: str, time: datetime, text: str, domain: str,
    zone: tzinfo | None = None,
) -> InGap:  # fmt: skip
    """The error for a time that cannot be reached, with the nearest instants on both sides that can be."""
    sides = [_before(points, spans, time, zone), _after(points, spans, time, zone)]
    return InGap(domain=domain, when=text, reason=reason, nearest=" and ".join(one for one in sides if one) or "none")


def _before(points: Sequence[P], spans: Sequence[CapturedSpan], time: datetime, zone: tzinfo | None) -> str:
    """The newest point or the last write of a span, whichever is nearer."""
    ordered = sorted((point for point in points if point.time <= time), key=lambda point: (point.time, point.id))
    ended = [span for span in spans if span.since is not None and span.end <= time]
    last = max(ended, key=lambda span: span.end, default=None)
    if last is not None and (not ordered or last.end > ordered[-1].time):
        return f"#{last.last}, the state until {shown(last.end, zone)}"
    return described(ordered[-1], zone) if ordered else ""


def _after(points: Sequence[P], spans: Sequence[CapturedSpan], time: datetime, zone: tzinfo | None) -> str:
    ordered = sorted((point for point in points if point.time >= time), key=lambda point: (point.time, point.id))
    return described(ordered[0], zone) if ordered else ""


def _around_number(spans: Sequence[CapturedSpan], points: Sequence[P], journal: str, sequence: int) -> dict[str, str]:
    """Reason and nearest of an InGap for a number that cannot be reached."""
    pieces = [span for span in spans if span.journal == journal]
    reach = [(found[0].sequence, span.last, span) for span in pieces if (found := starts(span, points))]
    below = [(last, span) for _, last, span in reach if last < sequence]
    above = [first for first, _, _ in reach if first > sequence]
    nearest = [f"#{below[-1][0]}"] if below else []
    nearest += [f"#{above[0]}"] if above else []
    if not pieces:
        reason = "there is no continuous capture of it" if not spans else "no journal has that number"
    elif below and not above and below[-1][1].open:
        reason = "it is not confirmed yet, or still to come"
    else:
        reason = below[-1][1].reason_ended if below else "the first point that can be counted from is younger"
    return {"reason": reason, "nearest": " and ".join(nearest) or "none"}


def shown(time: datetime, zone: tzinfo | None) -> str:
    """As in lists, so that it can be typed."""
    return time.astimezone(zone).isoformat(sep=" ", timespec="milliseconds")
