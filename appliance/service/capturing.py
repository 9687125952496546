"""How the capture of a domain stands: by which way, how far behind here and far away, what it costs.

Everything is asked of what is at hand (a description file, the journal's control socket, the ledger, the repository's
listing); a part that does not answer leaves its figures empty and says so in a note. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from appliance.errors import JournalError, RewindError, SequenceMissing
from appliance.store.backend.place import on_this_host
from appliance.timeline.catalogue import Gap, Summary, gaps
from appliance.timeline.ledger import Ledger
from appliance.timeline.spans import CapturedSpan
from appliance.timeline.spans import gaps as uncovered

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.capture.tap import Running
    from appliance.journal import State
    from appliance.service.session import Session

__all__ = ["Capturing", "capturing", "missing"]

# From here on the spool's limit is near enough that somebody should know.
_NEARLY_FULL = 0.75
_ASK = 1.0


@dataclass(frozen=True, slots=True)
class Capturing:
    """`mode`: `manual`, `epochs` (points by the clock), `tap` (every write), `behind` (every write, but the spool fills
    faster than it is emptied), `waiting` (every write is wanted and not recorded now), `paused`; `reason` says why.

    `near` and `far` are what would be lost now, in seconds of the newest history: with this host's memory, and with the
    whole host. `latency` is the journal's part of one write of a hundred, in seconds. None where nothing is known;
    `far_reason` says why there is no number for the host: what it keeps itself is lost with it, all of it.
    """

    mode: str
    reason: str = ""
    near: float | None = None
    far: float | None = None
    journal: str | None = None
    sequence: int | None = None
    durable: int | None = None
    latency: float | None = None
    spool_bytes: int | None = None
    spool_limit: int | None = None
    shipped_bytes: int | None = None
    last_gap: Gap | None = None
    notes: tuple[str, ...] = ()
    far_reason: str = ""


def missing(
    points: Sequence[Summary], every: float | None, spans: Sequence[CapturedSpan], continuous: bool, now: datetime
) -> list[Gap]:
    """What was not captured although it should have been. While every write is wanted the ledger alone says so; before
    that, and after it was given up, points that are missing by the clock do."""
    scheduled = gaps(points, every, now)
    if not spans:
        return scheduled
    begin, known = spans[0].start, uncovered(spans, now)
    before = [Gap(one.start, min(one.end, begin), one.reason) for one in scheduled if one.start < begin]
    if continuous:
        return before + known
    given_up = spans[-1].stopped or spans[-1].end
    after = [Gap(max(one.start, given_up), one.end, one.reason) for one in scheduled if one.end > given_up]
    return before + [one for one in known if one.start < given_up] + after


def capturing(
    session: Session, record: Protection, points: Sequence[Summary], now: datetime | None = None
) -> Capturing:
    """Of a protected domain; `points` are its own, oldest first. Never raises for a part that is down."""
    from appliance.capture import tap
    from appliance.service.tap import paused_until

    moment = now or datetime.now(UTC)
    age = max(0.0, (moment - points[-1].time).total_seconds()) if points else None
    spans = Ledger(session.home.ledger(record.uuid)).spans()
    found = missing(points, record.every, spans, record.continuous, moment)
    kind = on_this_host(str(session.instance["url"]))
    lost = f"the repository is on this host ({kind}): all would be lost with it" if kind else ""
    made = Capturing(
        "epochs" if record.every else "manual", near=age, far=None if lost else age,
        last_gap=found[-1] if found else None, far_reason=lost,
        reason="" if points else "there is no point",
    )  # fmt: skip
    running = tap.current(session.home, record.uuid) if record.continuous else None
    if paused_until(session.home, record.uuid) is not None:
        return replace(made, mode="paused", reason="asked to step aside")
    if not record.continuous:
        return made
    if running is None:
        return replace(made, mode="waiting", reason="the process that captures is not there")
    if not running.attached:
        mode = running.state if running.state in ("epochs", "paused") else "waiting"
        return replace(made, mode=mode, reason=running.reason)
    return _attached(session, record, running, spans, points, made, moment)


def _attached(
    session: Session, record: Protection, running: Running, spans: Sequence[CapturedSpan], points: Sequence[Summary],
    made: Capturing, now: datetime,
) -> Capturing:  # fmt: skip
    control = running.control(_ASK)
    try:
        status, stats = control.status(), control.stats()
    except JournalError as error:
        return replace(made, mode="waiting", reason=error.message)
    nearly = status.limit and status.bytes > _NEARLY_FULL * status.limit
    made = replace(
        made, mode="behind" if nearly else "tap", reason="the spool is nearly full" if nearly else "",
        near=_near(status, spans, now), journal=str(status.fields["journal"]), sequence=status.written,
        durable=status.durable, latency=stats["latency"]["p99_us"] / 1e6 if stats["latency"]["count"] else None,
        spool_bytes=status.bytes, spool_limit=status.limit or None,
    )  # fmt: skip
    try:
        far, shipped = _far(session, record, running, status, points, now)
    except (RewindError, OSError) as error:
        return replace(made, far=None, notes=(f"how much is far away is not known: {error}",))
    return replace(made, far=None if made.far_reason else far, shipped_bytes=shipped)


def _near(status: State, spans: Sequence[CapturedSpan], now: datetime) -> float | None:
    """Since the last look at the capture, or as long as the oldest record is not durable, whichever is more."""
    if not spans or not spans[-1].open or spans[-1].since is None:
        return None
    unsaved: Any = status.fields.get("undurable_us", 0)
    return max(float(unsaved) / 1e6, (now - spans[-1].seen).total_seconds(), 0.0)


def _far(
    session: Session, record: Protection, running: Running, status: State, points: Sequence[Summary], now: datetime
) -> tuple[float | None, int]:
    """(age of the oldest record that exists on this host alone, bytes of the journal in the repository)."""
    from pathlib import Path

    from appliance.journal import Journal

    journal = str(status.fields["journal"])
    refs = [one for one in session.repository.segments(record.uuid) if one.whole and one.journal == journal]
    place = max((one.sequence or 0 for one in points if one.journal == journal), default=0)
    for ref in sorted(refs, key=lambda one: one.first):
        if ref.first <= place + 1:
            place = max(place, ref.last)
    stored = sum(one.stored for one in refs)
    if place >= status.written:
        return 0.0, stored
    with Journal(Path(running.spool)) as spool:
        try:
            oldest = next(spool.records(place + 1, place + 2))
        except (SequenceMissing, StopIteration):
            return None, stored
    return max(0.0, (now - oldest.time).total_seconds()), stored
