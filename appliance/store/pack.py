"""Packs: immutable objects of up to some tens of MiB that hold many sealed records, chunks and blocks of maps alike.

    header   "RWPK" | version u8 | flags u8 (1 = encrypted) | 0 u16 | id[16]
    record*  sealed; its nonce is its offset, its label is kind and id
    table    sealed; per record: kind u8 | id[16] | length u24 big-endian          offsets follow from the lengths
    footer   table length u32 | records u32 | checksum[16] of all before it | "RWE" | version u8

A place alone is enough to read a record (one ranged get), and the table is in reach of a get of the last bytes.
FORMAT.md is normative.
"""

from __future__ import annotations

import contextlib
import mmap
import secrets
import struct
from collections import deque
from collections.abc import Iterator
from typing import Final, NamedTuple

from appliance.errors import IntegrityError, VersionUnsupported
from appliance.store.backend.base import Backend
from appliance.store.codec import ID_SIZE, OVERHEAD, SALT_SIZE, Codec

__all__ = [
    "BLOCK", "CHUNK_RECORD", "PACK_SIZE", "PREFIX", "VERSION", "Entry", "PackBuilder", "label", "pack_id", "pack_name",
    "read_table", "verify_pack",
]  # fmt: skip

VERSION: Final = 1
PREFIX: Final = "packs/"

# The open pack of each writer is in memory, beside those being uploaded: 32 MiB keeps an intake under 150 MiB, and is
# enough for S3's cost per request not to show.
PACK_SIZE: Final = 32 << 20

# Chunks may compress to nearly nothing; this keeps the table of a pack short too.
_MOST_RECORDS = 32768
# A buffer lasts from pack to pack: the page faults of a new one cost a tenth of all the work on a chunk. It is mapped,
# not allocated, because a bytearray is filled with zeroes at once, 33 MiB for a pack of three chunks.
_BUFFER = PACK_SIZE + (1 << 20)
_SPARE = 2
_buffers: deque[mmap.mmap] = deque()

_TABLE, CHUNK_RECORD, BLOCK = 0, 1, 2
_KINDS = {CHUNK_RECORD, BLOCK}

_HEADER = struct.Struct("<4sBBH16s")
_FOOTER = struct.Struct("<II16s3sB")
_HEADER_MAGIC, _FOOTER_MAGIC = b"RWPK", b"RWE"
_ENTRY_SIZE = 1 + ID_SIZE + 3
# One get of this length brings the table of a full pack of compressed chunks.
_TAIL = 64 << 10


class Entry(NamedTuple):
    """A record in a pack: `offset` and `length` of its sealed bytes."""

    kind: int
    id: bytes
    offset: int
    length: int


def pack_name(pack: bytes) -> str:
    return PREFIX + pack.hex()


def pack_id(name: str) -> bytes | None:
    """The id in an object's name; None if it is no pack's."""
    try:
        found = bytes.fromhex(name.removeprefix(PREFIX))
    except ValueError:
        return None
    return found if len(found) == SALT_SIZE and name == pack_name(found) else None


def label(kind: int, record: bytes) -> bytes:
    return bytes((kind,)) + record


class PackBuilder:
    """Collects records in memory. Not thread-safe: its writer's lock guards it."""

    def __init__(self, codec: Codec, pack: bytes | None = None) -> None:
        self.id = pack or secrets.token_bytes(SALT_SIZE)
        self.entries: list[Entry] = []
        self._codec = codec
        self._box = codec.box("pack", self.id)
        try:
            self._data = _buffers.pop()
        except IndexError:
            self._data = _new_buffer()
        self._end = 0
        self._append(_HEADER.pack(_HEADER_MAGIC, VERSION, int(codec.encrypted), 0, self.id))

    @property
    def full(self) -> bool:
        return self._end >= PACK_SIZE or len(self.entries) >= _MOST_RECORDS

    def add(self, kind: int, record: bytes, packed: bytes) -> Entry:
        """Seal and append what `codec.compress` made."""
        offset = self._end
        sealed = self._box.seal(offset, label(kind, record), packed)
        entry = Entry(kind, record, offset, len(sealed))
        self._append(sealed)
        self.entries.append(entry)
        return entry

    def read(self, offset: int, length: int) -> bytes:
        """The sealed bytes at that place, until the buffer is given back."""
        return self._data[offset : offset + length]

    def finish(self) -> memoryview:
        """The whole object, in the buffer; nothing can be added any more."""
        table = b"".join(label(entry.kind, entry.id) + entry.length.to_bytes(3, "big") for entry in self.entries)
        sealed = self._box.seal(self._end, label(_TABLE, self.id), table)
        self._append(sealed)
        checksum = self._codec.checksum(memoryview(self._data)[: self._end])
        self._append(_FOOTER.pack(len(sealed), len(self.entries), checksum, _FOOTER_MAGIC, VERSION))
        return memoryview(self._data)[: self._end]

    def recycle(self, finished: memoryview) -> None:
        """Give the buffer to the next pack. Nobody may use this one or what `finish` gave any more; if somebody holds
        a part of that still, the buffer is left to him.
        """
        try:
            finished.release()
        except BufferError:
            return
        if len(_buffers) < _SPARE:
            _buffers.append(self._data)

    def _append(self, data: bytes) -> None:
        self._data[self._end : self._end + len(data)] = data
        self._end += len(data)


def _new_buffer() -> mmap.mmap:
    found = mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without it
        found.madvise(mmap.MADV_HUGEPAGE)
    return found


def read_table(backend: Backend, codec: Codec, pack: bytes, size: int) -> list[Entry]:
    """The records of a pack of `size` bytes, from its last bytes.

    Raises IntegrityError, VersionUnsupported, ObjectNotFound and what the backend raises.
    """
    name = pack_name(pack)
    if size < _HEADER.size + OVERHEAD + _FOOTER.size:
        raise IntegrityError(object=name, reason=f"{size} bytes are too few for a pack")
    start = max(0, size - _TAIL)
    tail = backend.get(name, start, size - start)
    if len(tail) != size - start:
        raise IntegrityError(object=name, reason="it is shorter than its listing says")
    length, count, _, magic, version = _FOOTER.unpack_from(tail, len(tail) - _FOOTER.size)
    if magic != _FOOTER_MAGIC:
        raise IntegrityError(object=name, reason="it does not end as a pack does, so it is cut or overwritten")
    if version != VERSION:
        raise VersionUnsupported(object=name, version=version, supported=VERSION)
    if start == 0:
        _check_header(tail, name, pack)
    offset = size - _FOOTER.size - length
    if length != count * _ENTRY_SIZE + OVERHEAD or offset < _HEADER.size:
        raise IntegrityError(object=name, reason="its footer contradicts itself")
    sealed = tail[offset - start : offset - start + length] if offset >= start else backend.get(name, offset, length)
    try:
        table = codec.box("pack", pack).open(offset, label(_TABLE, pack), sealed)
    except IntegrityError as error:
        # A pack of another version has another table: say that rather than "damaged".
        _check_header(backend.get(name, 0, _HEADER.size), name, pack)
        raise IntegrityError(object=name, reason=f"table: {error.fields['reason']}") from error
    entries = list(_entries(table))
    if (entries[-1].offset + entries[-1].length if entries else _HEADER.size) != offset:
        raise IntegrityError(object=name, reason="its records and its table do not meet")
    return entries


def _entries(table: bytes) -> Iterator[Entry]:
    offset = _HEADER.size
    for start in range(0, len(table), _ENTRY_SIZE):
        length = int.from_bytes(table[start + 1 + ID_SIZE : start + _ENTRY_SIZE], "big")
        yield Entry(table[start], table[start + 1 : start + 1 + ID_SIZE], offset, length)
        offset += length


def _check_header(data: bytes, name: str, pack: bytes) -> None:
    if len(data) < _HEADER.size:
        raise IntegrityError(object=name, reason="it is cut short")
    magic, version, _, _, found = _HEADER.unpack_from(data)
    if magic != _HEADER_MAGIC:
        raise IntegrityError(object=name, reason="it does not begin as a pack does")
    if version != VERSION:
        raise VersionUnsupported(object=name, version=version, supported=VERSION)
    if found != pack:
        raise IntegrityError(object=name, reason=f"it is pack {found.hex()} under a wrong name")


def verify_pack(data: bytes, codec: Codec, pack: bytes) -> None:
    """Header and checksum of a whole pack. Raises IntegrityError, VersionUnsupported."""
    name = pack_name(pack)
    _check_header(data, name, pack)
    if len(data) < _HEADER.size + _FOOTER.size:
        raise IntegrityError(object=name, reason="it is cut short")
    checksum = _FOOTER.unpack_from(data, len(data) - _FOOTER.size)[2]
    if codec.checksum(memoryview(data)[: -_FOOTER.size]) != checksum:
        raise IntegrityError(object=name, reason="its checksum is wrong")
