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

__all__ = ["Timeline", "timeline"]

# What is shown when nobody says from when on: a day, or the whole history if that is shorter.
_DAY = timedelta(days=1)
_ENDLESS = 1 << 63
_SHORTEST = timedelta(seconds=1)


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
    flows, marks = _journal(session.home.spool(uuid), start, notes)
    known = Known(
        points, session.repository.timelines(uuid), reachable(spans, points, _held(session, uuid)),
        missing(points, record.every if record else None, spans, bool(record and record.continuous), moment),
        ledger.branches(), ledger.events(), flows, marks, _lived(session, uuid, record),
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


def _headers(journal: Journal) -> Iterator[str]:
    """The journal's id: one folder has one."""
    for part in reversed(journal.parts):
        try:
            yield journal.open(part).header.journal.hex()
        except (SegmentCorrupt, SequenceMissing):
            continue  # told where its bytes are counted, or gone meanwhile


def _journal(spool: Path, since: datetime, notes: list[str]) -> tuple[list[Flow], list[Mark]]:
    """Bytes and marks of the journal's segments that were written to after `since`; the rest is not opened."""
    flows: list[Flow] = []
    marks: list[Mark] = []
    for segment in _segments(spool, since, notes):
        if (flow := _flow(segment)) is not None:
            flows.append(flow)
        journal = segment.header.journal.hex()
        for entry in segment.entries(""):
            record = segment.record(entry.position, entry.sequence)
            marks.append(Mark(record.time, record.label, journal, record.sequence))
    return flows, marks


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


def _flow(segment: Segment) -> Flow | None:
    """A sealed one says it in its footer; of one that is not, the file's length and age are as good."""
    if segment.footer is not None:
        first, last = segment.footer.wall_first_ns, segment.footer.wall_last_ns
        return Flow(_moment(min(first, last)), _moment(max(first, last)), segment.footer.payload)
    size = segment.path.stat()
    written = size.st_size - segment.header.length
    end = datetime.fromtimestamp(size.st_mtime, UTC)
    return Flow(min(_moment(segment.header.wall_ns), end), end, written) if segment.last else None


def _moment(wall_ns: int) -> datetime:
    return datetime.fromtimestamp(wall_ns / 1e9, UTC)
