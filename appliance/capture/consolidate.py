"""Any write becomes a point: the maps of a point before it, with what the journal has up to that write.

    base point ─ map of each disk ─────────────────────────┐
    journal ──── newest content of each chunk it touched ──┴─► chunk ─► writer ─► new map ─► commit

The guest is not asked and its disks are not read. What is held in memory does not depend on how much was written: one
chunk, the open packs, and the index of the segments in the range, 24 bytes for each record.

A point made so stands for the number that it was asked for: its id is made from journal, number and label, so whoever
asks again, also at the same moment in another process, comes to the same point. Committing it is the last step. A
crash before that leaves packs that nothing refers to; chunks that got there are not stored again.
"""

from __future__ import annotations

import hashlib
import time as clock
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Final

from appliance.errors import AlreadyExists, InGap, JournalError, NoSuchPoint, SequenceMissing
from appliance.journal import Journal, Touched, latest
from appliance.model import Consistency, DiskKind, DiskPoint, MapRef, Point, PointStats
from appliance.units import CHUNK, chunks_of

if TYPE_CHECKING:
    from appliance.store import ChunkWriter, Repository

__all__ = ["REASON", "Progress", "consolidate", "point_id"]

# Of a point that nobody took: it was made from the journal, and can be made again as long as that is kept.
REASON: Final = "journal"

# Chunks done, and the disk they belong to.
Progress = Callable[[int, str], None]


def consolidate(
    repo: Repository,
    base: Point,
    journal: Journal,
    upto: int,
    *,
    time: datetime | None = None,
    label: str = "",
    reason: str = REASON,
    progress: Progress = lambda _done, _disk: None,
    commit: bool = True,
) -> Point:
    """The domain as it was when record `upto` of the journal had been written, as a point that exists.

    `base` says where in the journal it stands, and on which timeline the new point belongs; a point that a branch
    began with is given with the place and timeline of the branch. `time` is when it was (None: what the record says).
    When nothing was recorded in between and no label is wanted, the base comes back. Without `commit` the point can be
    read and compared but does not exist: the caller keeps gc away meanwhile (`Repository.session`), which collects what
    is left of it.

    Whether the journal was told of every write in between cannot be seen here: ask `timeline.instant`. Raises
    SequenceMissing for records that are not held, InGap when the journal lost one or disks came, went or changed their
    size, JournalError when the journal is not the base's, SegmentCorrupt, and what the store raises. Nothing exists
    then that did not before.
    """
    start = base.sequence
    if start is None:
        raise JournalError(reason=f"point {base.id} was taken without a journal")
    if upto < start:
        raise SequenceMissing(path=journal.spool, sequence=upto, reason=f"point {base.id} is younger, at {start}")
    if upto == start and not label:
        return base
    instant = time or (base.time if upto == start else next(journal.records(upto, upto + 1)).time)
    wanted = point_id(base.journal, upto, label, instant)
    with suppress(NoSuchPoint):
        return repo.point(wanted)
    _check(base, journal, start, upto)
    making = _Making(repo, base, journal, start, upto, progress)
    # One session over both: what one stores and the next commits may be collected in between.
    with repo.session(f"writes of {base.domain} up to {upto}"):
        made = making.point(wanted, instant, label, reason)
        return making.committed(made) if commit else made


def point_id(journal: str, sequence: int, label: str, time: datetime) -> str:
    """Sorts by time as every id of a point does; the same for the same instant."""
    told = hashlib.sha256(f"{journal} {sequence} {label}".encode()).hexdigest()
    return f"{int(time.timestamp() * 1000):012x}{told[:8]}"


def _check(base: Point, journal: Journal, start: int, upto: int) -> None:
    """Every record is there, is of the base's journal and disks, and none tells of something lost; or it raises."""
    sizes = {disk.disk: disk.size for disk in _guests(base)}
    for part in journal.covering(start + 1, upto):
        header = journal.open(part).header
        if header.journal.hex() != base.journal:
            raise JournalError(reason=f"{part.path} is not of journal {base.journal}, which point {base.id} counts in")
        now = {disk.name: disk.size for disk in header.disks}
        if now != sizes:
            raise _in_gap(base, part.first - 1, f"the disks were {_listed(now)} then, and {_listed(sizes)} before")
    for lost in journal.lost(start, upto):
        raise _in_gap(base, lost.sequence - 1, f"the journal refused a request on {lost.disk}, write {lost.sequence}")


def _in_gap(base: Point, last: int, reason: str) -> InGap:
    nearest = f"point {base.id}" + (f" and write {last}" if last > (base.sequence or 0) else "")
    return InGap(domain=base.domain, when=f"what was written after {last}", reason=reason, nearest=nearest)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} of {size} bytes" for name, size in sorted(sizes.items()))


def _guests(point: Point) -> list[DiskPoint]:
    return [disk for disk in point.disks if disk.kind is DiskKind.DISK]


class _Making:
    """One consolidation: everything is checked, only the work is left."""

    def __init__(
        self, repo: Repository, base: Point, journal: Journal, start: int, upto: int, progress: Progress
    ) -> None:
        self._repo = repo
        self._base = base
        self._journal = journal
        self._start = start
        self._upto = upto
        self._progress = progress
        self._begun = clock.monotonic()

    def point(self, wanted: str, instant: datetime, label: str, reason: str) -> Point:
        with self._repo.writer() as writer:
            maps = self.maps(writer)
            writer.flush()
            stats = writer.stats
        cost = PointStats(
            stored_bytes=stats.stored_bytes, new_chunks=stats.new_chunks, seconds=clock.monotonic() - self._begun
        )
        return replace(
            self._base,
            id=wanted,
            time=instant,
            parent=self._base.id,
            disks=tuple(self._disk(disk, maps.get(disk.disk, disk.map)) for disk in self._base.disks),
            consistency=Consistency.CRASH,
            reason=reason,
            label=label,
            stats=cost,
            notes=self._notes(),
            sequence=self._upto,
        )

    def committed(self, point: Point) -> Point:
        try:
            self._repo.commit(point)
        except AlreadyExists:
            # Somebody made it at the same moment: the same state, which only cost something else.
            return self._repo.point(point.id)
        return point

    def maps(self, writer: ChunkWriter) -> dict[str, MapRef]:
        return {disk.disk: self._map(disk, writer) for disk in _guests(self._base)}

    def _map(self, disk: DiskPoint, writer: ChunkWriter) -> MapRef:
        return self._repo.write_map(disk.map, disk.size, self._changes(disk, writer), writer)

    def _changes(self, disk: DiskPoint, writer: ChunkWriter) -> Iterator[tuple[int, bytes]]:
        """(index, id of the new content) of every chunk that was touched."""
        before = self._repo.map(disk.map)
        last = chunks_of(disk.size) - 1
        for done, touched in enumerate(latest(self._journal, disk.disk, self._start, self._upto), 1):
            length = CHUNK if touched.index < last else disk.size - last * CHUNK
            old = b"" if touched.covers(length) else before.get(touched.index)
            yield touched.index, self._content(touched, old, writer)
            self._progress(done, disk.disk)

    def _content(self, touched: Touched, old: bytes, writer: ChunkWriter) -> bytes:
        if touched.zero and not old:
            return b""
        chunk = bytearray(self._repo.read_chunk(old)) if old else bytearray(CHUNK)
        touched.apply(self._journal, chunk)
        return writer.put(chunk)

    def _disk(self, disk: DiskPoint, ref: MapRef) -> DiskPoint:
        """The disk with its new map, and what differs from the base."""
        changed = tuple(self._repo.diff(disk.map, ref))
        # The bitmap that began at the base's instant tells nothing about this one.
        attributes = {name: value for name, value in disk.attributes.items() if name != "bitmap"}
        return replace(disk, map=ref, changed=changed, changed_bytes=len(changed) * CHUNK, attributes=attributes)

    def _notes(self) -> tuple[str, ...]:
        files = [disk.disk for disk in self._base.disks if disk.kind is not DiskKind.DISK]
        if not files:
            return ()
        return (f"{' and '.join(files)} as of point {self._base.id}: the journal has the disks only",)
