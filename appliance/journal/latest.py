"""The newest content of every chunk that was touched between two numbers: what consolidation is made of.

    segment 1   index by place ─┐
    segment 2   index by place ─┼─ merged by (chunk, newest first) ─ painted until the chunk is covered ─► Touched
    segment n   index by place ─┘

Memory does not grow with the number of records: an index is 24 bytes a record and lies in the Journal's few opened
segments, and of each segment the entries of one chunk are held at a time. Payload is read when a piece is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from appliance.journal.journal import Journal, Part
from appliance.journal.layout import Entry, Kind
from appliance.units import CHUNK

__all__ = ["Piece", "Touched", "latest", "pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a disk that one record has written last, `zero` if it made it zeroes."""

    offset: int
    length: int
    zero: bool
    sequence: int
    part: Part
    entry: Entry

    def read(self, journal: Journal) -> bytes:
        """Its content; the whole record is verified. Raises SegmentCorrupt, SequenceMissing."""
        return bytes(self.length) if self.zero else bytes(self.view(journal))

    def view(self, journal: Journal) -> memoryview:
        """As `read`, without a copy; only of what is not `zero`."""
        start = self.offset - self.entry.offset
        return journal.payload(self.part, self.entry)[start : start + self.length]


@dataclass(frozen=True, slots=True)
class Touched:
    """A chunk and its newest content: pieces ascending, without overlap; what is between them was not touched."""

    index: int
    pieces: tuple[Piece, ...]

    def covers(self, length: int) -> bool:
        """Whether all of the chunk, `length` bytes of it, was written: then nothing older is needed."""
        return sum(piece.length for piece in self.pieces) == length

    @property
    def zero(self) -> bool:
        """Whether every piece is zeroes."""
        return all(piece.zero for piece in self.pieces)

    def apply(self, journal: Journal, chunk: bytearray) -> None:
        """Write the pieces over the chunk's older content."""
        for piece in self.pieces:
            start = piece.offset - self.index * CHUNK
            chunk[start : start + piece.length] = bytes(piece.length) if piece.zero else piece.view(journal)


# (chunk, newest first, place of the segment, entry)
_Item = tuple[int, int, int, Entry]


def latest(
    journal: Journal, disk: str, after: int, upto: int, *, start: int = 0, stop: int | None = None
) -> Iterator[Touched]:
    """Chunks of the disk that records with after < sequence <= upto touched, ascending; start <= index < stop.

    Whether the disk is exact there, ask `Journal.lost`. Raises SequenceMissing when one of the records is not held,
    SegmentCorrupt.
    """
    parts = journal.covering(after + 1, upto)
    streams = [_items(journal, part, n, disk, after, upto, start, stop) for n, part in enumerate(parts)]
    for index, items in groupby(heapq.merge(*streams), key=itemgetter(0)):
        low, high = index * CHUNK, (index + 1) * CHUNK
        found = _paint(((entry, parts[n]) for _, _, n, entry in items), low, high)
        yield Touched(index, tuple(sorted(found, key=lambda piece: piece.offset)))


def pieces(journal: Journal, disk: str, offset: int, length: int, after: int, upto: int) -> list[Piece]:
    """What records with after < sequence <= upto last wrote in that range, ascending. Raises as `latest`."""

    def newest_first() -> Iterator[tuple[Entry, Part]]:
        for part in reversed(journal.covering(after + 1, upto)):
            for entry in journal.open(part).find(disk, offset, length):
                if after < entry.sequence <= upto:
                    yield entry, part

    return sorted(_paint(newest_first(), offset, offset + length), key=lambda piece: piece.offset)


def _paint(newest_first: Iterable[tuple[Entry, Part]], low: int, high: int) -> Iterator[Piece]:
    """Pieces of low <= byte < high that each entry covers and no newer one does."""
    bare = [(low, high)]
    for entry, part in newest_first:
        left: list[tuple[int, int]] = []
        for begin, end in bare:
            first, last = max(begin, entry.offset), min(end, entry.end)
            if first >= last:
                left.append((begin, end))
                continue
            yield Piece(first, last - first, entry.kind != Kind.WRITE, entry.sequence, part, entry)
            left += [(a, b) for a, b in ((begin, first), (last, end)) if a < b]
        bare = left
        if not bare:
            return


def _items(
    journal: Journal, part: Part, place: int, disk: str, after: int, upto: int, start: int, stop: int | None
) -> Iterator[_Item]:
    """What one segment has, ascending by (chunk, newest first)."""
    waiting: list[_Item] = []
    for entry in journal.open(part).entries(disk):
        if entry.kind > Kind.TRIM or not after < entry.sequence <= upto or entry.length == 0:
            continue
        chunk = entry.offset // CHUNK
        while waiting and waiting[0][0] < chunk:
            yield from _pop(waiting, start, stop)
        heapq.heappush(waiting, (max(chunk, start), -entry.sequence, place, entry))
    while waiting:
        yield from _pop(waiting, start, stop)


def _pop(waiting: list[_Item], start: int, stop: int | None) -> Iterator[_Item]:
    """The smallest item, if it is wanted; an entry that goes on in the next chunk waits again."""
    chunk, order, place, entry = waiting[0]
    if (chunk + 1) * CHUNK < entry.end and (stop is None or chunk + 1 < stop):
        heapq.heapreplace(waiting, (chunk + 1, order, place, entry))
    else:
        heapq.heappop(waiting)
    if (stop is None or chunk < stop) and chunk * CHUNK < entry.end:
        yield chunk, order, place, entry
