"""Every instant that continuous capture covers, for every verb: what a person types becomes a point that exists.

A point that was taken is found as ever. A record's number, or a time within a span of the ledger, is consolidated from
the journal when nothing has made a point of it yet; the next verb that asks for the same instant finds that point.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from appliance.errors import InGap, NoSuchPoint, SequenceMissing
from appliance.timeline import instant, when
from appliance.timeline.ledger import Ledger
from appliance.timeline.spans import CapturedSpan

if TYPE_CHECKING:
    from appliance.journal import Journal
    from appliance.model import Point
    from appliance.service.history import History
    from appliance.service.session import Session

__all__ = ["last_before", "materialise", "resolve"]

# A running capture confirms once a second what it has; who asks for the very present waits that long.
_CONFIRMED_WITHIN: Final = 3.0
_LOOK_AGAIN: Final = 0.2


def resolve(
    session: Session, name: str, text: str, now: datetime | None = None, *, taken: bool = False, passing: bool = False
) -> Point:  # fmt: skip
    """The point that `text` names, complete; one that continuous capture covers is made when it is not there, unless
    only what was `taken` is meant. With `passing` one that was made does not exist for anybody else: it can be read
    until the session is closed, and leaves nothing but what gc collects.

    Raises NoSuchPoint, AmbiguousPoint, InGap, SequenceMissing when the journal is gone where it is needed, and what
    consolidating raises.
    """
    from appliance.service.history import history

    known = history(session, name, now, measure=False)
    asked = _Asked(session, known, text, now or datetime.now(UTC), passing)
    return asked.as_ever() if taken else asked.point()


def materialise(
    session: Session, uuid: str, start: instant.Start, sequence: int, reason: str = instant.MADE, passing: bool = False
) -> Point:  # fmt: skip
    """The point at that number, which `start` leads to. `passing` and errors as for `resolve`."""
    return _with_journal(
        session, uuid, start, sequence,
        lambda journal: _consolidated(session, start, journal, sequence, reason, passing),
    )  # fmt: skip


def last_before(
    session: Session, uuid: str, window: instant.Window, time: datetime, passing: bool = False
) -> Point:  # fmt: skip
    """The point of the last write in the window before anything later than that time. As `materialise`."""
    wall_ns = int(time.timestamp()) * 10**9 + time.microsecond * 1000
    start = window.start

    def work(journal: Journal, upto: int = window.upto) -> Point:
        found = journal.at(wall_ns, start.sequence, upto)
        if found == upto < window.upto:
            # What is missing may have been recorded before that time, or after it.
            raise SequenceMissing(path=journal.spool, sequence=upto + 1, reason="it is not there")
        return _consolidated(session, start, journal, found, instant.MADE, passing)

    try:
        return _with_journal(session, uuid, start, window.upto, work)
    except SequenceMissing as error:
        # Only what is older may be needed.
        left = int(error.fields["sequence"]) - 1
        if not start.sequence < left < window.upto:
            raise
        return _with_journal(session, uuid, start, left, lambda journal: work(journal, left))


def _consolidated(
    session: Session, start: instant.Start, journal: Journal, sequence: int, reason: str, passing: bool
) -> Point:
    from appliance.capture.consolidate import consolidate

    if passing:
        session.keep_from_gc()  # before anything is written that no point will refer to
    repository = session.repository
    base = repository.point(start.point)
    if sequence > start.sequence:
        base = _grown(base, journal, start.sequence + 1)
    base = replace(base, journal=start.journal, sequence=start.sequence, timeline=start.timeline)
    return consolidate(repository, base, journal, sequence, reason=reason, commit=not passing)


def _grown(base: Point, journal: Journal, first: int) -> Point:
    """The point as a revert to it left the disks: those that had grown since kept their size, with zeroes behind. Of
    any other point the sizes are those of the journal: where a disk grows, a new span begins."""
    sizes = {disk.name: disk.size for disk in journal.open(journal.covering(first, first)[0]).header.disks}
    return replace(
        base, disks=tuple(replace(disk, size=max(disk.size, sizes.get(disk.disk, 0))) for disk in base.disks)
    )


class _Asked:
    """One question: the points of the domain, its ledger, and what was typed."""

    def __init__(self, session: Session, known: History, text: str, now: datetime, passing: bool = False) -> None:
        self._session = session
        self._passing = passing
        self._known = known
        self._text = text
        self._now = now
        self._ledger = Ledger(session.home.ledger(known.uuid))

    def point(self) -> Point:
        for one in when.outdone(self._known.points, self._text):
            self._session.warn(f"{self._text.strip()!r} means what it says; the point with that label is {one.id}")
        if not (self._known.points and self._ledger.spans()) or when.named(self._known.points, self._text):
            return self.as_ever()
        number = instant.number_of(self._text.removesuffix("?"))
        if number is not None:
            return self._at_unseen(number) if self._text.endswith("?") else self._at_number(number)
        time = when.parse_time(self._text.strip(), self._now)
        # Made points are every minute's: one of that second may hold what came after the time that was typed.
        taken = (point for point in self._known.points if point.reason != instant.MADE)
        if time is None or when.listed(taken, time):
            return self.as_ever()
        return self._at_time(time.time)

    def as_ever(self) -> Point:
        """As without continuous capture."""
        known = self._known
        found = when.resolve(known.points, self._text, self._now, known.domain, gaps=known.gaps)
        try:
            return self._session.repository.point(found.id)
        except NoSuchPoint:  # forgotten since it was listed
            raise NoSuchPoint(domain=known.domain, when=found.id) from None

    def _at_number(self, number: int) -> Point:
        points, domain = self._known.points, self._known.domain
        spans = self._confirmed(lambda spans: any(one.first <= number <= one.last for one in spans))
        try:
            start = instant.at_number(points, spans, number, domain)
        except InGap as error:
            if self._unseen(spans, number) is None or number > self._recorded():
                raise
            raise InGap(**error.fields, hint=f"{error.hint}; {self._offer(number)}") from None
        return self._made(start, number)

    def _at_unseen(self, number: int) -> Point:
        """A record of the last moment before everything died: whoever wants it says so, and is told what it is."""
        start = self._unseen(self._ledger.spans(), number)
        if start is None:
            return self._at_number(number)
        self._session.warn(f"write {number} came after the capture was last seen to be whole: a disk may lack writes")
        return materialise(self._session, self._known.uuid, start, number, instant.UNSEEN, self._passing)

    def _unseen(self, spans: Sequence[CapturedSpan], number: int) -> instant.Start | None:
        return instant.unseen(self._known.points, spans, self._ledger.branches(), number)

    def _recorded(self) -> int:
        """The newest number that the spool has."""
        from appliance.journal import Journal

        spool = self._session.home.spool(self._known.uuid)
        if not spool.is_dir():
            return 0
        with Journal(spool) as journal:
            return journal.last

    def _offer(self, number: int) -> str:
        return f"`#{number}?` takes what was recorded until then, though nobody saw whether a write is missing"

    def _at_time(self, time: datetime) -> Point:
        points, domain = self._known.points, self._known.domain
        spans = self._confirmed(lambda spans: spans[-1].end >= time or time > self._now)
        window = instant.at_time(points, spans, time, self._text, domain)
        if window is not None:
            return self._last_before(window, time)
        if (gap := self._gap(spans, time)) is not None:
            error = instant.refuse(points, spans, gap, time, self._text, domain)
            newest = self._newest_unseen(spans, time)
            raise InGap(**error.fields, hint=f"{error.hint}; {self._offer(newest)}") if newest else error
        return self.as_ever()

    def _newest_unseen(self, spans: Sequence[CapturedSpan], time: datetime) -> int:
        """The last record before the gap that holds the time, of those that were not confirmed; 0 when there is none.
        One that is confirmed in a moment is not meant."""
        if spans[-1].open and (self._now - spans[-1].seen).total_seconds() <= _CONFIRMED_WITHIN:
            return 0
        before = [one for one in spans if one.end <= time]
        later = next((one for one in spans if one.end > time), None)
        if not before or (later is not None and later.journal != before[-1].journal):
            return 0
        number = later.first if later is not None else self._recorded()
        return number if self._unseen(before, number) else 0

    def _gap(self, spans: Sequence[CapturedSpan], time: datetime) -> str | None:
        """Why the capture has nothing of that time; None when nobody promised that it would have."""
        gap = next((one for one in self._ledger.gaps(self._now) if one.start <= time < one.end), None)
        if gap is not None:
            return gap.reason
        if spans[-1].open and spans[-1].end < time <= self._now:
            return "it is not confirmed yet"
        return None

    def _confirmed(self, enough: Callable[[Sequence[CapturedSpan]], bool]) -> list[CapturedSpan]:
        """The spans; when the last one still grows and is about to hold what was asked for, as soon as it does."""
        until = clock.monotonic() + _CONFIRMED_WITHIN
        spans = self._ledger.spans()
        while spans[-1].open and not enough(spans) and clock.monotonic() < until:
            if (datetime.now(UTC) - spans[-1].seen).total_seconds() > _CONFIRMED_WITHIN:
                return spans
            clock.sleep(_LOOK_AGAIN)
            spans = self._ledger.spans()
        return spans

    def _last_before(self, window: instant.Window, time: datetime) -> Point:
        try:
            return last_before(self._session, self._known.uuid, window, time, self._passing)
        except SequenceMissing:
            # Every write is kept for so long; of what is older there are points, and the newest before it is meant.
            if (self._now - time).total_seconds() <= self._session.settings.journal_keep:
                raise
            return self.as_ever()

    def _made(self, start: instant.Start, number: int) -> Point:
        if start.sequence == number:
            return self._session.repository.point(start.point)
        return materialise(self._session, self._known.uuid, start, number, passing=self._passing)


def _with_journal(
    session: Session, uuid: str, start: instant.Start, upto: int, work: Callable[[Journal], Point]
) -> Point:
    """What `work` makes of the records between the start and that number."""
    from appliance.capture.collect import Range, reading

    wanted = Range(uuid, start.journal, start.sequence, upto)
    return reading(session.repository, session.home.spool(uuid), session.home.cache, wanted, work)
