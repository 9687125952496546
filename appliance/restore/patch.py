"""The patch: a qcow2 image of nothing but metadata that makes QEMU choose between two instants block by block.

A patch `P` says of each 2 KiB of a disk where it is to be read from:

    allocated   from P's data file at the same offset: the view of the wanted instant
    zero        nowhere, it reads as zeroes, and neither view nor network is asked
    otherwise   from P's backing node: the guest's own disk

It is an ordinary qcow2 version 3 with the *external data file* and *extended L2* features, so stock QEMU reads it and
`block-commit` of it moves exactly what is allocated in it. Layout, in clusters:

    0          header, with the data file's name as extension
    1          refcount table, one cluster: it is enough for 16 TiB of metadata
    2 …        refcount blocks, as many as the largest patch of this disk could need
    …          L1 table
    …          L2 tables in the order in which they were first needed

`FINE` patches have 64 KiB clusters, one for each chunk, and decide by 2 KiB; their L2 tables are 1/4096 of the area
they touch. `COARSE` ones have 2 MiB clusters, decide by whole chunks, and are 1/131072 of it: for huge disks.
Only the tables that are needed exist, memory holds the L1 table and one L2 table.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from appliance.errors import NotSupported
from appliance.units import CHUNK

__all__ = [
    "COARSE", "FINE", "FULL_MASK", "Patch", "PatchInfo", "all_from_view", "layout_for", "patch_info", "read_patch",
    "spread", "write_patch",
]  # fmt: skip

SUBCLUSTERS = 32
FULL_MASK = (1 << SUBCLUSTERS) - 1
FINE = 16
COARSE = 21
# A patch of a bigger disk is made coarse only when it would otherwise grow beyond this.
FINE_LIMIT = 256 << 20

_ENTRY = struct.Struct(">QII")  # host offset and flags, zero bits, allocation bits
_COPIED = 1 << 63
_OFFSET = (1 << 56) - 512
_DATA_FILE_NAME = 0x44415441
_INCOMPATIBLE_DATA_FILE = 1 << 2
_INCOMPATIBLE_EXTENDED_L2 = 1 << 4
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
# QEMU refuses an L1 table beyond this.
_L1_LIMIT = 32 << 20


@dataclass(frozen=True, slots=True)
class PatchInfo:
    """What a patch holds: bytes that come from the view, bytes that become zero, and the size of the file itself."""

    pending_bytes: int
    zero_bytes: int
    chunks: int
    file_bytes: int


@lru_cache(maxsize=8192)
def spread(mask: int, units: int) -> int:
    """The 32-bit mask of 2 KiB for a mask of `units` bits over the same chunk (16 for 4 KiB, 1 for the whole chunk)."""
    width = SUBCLUSTERS // units
    ones = (1 << width) - 1
    return sum(ones << (bit * width) for bit in range(units) if mask >> bit & 1)


def layout_for(size: int, chunks: int) -> int:
    """`FINE`, unless a patch that touches `chunks` chunks, all far apart, would need more than 256 MiB of tables."""
    tables = min(chunks, -(-size // (CHUNK * CHUNK // 16)))
    return FINE if tables * CHUNK <= FINE_LIMIT else COARSE


class Patch:
    """A patch being written. `mark` may come in any order but is fast in ascending order; marking a chunk again
    replaces what was said of it, which is how the last increment of a running guest corrects a patch made before.

    Nothing is readable before `close`, which makes the file whole and durable. Used by one thread.
    """

    def __init__(self, path: Path, size: int, *, layout: int = FINE, data_name: str = "view") -> None:
        """Begin an empty patch of a disk of `size` bytes in a new file. Raises FileExistsError, NotSupported."""
        self._place(size, layout)
        self._l1 = [0] * self._l1_length
        self._clusters = self._l2_start
        self._name = data_name.encode()
        self._load(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), -1)

    @classmethod
    def reopen(cls, path: Path) -> Patch:
        """Go on with a patch that `close` had finished: until the next `close` it must not be used."""
        self = cls.__new__(cls)
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        header = _HEADER.unpack(os.pread(handle, _HEADER.size, 0))
        self._place(header[5], header[4])
        self._name = _data_name(handle)
        self._l1 = list(struct.unpack(f">{self._l1_length}Q", os.pread(handle, self._l1_length * 8, self._l1_offset)))
        self._clusters = os.fstat(handle).st_size // self._cluster
        self._load(handle, -1)
        return self

    def _place(self, size: int, layout: int) -> None:
        if size <= 0 or size % 512:
            raise NotSupported(object="disk", reason=f"a size of {size} bytes is not a multiple of 512")
        self.size = size
        self.layout = layout
        self._cluster = 1 << layout
        self._entries = self._cluster // _ENTRY.size
        self._l1_length = -(-size // (self._cluster * self._entries))
        if self._l1_length * 8 > _L1_LIMIT:
            raise NotSupported(object="disk", reason=f"{size} bytes are too many for a patch with this cluster size")
        l1_clusters = -(-self._l1_length * 8 // self._cluster)
        most = 2 + l1_clusters + self._l1_length
        self._refcount_blocks = -(-most // (self._cluster // 2 - 1))
        self._l1_offset = (2 + self._refcount_blocks) * self._cluster
        self._l2_start = 2 + self._refcount_blocks + l1_clusters

    def _load(self, handle: int, table: int) -> None:
        self._handle = handle
        self._table = table
        self._entries_now = bytearray()
        self._changed = False

    @property
    def coarse(self) -> bool:
        """Whether it decides by whole chunks."""
        return self.layout > FINE

    def mark(self, chunk: int, mask: int, zero: bool = False) -> int:
        """Say of chunk `chunk` which of its 32 parts differ: they come from the view, or read as zeroes if `zero`.
        What lies beyond the disk's end is left out. A coarse patch takes the whole chunk if anything in it differs.
        Returns how many bytes of it the patch says to differ.
        """
        mask &= self._inside(chunk)
        per_cluster = self._cluster // CHUNK
        cluster, part = divmod(chunk, per_cluster)
        low = 1 << part if per_cluster > 1 else FULL_MASK
        bits = mask if per_cluster == 1 else (low if mask else 0)
        table, index = divmod(cluster, self._entries)
        if not self._use(table, bool(bits)):
            return 0
        _, zeroes, allocated = _ENTRY.unpack_from(self._entries_now, index * _ENTRY.size)
        zeroes = zeroes & ~low | (bits if zero else 0)
        allocated = allocated & ~low | (0 if zero else bits)
        place = cluster * self._cluster | _COPIED if zeroes | allocated else 0
        _ENTRY.pack_into(self._entries_now, index * _ENTRY.size, place, zeroes, allocated)
        self._changed = True
        return bits.bit_count() * (self._cluster // SUBCLUSTERS)

    def _inside(self, chunk: int) -> int:
        left = self.size - chunk * CHUNK
        return FULL_MASK if left >= CHUNK else (1 << -(-max(left, 0) // (CHUNK // SUBCLUSTERS))) - 1

    def _use(self, table: int, needed: bool) -> bool:
        """Bring L2 table `table` to the hand; False if there is none and none is needed."""
        if table == self._table:
            return True
        if not self._l1[table] and not needed:
            return False
        self._put_away()
        self._table = table
        if self._l1[table]:
            self._entries_now = bytearray(os.pread(self._handle, self._cluster, self._l1[table] & _OFFSET))
        else:
            self._l1[table] = self._clusters * self._cluster | _COPIED
            self._clusters += 1
            self._entries_now = bytearray(self._cluster)
            self._changed = True
        return True

    def _put_away(self) -> None:
        if self._changed:
            os.pwrite(self._handle, self._entries_now, self._l1[self._table] & _OFFSET)
        self._changed = False

    def close(self) -> int:
        """Finish the file; it is durable and a valid image afterwards. Returns its size in bytes."""
        if self._handle < 0:
            return self._clusters * self._cluster
        try:
            self._put_away()
            os.pwrite(self._handle, struct.pack(f">{self._l1_length}Q", *self._l1), self._l1_offset)
            self._write_refcounts()
            os.ftruncate(self._handle, self._clusters * self._cluster)
            os.pwrite(self._handle, self._header(), 0)
            os.fsync(self._handle)
        finally:
            os.close(self._handle)
            self._handle = -1
        return self._clusters * self._cluster

    def _write_refcounts(self) -> None:
        # Only metadata is counted: an external data file has no refcounts. What is used is always a prefix.
        per_block = self._cluster // 2
        table = [(2 + block) * self._cluster for block in range(self._refcount_blocks)]
        os.pwrite(self._handle, struct.pack(f">{len(table)}Q", *table), self._cluster)
        for block, place in enumerate(table):
            used = min(max(self._clusters - block * per_block, 0), per_block)
            os.pwrite(self._handle, (b"\0\1" * used).ljust(self._cluster, b"\0"), place)

    def _header(self) -> bytes:
        header = _HEADER.pack(
            b"QFI\xfb", 3, 0, 0, self.layout, self.size, 0, self._l1_length, self._l1_offset, self._cluster, 1, 0, 0,
            _INCOMPATIBLE_DATA_FILE | _INCOMPATIBLE_EXTENDED_L2, 0, 0, 4, _HEADER.size,
        )  # fmt: skip
        name = self._name.ljust(-(-len(self._name) // 8) * 8, b"\0")
        return header + struct.pack(">II", _DATA_FILE_NAME, len(self._name)) + name + bytes(8)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def all_from_view(path: Path) -> None:
    """Let what becomes zero come from the view as well: for another view, under which it need not be zero. May be
    repeated; nobody may have the patch open."""
    patch = Patch.reopen(path)
    for table, place in enumerate(patch._l1):
        if place and patch._use(table, needed=True):
            for at in range(0, patch._cluster, _ENTRY.size):
                offset, zeroes, allocated = _ENTRY.unpack_from(patch._entries_now, at)
                if zeroes:
                    _ENTRY.pack_into(patch._entries_now, at, offset, 0, zeroes | allocated)
                    patch._changed = True
    patch.close()


def _data_name(handle: int) -> bytes:
    kind, length = struct.unpack(">II", os.pread(handle, 8, _HEADER.size))
    if kind != _DATA_FILE_NAME:
        raise NotSupported(object="patch", reason="the file is not a patch")
    return os.pread(handle, length, _HEADER.size + 8)


def write_patch(
    path: Path, size: int, masks: Iterable[tuple[int, int, bool]], *, layout: int = FINE, data_name: str = "view"
) -> PatchInfo:
    """Write a whole patch in one go from ascending (chunk, mask, zero), as `Patch.mark` takes them."""
    with Patch(path, size, layout=layout, data_name=data_name) as patch:
        for chunk, mask, zero in masks:
            patch.mark(chunk, mask, zero)
    return patch_info(path)


def patch_info(path: Path) -> PatchInfo:
    """Count what a finished patch holds."""
    pending = zeroes = chunks = 0
    for _, data, zero, unit in _entries(path):
        pending += data.bit_count() * unit
        zeroes += zero.bit_count() * unit
        chunks += 1 if unit < CHUNK else (data | zero).bit_count()
    return PatchInfo(pending, zeroes, chunks, path.stat().st_size)


def read_patch(path: Path) -> Iterator[tuple[int, int, int]]:
    """(chunk, mask of parts from the view, mask of parts that become zero), ascending, of a finished patch."""
    for start, data, zero, unit in _entries(path):
        if unit < CHUNK:
            yield start // CHUNK, data, zero
            continue
        for part in range(SUBCLUSTERS):
            if (data | zero) >> part & 1:
                yield start // CHUNK + part, FULL_MASK * (data >> part & 1), FULL_MASK * (zero >> part & 1)


def _entries(path: Path) -> Iterator[tuple[int, int, int, int]]:
    patch = Patch.reopen(path)
    try:
        for table, place in enumerate(patch._l1):
            if not place:
                continue
            block = os.pread(patch._handle, patch._cluster, place & _OFFSET)
            for index, (offset, zero, data) in enumerate(_ENTRY.iter_unpack(block)):
                if offset:
                    start = (table * patch._entries + index) * patch._cluster
                    yield start, data, zero, patch._cluster // SUBCLUSTERS
    finally:
        os.close(patch._handle)
        patch._handle = -1
