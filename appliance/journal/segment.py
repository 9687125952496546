"""One segment file, sealed or still being written.

    Segment            header, records in order, `find` by place through the index
      sealed           index and footer of the file
      open             the index is made by reading; `refresh` reads on from where it ended

A damaged record, index or footer raises SegmentCorrupt; in an open segment a record that is not whole is its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from appliance.errors import SegmentCorrupt
from appliance.journal.index import Index
from appliance.journal.layout import (
    ENTRY,
    FOOTER,
    HEADER_MOST,
    NO_DISK,
    PAYLOAD_MOST,
    RECORD,
    RECORD_MAGIC,
    Entry,
    Footer,
    Header,
    Kind,
    Record,
    crc32c,
    parse_footer,
    parse_header,
)  # fmt: skip

__all__ = ["Segment"]

# Read at once while going through records.
_PIECE: Final = 1 << 20
_KINDS: Final = {int(kind): kind for kind in Kind}
_EMPTY: Final = memoryview(b"")
# Read to get one record.
_ONE: Final = 64 << 10


class Segment:
    """An opened segment. Threads may share it except for `refresh` and `close`. Stays readable when it is deleted."""

    def __init__(self, path: Path) -> None:
        """Raises SegmentCorrupt, FileNotFoundError, OSError; nothing stays open then."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.header: Header = parse_header(path, os.pread(self._fd, HEADER_MOST, 0))
            self.footer: Footer | None = self._read_footer() if path.suffix == ".rwj" else None
        except BaseException:  # nobody else could close it: the object does not come into being
            self.close()
            raise
        self._index: Index | None = None
        self._end = self.footer.index if self.footer else self.header.length
        self._last = self.footer.last if self.footer else 0
        self._first = self.footer.first if self.footer else 0
        if self.footer is None:
            self.refresh()

    def __del__(self) -> None:
        # Whoever drops a segment cannot know whether somebody is still reading it.
        if hasattr(self, "_fd"):
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sealed(self) -> bool:
        return self.footer is not None

    @property
    def first(self) -> int:
        """Sequence number of the first record; 0 when there is none yet."""
        return self._first

    @property
    def last(self) -> int:
        """Sequence number of the last record; 0 when there is none yet."""
        return self._last

    def close(self) -> None:
        """May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def refresh(self) -> None:
        """Take in what was appended to an open segment since. Nothing to do for a sealed one."""
        if self.footer is not None:
            return
        fresh: list[Entry] = []
        end, last = self._end, self._last
        for record in self._scan(end, last + 1 if last else 0):
            fresh.append(self._entry_of(record))
            end, last = record.position + RECORD.size + len(record.data), record.sequence
        if fresh:
            self._first = self._first or fresh[0].sequence
            self._index = self._index.with_more(fresh) if self._index else Index.of(fresh, self._first)
            self._end, self._last = end, last

    @property
    def index(self) -> Index:
        """Raises SegmentCorrupt."""
        if self._index is None:
            self._index = self._read_index() if self.footer else Index(b"", 1)
        return self._index

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records with start <= sequence < stop, in order, each verified before it is given."""
        if self._last == 0 or start > self._last:
            return
        position = self._seek(start)
        for record in self._scan(position, max(start, self._first)):
            if stop is not None and record.sequence >= stop:
                return
            yield record
            if record.sequence == self._last:
                return
        # `_scan` ended before the last record: one that was there is not whole.
        raise SegmentCorrupt(path=self.path, position=position, reason="a record is missing")

    def entries(self, disk: str) -> Iterator[Entry]:
        """What the index knows of a disk, ascending by (offset, sequence); of marks for the empty name."""
        number = self._number(disk)
        return iter(()) if number is None else self.index.entries(number)

    def find(self, disk: str, offset: int, length: int) -> list[Entry]:
        """Every write, zero and trim that touches the range, newest first."""
        number = self._number(disk)
        return [] if number is None else self.index.find(number, offset, offset + length)

    def record(self, position: int, sequence: int) -> Record:
        """The record whose header is at that byte. Raises SegmentCorrupt when it is not whole."""
        for record in self._scan(position, sequence, most=1):
            return record
        raise SegmentCorrupt(path=self.path, position=position, reason=f"record {sequence} is not whole")

    def payload(self, entry: Entry) -> memoryview:
        """What the record of that entry wrote. Raises SegmentCorrupt when it is not whole, or another record."""
        size = RECORD.size + entry.length
        data = memoryview(os.pread(self._fd, size, entry.position))
        if len(data) == size:
            magic, crc, sequence, _, _, offset, length, disk, kind, _ = RECORD.unpack_from(data)
            found = (magic, sequence, offset, length, disk, kind)
            wanted = (RECORD_MAGIC, entry.sequence, entry.offset, entry.length, entry.disk, entry.kind)
            if found == wanted and crc32c(data[8:]) == crc:
                return data[RECORD.size :]
        reason = f"record {entry.sequence} is not whole"
        raise SegmentCorrupt(path=self.path, position=entry.position, reason=reason)

    def verify(self) -> None:
        """Read all of it. Raises SegmentCorrupt at the first thing that does not fit."""
        entries, payload, walls = [], 0, 0
        for record in self.records():
            entries.append(self._entry_of(record))
            payload += len(record.data)
            walls = record.wall_ns
        if Index.of(entries, self._first).data != self.index.data:
            raise SegmentCorrupt(path=self.path, position=self._end, reason="index and records differ")
        if self.footer is not None and (payload, walls) != (self.footer.payload, self.footer.wall_last_ns):
            raise SegmentCorrupt(path=self.path, position=self._end, reason="footer and records differ")

    def _entry_of(self, record: Record) -> Entry:
        number = self._number(record.disk)
        assert number is not None, "_scan gives only disks of the header"
        return Entry(
            record.offset, record.length, record.position, record.sequence, number, record.kind, record.flags
        )  # fmt: skip

    def _number(self, disk: str) -> int | None:
        if not disk:
            return NO_DISK
        return next((number for number, one in enumerate(self.header.disks) if one.name == disk), None)

    def _read_footer(self) -> Footer:
        size = os.fstat(self._fd).st_size
        footer = parse_footer(self.path, os.pread(self._fd, FOOTER.size, max(0, size - FOOTER.size)), size)
        if footer.index < self.header.length:
            raise SegmentCorrupt(path=self.path, position=footer.index, reason="the footer contradicts the header")
        return footer

    def _read_index(self) -> Index:
        assert self.footer is not None
        data = os.pread(self._fd, self.footer.count * ENTRY.size, self.footer.index)
        if crc32c(data) != self.footer.index_crc:
            reason = "the checksum of the index is wrong"
            raise SegmentCorrupt(path=self.path, position=self.footer.index, reason=reason)
        return Index(data, self.footer.first)

    def _seek(self, start: int) -> int:
        """Where the record with that number begins, by the headers alone; they are verified when they are given out."""
        position, piece, base = self.header.length, b"", self.header.length
        for _ in range(max(0, start - self._first)):
            if position + RECORD.size > base + len(piece):
                piece, base = os.pread(self._fd, _PIECE, position), position
            if len(piece) - (position - base) < RECORD.size:
                raise SegmentCorrupt(path=self.path, position=position, reason="a record is cut short")
            magic, _, _, _, _, _, length, _, kind, _ = RECORD.unpack_from(piece, position - base)
            if magic != RECORD_MAGIC:
                raise SegmentCorrupt(path=self.path, position=position, reason="there is no record")
            position += RECORD.size + (length if kind in (Kind.WRITE, Kind.MARK) else 0)
        return position

    def _scan(self, position: int, expected: int, most: int | None = None) -> Iterator[Record]:
        """Whole records from a byte on, until one is not; `expected` is the first one's number, 0 for any."""
        piece, base = memoryview(b""), position
        ahead = RECORD.size + _ONE if most == 1 else _PIECE
        while most is None or most > 0:
            if position + RECORD.size > base + len(piece):
                piece, base = memoryview(os.pread(self._fd, ahead, position)), position
            if len(piece) - (position - base) < RECORD.size:
                return
            at = position - base
            magic, crc, sequence, wall, mono, offset, length, disk, kind, flags = RECORD.unpack_from(piece, at)
            if magic != RECORD_MAGIC or kind not in _KINDS or sequence != (expected or sequence) or sequence == 0:
                return
            size = length if kind in (Kind.WRITE, Kind.MARK) else 0
            if size > PAYLOAD_MOST or (disk >= len(self.header.disks)) != (kind == Kind.MARK):
                return
            if at + RECORD.size + size > len(piece):
                piece, base, at = memoryview(os.pread(self._fd, max(ahead, RECORD.size + size), position)), position, 0
                if len(piece) < RECORD.size + size:
                    return
            if crc32c(piece[at + 8 : at + RECORD.size + size]) != crc:
                return
            data = piece[at + RECORD.size : at + RECORD.size + size] if size else _EMPTY
            name = "" if kind == Kind.MARK else self.header.disks[disk].name
            yield Record(sequence, wall, mono, name, offset, length, _KINDS[kind], flags, data, position)
            position += RECORD.size + size
            expected = sequence + 1
            most = None if most is None else most - 1
