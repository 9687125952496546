"""Carries out what `capture.tiers` plans, a little at a time: points from the journal, then what they replace may go.

    HOME/run/UUID/tiers.json    up to when points were made, and how coarse they are now; losing it costs time

The order makes every crash harmless: a point is durable before records go that it replaces, and a point that no tier
keeps goes last. The ledger is not told of these points: the repository tells, and there would be a line each minute.
"""

from __future__ import annotations

import json
import logging
import threading
import time as clock
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.capture import tap, tiers
from appliance.config import write_json
from appliance.errors import InGap, JournalError, NoSuchPoint, SegmentCorrupt, SequenceMissing
from appliance.service import instant as instants
from appliance.timeline import instant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.capture.protection import Protection
    from appliance.config import Home
    from appliance.journal import Control
    from appliance.model import Point
    from appliance.service.session import Session
    from appliance.timeline.ledger import Ledger
    from appliance.timeline.spans import CapturedSpan

__all__ = ["Journaled", "Outcome", "press", "run", "share"]

_log = logging.getLogger(__name__)
# Two threads of the tap process say how coarse it is.
_TELLING = threading.Lock()
_WORDS = {60: "a point for each minute", 300: "a point for each 5 minutes", 3600: "a point for each hour"}
# Seconds between two points, and whether the spool forgets what is young: how it is when nothing else is on record.
_FINE = [60, False]
# Fifty years, in seconds: of a capture that is over no hour is too old.
_FOR_EVER = 50 * 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Journaled:
    """A domain whose writes were recorded, protected now or not."""

    uuid: str
    domain: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run did. `left` points are still to be made; `step` seconds lie between two; `freed` bytes of the spool.
    `expired` says up to which number of each journal no tier wants records any more, also in the repository: for
    `ship.retire`, and for `Shipper.once(after=)` of the one that is being written. `damaged`: a record of the running
    span cannot be read, so nothing later can be reached until there is another point to count from. `unmade`: for so
    many instants that were due there is no point."""

    made: int
    left: int
    step: int
    dropped: int
    freed: int
    expired: dict[str, int]
    damaged: bool = False
    unmade: int = 0


def run(
    session: Session, record: Protection | Journaled, budget_seconds: float, *, control: Control | None = None,
    shipped: int | None = None, now: datetime | None = None, full: bool = False, ended: bool = False,
) -> Outcome:  # fmt: skip
    """One pass over the domain; ends at about the budget, in the middle of nothing. For one thread of the tap process.

    `control` None: the running tap's, if there is one. `shipped` is the number up to which the repository has what the
    spool has, None when nothing is shipped; `full` says that the spool had to forget meanwhile, for want of room.
    `ended`: the capture is over, so there is nothing to keep up with and nobody to tell; points come for whatever is
    left of it, each minute or hour by its age, and no point goes.

    Raises what the store raises, JournalError and its kin; the next run goes on.
    """
    work = _Run(session, record, control or _control(session, record.uuid), shipped, now, full)
    return work.ended(budget_seconds) if ended else work.go(budget_seconds)


def press(home: Home, uuid: str, used: float) -> None:
    """Write down that the spool forgets what is young and was shipped, now that it is so full (`used` is a share of its
    limit), unless that is on record. A run may be busy with one point for longer than the rest of the spool lasts."""
    path = _state_path(home, uuid)
    with _TELLING:
        state = _load(path)
        step, full = state.get("level", _FINE)
        if not full:
            tap.ledger_of(home, uuid).event("tiers", datetime.now(UTC), _words(step, used, shipped=True))
            _save(path, state | {"level": [step, True]})


def share(control: Control | None) -> float:
    """Of the spool's limit what is used; 0 when there is no limit, or nobody to ask."""
    if control is None:
        return 0.0
    with suppress(JournalError):
        status = control.status()
        return status.bytes / status.limit if status.limit else 0.0
    return 0.0


def _control(session: Session, uuid: str) -> Control | None:
    running = tap.current(session.home, uuid)
    return running.control() if running is not None and running.control_socket else None


class _Run:
    """One pass: what is known at its beginning, and what it has done."""

    def __init__(
        self, session: Session, record: Protection | Journaled, control: Control | None, shipped: int | None,
        now: datetime | None, full: bool,
    ) -> None:  # fmt: skip
        settings = session.settings
        self._session, self._record, self._control, self._shipped = session, record, control, shipped
        self._now = now or datetime.now(UTC)
        self._tiers = tiers.Tiers(settings.journal_keep, settings.minutes_keep, settings.hours_keep)
        self._ledger: Ledger = tap.ledger_of(session.home, record.uuid)
        self._spans: Sequence[CapturedSpan] = self._ledger.spans()
        self._points: list[instant.Made] = [*session.catalogue.points(record.uuid, measure=False)]
        self._known = {point.id for point in self._points}
        self._path = _state_path(session.home, record.uuid)
        self._state = _load(self._path)
        used = share(self._control)
        self._used = max(used, tiers.FULL) if full else used
        self._damaged, self._unmade = False, 0

    def go(self, budget: float) -> Outcome:
        until = clock.monotonic() + budget
        plan = tiers.plan(self._points, self._spans, self._tiers, self._now, used=self._used, done=self._done())
        self._tell(plan.step)
        made, left = self._make_all(plan, until, keep=True)
        freed = self._forget()
        dropped = self._drop(plan.drop, until)
        return Outcome(made, left, plan.step, dropped, freed, self._expired(self._done()), self._damaged, self._unmade)

    def ended(self, budget: float) -> Outcome:
        """Of a capture that is over."""
        until = clock.monotonic() + budget
        kept = replace(self._tiers, hours=_FOR_EVER)
        # What was tried before and failed is not taken for done: only points that exist stand for records.
        plan = tiers.plan(self._points, self._spans, kept, self._now, step=tiers.MINUTE)
        made, left = self._make_all(plan, until, keep=False)
        return Outcome(made, left, plan.step, 0, 0, self._expired(None), self._damaged, self._unmade)

    def _make_all(self, plan: tiers.Plan, until: float, keep: bool) -> tuple[int, int]:
        """(points that came into being, how many are left). `keep`: what cannot be made is not tried again."""
        made = 0
        for number, wanted in enumerate(plan.make):
            if clock.monotonic() >= until:
                return made, len(plan.make) - number
            made += self._make(wanted)
            if keep:
                self._keep(done=wanted.time.isoformat())
        return made, 0

    def _done(self) -> datetime | None:
        return datetime.fromisoformat(self._state["done"]) if "done" in self._state else None

    def _make(self, wanted: tiers.Wanted) -> bool:
        """Whether a point came into being. One that cannot be made is left out: what is missing does not come back."""
        try:
            point = self._point(wanted)
        except (InGap, NoSuchPoint, SegmentCorrupt, SequenceMissing) as error:
            _log.warning("%s: no point of %s: %s", self._record.domain, wanted.time.isoformat(), error)
            self._damaged |= isinstance(error, SegmentCorrupt) and wanted.span.open
            self._unmade += 1
            return False
        if point is None or point.id in self._known:
            return False
        self._known.add(point.id)
        self._points.append(point)
        return True

    def _point(self, wanted: tiers.Wanted) -> Point | None:
        uuid, span = self._record.uuid, wanted.span
        if wanted.sequence is not None:
            start = instant.nearest(span, self._points, wanted.sequence)
            return instants.materialise(self._session, uuid, start, wanted.sequence) if start else None
        window = instant.window(span, self._points, wanted.time)
        return instants.last_before(self._session, uuid, window, wanted.time) if window else None

    def _forget(self) -> int:
        """Records of the spool that points stand for, or that the repository has; none that only the spool has."""
        if self._control is None:
            return 0
        journal = str(self._control.status().fields["journal"])
        full = self._used >= tiers.FULL
        upto = self._now if full else self._now - timedelta(seconds=self._tiers.journal)
        number = tiers.replaced(self._points, self._spans, journal, upto, self._done())
        if self._shipped is not None:
            number = self._shipped if full else min(number, self._shipped)
        return self._control.forget(number) if number > 0 else 0

    def _drop(self, ids: Sequence[str], until: float) -> int:
        count = 0
        for point in ids:
            if clock.monotonic() >= until:
                break
            with suppress(NoSuchPoint):
                self._session.repository.delete_point(point)
                count += 1
        return count

    def _expired(self, done: datetime | None) -> dict[str, int]:
        points, upto = self._points, self._now - timedelta(seconds=self._tiers.journal)
        journals = {span.journal for span in self._spans}
        found = {one: tiers.replaced(points, self._spans, one, upto, done) for one in journals}
        return {journal: number for journal, number in found.items() if number}

    def _tell(self, step: int) -> None:
        """What is coarser than before, or finer again, is written down."""
        with _TELLING:
            # Now, and not as it was when the run began: it may have been pressed since.
            used = max(self._used, share(self._control))
            level = [step, used >= tiers.FULL]
            if level != _load(self._path).get("level", _FINE):
                self._ledger.event("tiers", self._now, _words(step, used, self._shipped is not None))
            self._state = _load(self._path) | {"level": level}
            _save(self._path, self._state)

    def _keep(self, **values: Any) -> None:
        with _TELLING:
            self._state = _load(self._path) | values
            _save(self._path, self._state)


def _words(step: int, used: float, shipped: bool) -> str:
    words = _WORDS[step]
    if used >= tiers.FULL:
        kept = "what was not shipped" if shipped else "what is in no point"
        words += f", and of the journal only {kept}: the spool is {used:.0%} full"
    return words


def _state_path(home: Home, uuid: str) -> Path:
    return home.run(uuid) / "tiers.json"


def _save(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, state)


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
