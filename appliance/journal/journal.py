"""A spool folder as one journal: sealed segments, then what is being written.

The writer goes on meanwhile: a segment may be sealed (renamed) or forgotten (deleted) between two calls. `refresh`
looks at the folder again; what a call has opened it reads to the end.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import Final, Self

from appliance.errors import SegmentCorrupt, SequenceMissing
from appliance.journal.layout import Disk, Entry, Kind, Record
from appliance.journal.segment import Segment
from appliance.units import CHUNK

__all__ = ["Journal", "Part", "Problem", "Session", "forget"]

_SEALED: Final = re.compile(r"(\d{20})-(\d{20})\.rwj")
_OPEN: Final = re.compile(r"(\d{20})\.open")
# Opened at once; each is a file descriptor and the index of a segment.
_OPENED: Final = 32
# What a clock that is never set may be corrected by within a segment, in nanoseconds.
_SLEWED: Final = 10_000_000
# A file that got another name is looked for among so many of its neighbours.
_NEAR: Final = 3
# Long payloads kept; each is as long as a client's request, 32 MiB at most.
_PAYLOADS: Final = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of the folder. `last` is 0 for one that is not sealed: only its records tell."""

    path: Path
    first: int
    last: int

    @property
    def sealed(self) -> bool:
        return self.last != 0


@dataclass(frozen=True, slots=True)
class Session:
    """One life of the writing process: the capture was interrupted before it. `first` is its first record."""

    started_ns: int
    boot: bytes
    first: int
    disks: tuple[Disk, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `verify` found. `first` to `last` are the records that cannot be used because of it."""

    path: Path
    first: int
    last: int
    reason: str


class Journal:
    """Reads a spool folder. Any thread may use it, one iterator each."""

    def __init__(self, spool: Path) -> None:
        """Raises FileNotFoundError when there is no such folder; it may be empty."""
        self.spool = spool
        self._lock = RLock()
        self._opened: OrderedDict[Path, Segment] = OrderedDict()
        self._payloads: dict[tuple[Path, int], memoryview] = {}
        self._parts: list[Part] = []
        self.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be repeated; a later call opens again what it needs."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()

    def refresh(self) -> None:
        """See what was appended, sealed and forgotten since."""
        parts = []
        for path in self.spool.iterdir():
            if match := _SEALED.fullmatch(path.name):
                parts.append(Part(path, int(match[1]), int(match[2])))
            elif match := _OPEN.fullmatch(path.name):
                parts.append(Part(path, int(match[1]), 0))
        with self._lock:
            self._parts = sorted(parts, key=lambda part: (part.first, part.last == 0))
            present = {part.path for part in parts}
            # Not closed: somebody may be reading it. Its descriptor goes with the last reference.
            self._opened = OrderedDict((path, one) for path, one in self._opened.items() if path in present)
            for segment in self._opened.values():
                segment.refresh()

    @property
    def parts(self) -> list[Part]:
        """The segments of the folder as of the last `refresh`, in order."""
        return list(self._parts)

    @property
    def first(self) -> int:
        """Sequence number of the oldest record that is kept; 0 when there is none."""
        return next((self._first(part) for part in self._held()), 0)

    @property
    def last(self) -> int:
        """Sequence number of the newest whole record; 0 when there is none."""
        return max((self._last(part) for part in self._held()), default=0)

    def open(self, part: Part) -> Segment:
        """The segment, opened, also if it was sealed since. Raises SegmentCorrupt, SequenceMissing if it is gone."""
        with self._lock:
            segment = self._opened.pop(part.path, None) or self._find(part)
            self._opened[part.path] = segment
            if len(self._opened) > _OPENED:
                self._opened.popitem(last=False)
            return segment

    def records(self, start: int = 1, stop: int | None = None) -> Iterator[Record]:
        """Records with start <= sequence < stop, in order and without a hole; `stop` None: as far as there are any.

        Raises SequenceMissing where one is not there, SegmentCorrupt where one is damaged.
        """
        for part in self._reaching(start):
            if stop is not None and start >= stop:
                return
            for record in self.open(part).records(start, stop):
                if record.sequence != start:
                    raise self._missing(start)
                yield record
                start += 1
        if stop is not None and start < stop:
            raise self._missing(start)

    def covering(self, first: int, last: int) -> list[Part]:
        """The segments that hold these numbers, oldest first; none when last < first. Raises SequenceMissing."""
        if last < first:
            return []
        found = [part for part in self._reaching(first) if self._first(part) <= last]
        expected = first
        for part in found:
            if self._first(part) > expected:
                break
            expected = self._last(part) + 1
        if expected <= last:
            raise self._missing(expected)
        return found

    def payload(self, part: Part, entry: Entry) -> memoryview:
        """What a record of that segment wrote, verified. Raises SegmentCorrupt, SequenceMissing."""
        # Only what is longer than a chunk is asked for piece by piece.
        if entry.length <= CHUNK:
            return self.open(part).payload(entry)
        key = (part.path, entry.position)
        with self._lock:
            kept = self._payloads.pop(key, None)
        data = self.open(part).payload(entry) if kept is None else kept
        with self._lock:
            self._payloads[key] = data
            while len(self._payloads) > _PAYLOADS:
                self._payloads.pop(next(iter(self._payloads)))
        return data

    def holes(self) -> list[tuple[int, int]]:
        """(first, last) numbers that are missing between the segments that are kept."""
        found = []
        expected = 0
        for part in self._held():
            first = self._first(part)
            if expected and first > expected:
                found.append((expected, first - 1))
            expected = self._last(part) + 1
        return found

    def sessions(self) -> list[Session]:
        """Each life of the writing process of which records are kept, oldest first."""
        found: list[Session] = []
        for part in self._held():
            segment = self.open(part)
            header = segment.header
            if not found or found[-1].started_ns != header.session_ns:
                found.append(Session(header.session_ns, header.boot, segment.first, header.disks))
        return found

    def disks(self) -> dict[str, int]:
        """Name and newest size of every disk."""
        return {disk.name: disk.size for session in self.sessions() for disk in session.disks}

    def marks(self) -> Iterator[Record]:
        """All marks, oldest first."""
        for part in self._held():
            segment = self.open(part)
            for entry in segment.index.of_kind(Kind.MARK):
                yield segment.record(entry.position, entry.sequence)

    def lost(self, after: int = 0, upto: int | None = None) -> Iterator[Record]:
        """Records that say that a disk is not exact from there on, oldest first."""
        for part in self._reaching(after + 1):
            segment = self.open(part)
            for entry in segment.index.of_kind(Kind.LOST):
                if after < entry.sequence <= (upto or entry.sequence):
                    yield segment.record(entry.position, entry.sequence)

    def at(self, wall_ns: int, after: int = 0, upto: int | None = None) -> int:
        """The last number recorded before anything later than that time: the state at that instant. Only after <
        number <= upto are looked at (None: all there are), and it is `after` when the first of them is later.

        Where the clock was set back and a time came twice the earlier one counts: a revert that goes back too far
        loses less than one that goes back too little. Raises SequenceMissing, SegmentCorrupt.
        """
        parts = self._reaching(after + 1) if upto is None else self.covering(after + 1, upto)
        found = after
        for number, part in enumerate(parts):
            segment = self.open(part)
            following = self.open(parts[number + 1]) if number + 1 < len(parts) else None
            if after < segment.first and _passed(segment, following, wall_ns):
                found = segment.last
                continue
            for record in segment.records(max(segment.first, after + 1), None if upto is None else upto + 1):
                if record.wall_ns > wall_ns:
                    return found
                found = record.sequence
        return found

    def verify(self, progress: Callable[[Part], None] | None = None) -> list[Problem]:
        """Read everything. What comes back is empty when every record that is kept can be used."""
        problems = [Problem(self.spool, *hole, "these writes are missing") for hole in self._holes_by_name()]
        for part in self._parts:
            if progress is not None:
                progress(part)
            try:
                segment = self.open(part)
                if part.sealed and (segment.first, segment.last) != (part.first, part.last):
                    raise SegmentCorrupt(path=part.path, position=0, reason="it has the name of another segment")
                segment.verify()
            except SegmentCorrupt as error:
                problems.append(Problem(part.path, part.first, part.last, error.message))
            except SequenceMissing:
                continue  # forgotten meanwhile
        return problems

    def _held(self) -> list[Part]:
        """Segments with at least one record."""
        return [part for part in self._parts if part.sealed or self._last(part)]

    def _find(self, part: Part) -> Segment:
        # Sealed since, or just begun: then it gets a name by its first record, while its header keeps the number that
        # it was made for. The one with the lowest number from there on is the only one that it can be.
        for path in (part.path, *self._from(part.first)):
            try:
                segment = Segment(path)
            except FileNotFoundError:
                continue
            except SegmentCorrupt:
                if path == part.path:
                    raise
                continue  # a neighbour, maybe
            if path == part.path or part.first in (segment.header.floor, int(path.name[:20])):
                return segment
            segment.close()
        raise SequenceMissing(path=self.spool, sequence=part.first, reason="its segment was forgotten")

    def _from(self, first: int) -> list[Path]:
        named = [path for path in self.spool.iterdir() if _SEALED.fullmatch(path.name) or _OPEN.fullmatch(path.name)]
        return sorted(path for path in named if int(path.name[:20]) >= first)[:_NEAR]

    def _first(self, part: Part) -> int:
        return part.first if part.sealed else self.open(part).first

    def _last(self, part: Part) -> int:
        return part.last if part.sealed else self.open(part).last

    def _reaching(self, start: int) -> list[Part]:
        return [part for part in self._held() if self._last(part) >= start]

    def _missing(self, sequence: int) -> SequenceMissing:
        reason = "it was forgotten" if sequence < self.first else "it is not there"
        return SequenceMissing(path=self.spool, sequence=sequence, reason=reason)

    def _holes_by_name(self) -> list[tuple[int, int]]:
        sealed = [part for part in self._parts if part.sealed]
        return [(a.last + 1, b.first - 1) for a, b in pairwise(sealed) if b.first != a.last + 1]


def forget(spool: Path, journal: str, upto: int) -> tuple[int, int]:
    """Delete the segments of that journal that end at or before that number, oldest first: (segments, bytes). For a
    spool that no process writes to; what was never sealed stays until one has been there again. A folder that is not
    there has none. Raises SegmentCorrupt, OSError; again, it goes on."""
    if not spool.is_dir():
        return 0, 0
    count = freed = 0
    with Journal(spool) as found:
        for part in found.parts:
            if not part.sealed or part.last > upto or found.open(part).header.journal.hex() != journal:
                break
            size = part.path.stat().st_size
            part.path.unlink()
            count, freed = count + 1, freed + size
    return count, freed


def _passed(segment: Segment, following: Segment | None, wall_ns: int) -> bool:
    """Whether everything in it was surely recorded by then: it ends so, and the clock was not set meanwhile."""
    if segment.footer is None or following is None or segment.footer.wall_last_ns > wall_ns:
        return False
    one, two = segment.header, following.header
    return one.boot == two.boot and abs((two.wall_ns - two.mono_ns) - (one.wall_ns - one.mono_ns)) < _SLEWED
