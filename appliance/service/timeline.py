"""timeline: everything that is known of a domain's past in one value, from files and the repository alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import ConfigError, SegmentCorrupt, SequenceMissing
from appliance.service.capturing import Capturing, capturing, missing
from appliance.service.naming import uuid_of
from appliance.timeline.ledger import Ledger
from appliance.timeline.story import Flow, Known, Mark, Story, reachable, tell
from appliance.timeline.when import bound

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.journal import Journal, Segment
    from appliance.service.session import Session
    from appliance.timeline.catalogue import Summary
    from appliance.timeline.spans import CapturedSpan

__all__ = ["Timeline", "timeline"]

# What is shown when nobody says from when on: a day, or the whole history if that is shorter.
_DAY = timedelta(days=1)
_ENDLESS = 1 << 63
_SHORTEST = timedelta(seconds=1)
# A capture that runs is looked at every second; this much later it is still taken for one that runs.
_LATE_LOOK = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The story of a domain, and how its capture stands now (None when it is not protected any more)."""

    domain: str
    uuid: str
    story: Story
    now: Capturing | None
    journal_bytes: int
    notes: tuple[str, ...]


def timeline(
    session: Session, name: str, since: str | None, until: str | None, buckets: int, now: datetime | None = None
) -> Timeline:
    """`since` and `until` are as typed: a time, `… ago`, or a duration before now. libvirt is not asked.

    Raises NotProtected, and ConfigError for a time that cannot be read or a window without length.
    """
    uuid, domain = uuid_of(session, name, reading=True)
    record, moment = session.record(uuid), now or datetime.now(UTC)
    points = session.catalogue.points(uuid)
    ledger = Ledger(session.home.ledger(uuid))
    spans = ledger.spans()
    end = bound(until, moment) if until else moment
    start = bound(since, moment) if since else max(end - _DAY, _first(points, spans[0].start if spans else end))
    if since is None and start >= end:
        start = end - _DAY
    if end - start < _SHORTEST:
        raise ConfigError(reason=f"there is nothing between {start.isoformat()} and {end.isoformat()}")
    notes: list[str] = []
    spool = session.home.spool(uuid)
    flows, marks = _journal(spool, start, end, buckets, notes)
    known = Known(
        points, session.repository.timelines(uuid), reachable(spans, points, _held(session, uuid)),
        missing(points, record.every if record else None, spans, bool(record and record.continuous), moment),
        ledger.branches(), ledger.events(), flows, marks, _lived(session, uuid, record),
        _covered(spool, spans, moment),
    )  # fmt: skip
    story = tell(known, start, end, buckets)
    standing = capturing(session, record, points, moment) if record else None
    return Timeline(domain, uuid, story, standing, sum(one.bytes for one in flows), tuple(notes))


def _lived(session: Session, uuid: str, record: Protection | None) -> list[str]:
    """The present timeline, and that of a revert which has switched the disks and not ended yet."""
    from appliance.restore import intent

    found = [record.timeline] if record else []
    last = intent.load(session.home, uuid)
    if last is not None and last.phase not in (intent.Phase.PLANNED, intent.Phase.FENCED, intent.Phase.DONE):
        found += [] if last.rolling_back else [last.timeline]
    return found


def _first(points: list[Summary], begun: datetime) -> datetime:
    return min([begun, *(one.time for one in points[:1])])


def _held(session: Session, uuid: str) -> dict[str, list[tuple[int, int]]]:
    """The numbers of each journal that can be read, here or in the repository. What is being written has no end yet."""
    from appliance.journal import Journal

    found: dict[str, list[tuple[int, int]]] = {}
    for ref in session.repository.segments(uuid):
        if ref.whole:
            found.setdefault(ref.journal, []).append((ref.first, ref.last))
    spool = session.home.spool(uuid)
    if spool.is_dir():
        with Journal(spool) as journal:
            parts = journal.parts
            header = next(_headers(journal), None)
            if header is not None:
                ranges = [(part.first, part.last or _ENDLESS) for part in parts]
                found.setdefault(header, []).extend(ranges)
    return found


def _covered(spool: Path, spans: list[CapturedSpan], now: datetime) -> list[tuple[datetime, datetime]]:
    """Times of which the journal here tells all: where it says nothing, nothing was written."""
    from appliance.journal import Journal

    if not spool.is_dir():
        return []
    with Journal(spool) as journal:
        name, part = next(_headers(journal), None), next(iter(journal.parts), None)
        if name is None or part is None:
            return []
        try:
            begun = _moment(journal.open(part).header.wall_ns)
        except (SegmentCorrupt, SequenceMissing):
            return []  # told where its bytes are counted, or gone meanwhile
    found = []
    for one in spans:
        end = min(now, one.end + _LATE_LOOK) if one.open else one.end
        whole = part.first <= one.first + 1
        if one.journal == name and (whole or one.open or one.last >= part.first):
            start = one.start if whole else max(one.start, begun)
            found.append((start, max(start, end)))
    return found


def _headers(journal: Journal) -> Iterator[str]:
    """The journal's id: one folder has one."""
    for part in reversed(journal.parts):
        try:
            yield journal.open(part).header.journal.hex()
        except (SegmentCorrupt, SequenceMissing):
            continue  # told where its bytes are counted, or gone meanwhile


def _journal(
    spool: Path, since: datetime, until: datetime, buckets: int, notes: list[str]
) -> tuple[list[Flow], list[Mark]]:
    """Bytes and marks of the journal's segments that were written to after `since` and begun before `until`, as finely
    as is drawn; the rest is not read."""
    grain = (until - since) / buckets
    flows: list[Flow] = []
    marks: list[Mark] = []
    for segment in _segments(spool, since, notes):
        if _moment(segment.header.wall_ns) > until:
            continue
        try:
            flows += _flows(segment, grain)
            marks += _marks(segment)
        except SegmentCorrupt as error:
            notes.append(error.message)
    return flows, marks


def _flows(segment: Segment, grain: timedelta) -> list[Flow]:
    from appliance.journal import bursts

    parts = bursts(segment, int(grain.total_seconds() * 1e9))
    return [Flow(_moment(first), _moment(last), size) for first, last, size in parts]


def _marks(segment: Segment) -> list[Mark]:
    name = segment.header.journal.hex()
    found = (segment.record(entry.position, entry.sequence) for entry in segment.entries(""))
    return [Mark(one.time, one.label, name, one.sequence) for one in found]


def _segments(spool: Path, since: datetime, notes: list[str]) -> Iterator[Segment]:
    from appliance.journal import Segment

    for path in sorted(spool.glob("*")) if spool.is_dir() else ():
        if not re.fullmatch(r"\d{20}-\d{20}\.rwj|\d{20}\.open", path.name):
            continue
        try:
            if path.stat().st_mtime >= since.timestamp():
                with Segment(path) as segment:
                    yield segment
        except (FileNotFoundError, SequenceMissing):
            continue  # sealed or forgotten meanwhile
        except SegmentCorrupt as error:
            notes.append(error.message)


def _moment(wall_ns: int) -> datetime:
    return datetime.fromtimestamp(wall_ns / 1e9, UTC)
