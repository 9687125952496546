"""The bytes of a segment: see FORMAT.md beside this file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Final

from crc32c import crc32c

from appliance.errors import SegmentCorrupt

__all__ = [
    "ENTRY", "FLAG_FUA", "FLAG_MAY_TRIM", "FOOTER", "HEADER_MOST", "NO_DISK", "PAYLOAD_MOST", "RECORD", "RECORD_MAGIC",
    "Disk", "Entry", "Footer", "Header", "Kind", "Record", "crc32c", "parse_footer", "parse_header",
]  # fmt: skip


class Kind(IntEnum):
    """What a record says."""

    WRITE = 1
    ZERO = 2
    TRIM = 3
    MARK = 4
    LOST = 5


VERSION: Final = 1
NO_DISK: Final = 0xFFFF
FLAG_FUA: Final = 1
FLAG_MAY_TRIM: Final = 2
# The largest request of nbdkit.
PAYLOAD_MOST: Final = 64 << 20

RECORD_MAGIC: Final = 0x524A5752
RECORD: Final = struct.Struct("<IIQqqQIHBB")
ENTRY: Final = struct.Struct("<QIIIHBB")
FOOTER: Final = struct.Struct("<8sQQQqqQIIII")
_HEADER: Final = struct.Struct("<8sIHH16s16sQqqqII")
_DISK: Final = struct.Struct("<32sQ")
_HEADER_MAGIC: Final = b"RWJSEGM1"
_FOOTER_MAGIC: Final = b"RWJFOOT1"
_CRC_AT: Final = _HEADER.size - 8
_FOOTER_CRC_AT: Final = FOOTER.size - 8
_DISKS_MOST: Final = 256

HEADER_MOST: Final = _HEADER.size + _DISKS_MOST * _DISK.size


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a session: its target and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a segment says about itself before its first record, at byte `length`."""

    length: int
    disks: tuple[Disk, ...]
    journal: bytes
    boot: bytes
    floor: int
    session_ns: int
    wall_ns: int
    mono_ns: int


@dataclass(frozen=True, slots=True)
class Footer:
    """What a sealed segment says behind its last record, at byte `index`."""

    index: int
    first: int
    last: int
    wall_first_ns: int
    wall_last_ns: int
    payload: int
    count: int
    index_crc: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `disk` is empty for a mark; `data` is the payload, verified, empty where there is none."""

    sequence: int
    wall_ns: int
    mono_ns: int
    disk: str
    offset: int
    length: int
    kind: Kind
    flags: int
    data: memoryview
    position: int

    @property
    def time(self) -> datetime:
        """Wall time, exact to the microsecond."""
        return datetime.fromtimestamp(self.wall_ns // 10**9, UTC).replace(microsecond=self.wall_ns % 10**9 // 1000)

    @property
    def label(self) -> str:
        """Of a mark."""
        return str(self.data, "utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as the index knows it: where it is and what it covers."""

    offset: int
    length: int
    position: int
    sequence: int
    disk: int
    kind: int
    flags: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def parse_header(path: Path, data: bytes) -> Header:
    """From the first HEADER_MOST bytes of a file, or all of it. Raises SegmentCorrupt."""
    if len(data) < _HEADER.size:
        raise SegmentCorrupt(path=path, position=len(data), reason="the header is cut short")
    magic, length, version, count, journal, boot, floor, session, wall, mono, crc, _ = _HEADER.unpack_from(data)
    if magic != _HEADER_MAGIC:
        raise SegmentCorrupt(path=path, position=0, reason="it is no segment")
    if version != VERSION:
        raise SegmentCorrupt(path=path, position=12, reason=f"it is of version {version}, this program reads {VERSION}")
    if count > _DISKS_MOST or length != _HEADER.size + count * _DISK.size or len(data) < length:
        raise SegmentCorrupt(path=path, position=8, reason="the header is cut short")
    if _crc_without(data[:length], _CRC_AT) != crc:
        raise SegmentCorrupt(path=path, position=_CRC_AT, reason="the checksum of the header is wrong")
    disks = tuple(
        Disk(name.rstrip(b"\0").decode("ascii", "replace"), size)
        for name, size in _DISK.iter_unpack(data[_HEADER.size : length])
    )
    return Header(length, disks, journal, boot, floor, session, wall, mono)


def parse_footer(path: Path, data: bytes, size: int) -> Footer:
    """From the last bytes of a sealed file of `size` bytes. Raises SegmentCorrupt."""
    start = size - FOOTER.size
    if len(data) != FOOTER.size:
        raise SegmentCorrupt(path=path, position=max(start, 0), reason="the footer is cut short")
    magic, index, first, last, wall_first, wall_last, payload, count, index_crc, crc, _ = FOOTER.unpack(data)
    if magic != _FOOTER_MAGIC:
        raise SegmentCorrupt(path=path, position=start, reason="there is no footer")
    if crc32c(data[:_FOOTER_CRC_AT]) != crc:
        raise SegmentCorrupt(path=path, position=start, reason="the checksum of the footer is wrong")
    if index + count * ENTRY.size + FOOTER.size != size or last - first + 1 != count or first < 1 or count < 1:
        raise SegmentCorrupt(path=path, position=start, reason="the footer contradicts itself")
    return Footer(index, first, last, wall_first, wall_last, payload, count, index_crc)


def _crc_without(data: bytes, at: int) -> int:
    return crc32c(data[at + 4 :], crc32c(b"\0\0\0\0", crc32c(data[:at])))
