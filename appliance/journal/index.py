"""Which records of a segment touch a place: its index, kept as the bytes it is on disk.

24 bytes a record and no objects until one is asked for; a segment may have a million records.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Final

from appliance.journal.layout import ENTRY, NO_DISK, Entry, Kind

__all__ = ["Index"]

# A request longer than this is looked at in every search: few are, and the others are found by bisection.
_LONG: Final = 1 << 20
# Of an entry's kind in its bytes.
_KIND_AT: Final = 22


class Index:
    """Entries ascending by (disk, offset, sequence). Immutable; threads may share it."""

    def __init__(self, data: bytes, first: int) -> None:
        """`data` are whole entries in order, `first` the number of the segment's first record."""
        self.data = data
        self.first = first
        self._count = len(data) // ENTRY.size

    @classmethod
    def of(cls, entries: Iterable[Entry], first: int) -> Index:
        """From entries in any order."""
        ordered = sorted(entries, key=lambda entry: (entry.disk, entry.offset, entry.sequence))
        return cls(
            b"".join(
                ENTRY.pack(e.offset, e.position, e.length, e.sequence - first, e.disk, e.kind, e.flags) for e in ordered
            ),
            first,
        )

    def with_more(self, entries: Iterable[Entry]) -> Index:
        """The same with these besides."""
        return Index.of([*self._from(0), *entries], self.first)

    def entries(self, disk: int) -> Iterator[Entry]:
        """All of a disk; of marks for NO_DISK."""
        for entry in self._from(self._place(disk, 0)):
            if entry.disk != disk:
                return
            yield entry

    def find(self, disk: int, start: int, end: int) -> list[Entry]:
        """Every write, zero and trim that touches start <= byte < end, newest first."""
        near = self._between(self._place(disk, max(0, start - _LONG)), self._place(disk, end))
        found = [entry for entry in near if entry.length <= _LONG and entry.end > start]
        found += [entry for entry in self._long if entry.disk == disk and entry.offset < end and entry.end > start]
        return sorted((e for e in found if e.kind <= Kind.TRIM), key=lambda entry: -entry.sequence)

    def of_kind(self, kind: int) -> list[Entry]:
        """All of that kind, by sequence, without making an object of every other one."""
        kinds = self.data[_KIND_AT :: ENTRY.size]
        found = []
        at = kinds.find(kind)
        while at >= 0:
            found.append(self._entry(*ENTRY.unpack_from(self.data, at * ENTRY.size)))
            at = kinds.find(kind, at + 1)
        return sorted(found, key=lambda entry: entry.sequence)

    def disks(self) -> set[int]:
        """Numbers of the disks that occur."""
        found = set()
        at = 0
        while at < self._count:
            disk = self._key(at)[0]
            found.add(disk)
            at = self._count if disk == NO_DISK else self._place(disk + 1, 0)
        return found

    @cached_property
    def _long(self) -> list[Entry]:
        long = (at for at, fields in enumerate(ENTRY.iter_unpack(self.data)) if fields[2] > _LONG)
        return [self._entry(*ENTRY.unpack_from(self.data, at * ENTRY.size)) for at in long]

    def _place(self, disk: int, offset: int) -> int:
        return bisect_left(range(self._count), (disk, offset), key=self._key)

    def _key(self, at: int) -> tuple[int, int]:
        offset, _, _, _, disk, _, _ = ENTRY.unpack_from(self.data, at * ENTRY.size)
        return disk, offset

    def _from(self, at: int) -> Iterator[Entry]:
        return self._between(at, self._count)

    def _between(self, low: int, high: int) -> Iterator[Entry]:
        piece = memoryview(self.data)[low * ENTRY.size : max(low, high) * ENTRY.size]
        for fields in ENTRY.iter_unpack(piece):
            yield self._entry(*fields)

    def _entry(
        self, offset: int, position: int, length: int, relative: int, disk: int, kind: int, flags: int
    ) -> Entry:
        return Entry(offset, length, position, self.first + relative, disk, kind, flags)
