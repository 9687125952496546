"""The journal of an ext3 or ext4 file system, replayed in memory: the disk stays as it is.

A point of a running guest is a disk after a power cut: the newest state of its metadata is in the journal only. The
kernel would copy the committed blocks from the journal to their places at the next mount. Here `replay` makes Blocks
which give them in their places.

    scan      from the start on, transaction by transaction, while sequence numbers and checksums are right
    revoke    a block that was freed later must not be put back: what a transaction revokes, older ones do not write
    replay    block → where in the journal its newest copy is; its content is read, and its checksum proved, on demand

As the kernel does it (fs/jbd2/recovery.c; format: Documentation/filesystems/ext4/journal.rst): a transaction without
its commit block, or whose checksum is wrong, ends the journal. Fast commits are Unsupported when there are any.
Journals without metadata_csum may have one checksum of a whole transaction instead, in its commit block: with
`journal_async_commit` the commit block may be on the disk before the others are, and only this sum tells. A wrong sum
in the midst is damage, which the kernel refuses, and so do we.
All numbers in a journal are big-endian. Not thread-safe.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from crc32c import crc32c

from appliance.errors import GuestUnreadable
from images.guest.blocks import Blocks, Linear, Piece
from images.guest.ext4 import Ext4, Incompat
from images.guest.files import Unsupported

__all__ = ["open_ext4"]

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPER_1, _SUPER_2, _REVOKE = range(1, 6)

_HAS_REVOKE, _BIT64, _ASYNC, _CSUM_2, _CSUM_3, _FAST = 1, 2, 4, 8, 16, 32
_READABLE = ~(_HAS_REVOKE | _BIT64 | _ASYNC | _CSUM_2 | _CSUM_3 | _FAST)

# A compatible feature: older kernels pass the sum over.
_SUMS = 1
_SUM_CRC32, _SUM_BYTES = 1, 4
_NO_SUM = 0xFFFFFFFF
_BACKWARDS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

_ESCAPED, _SAME_UUID, _DELETED, _LAST = 1, 2, 4, 8
_FAST_HEAD = 9


def open_ext4(blocks: Blocks) -> Ext4:
    """The file system as the kernel would show it after mounting it. Raises GuestUnreadable, Unsupported."""
    plain = Ext4(blocks)
    if not plain.superblock.incompat & Incompat.RECOVER:
        return plain
    size = plain.superblock.block_size
    journal = _file(plain, plain.superblock.journal)
    copies = _Journal(journal, size, f"the journal on {blocks.name}").newest()
    return Ext4(_Replayed(blocks, journal, size, copies)) if copies else plain


@dataclass(frozen=True, slots=True)
class _Copy:
    """A block's newest copy: at `offset` of the journal. `checksum` None: it has none."""

    offset: int
    sequence: int
    escaped: bool
    checksum: _Checksum | None


@dataclass(frozen=True, slots=True)
class _Checksum:
    seed: int
    mask: int
    value: int

    def fits(self, sequence: int, block: bytes) -> bool:
        return _crc(_crc(self.seed, struct.pack(">I", sequence)), block) & self.mask == self.value


@dataclass(slots=True)
class _Transaction:
    sequence: int
    writes: list[tuple[int, _Copy]] = field(default_factory=list)
    revokes: list[int] = field(default_factory=list)
    sum: int = _NO_SUM
    whole: bool = True
    time: int = 0


class _Replayed:
    """The disk with the newest copies in their places."""

    def __init__(self, below: Blocks, journal: Blocks, block_size: int, copies: dict[int, _Copy]) -> None:
        self.name = below.name
        self.size = below.size
        self._below, self._journal = below, journal
        self._block_size, self._copies = block_size, copies
        self._read: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        data = self._below.read(offset, length)
        size = self._block_size
        touched = range(offset // size, (offset + length + size - 1) // size)
        changed = [number for number in touched if number in self._copies]
        if not changed:
            return data
        mixed = bytearray(data)
        for number in changed:
            block, at = self._copy(number), number * size - offset
            start, end = max(at, 0), min(at + size, length)
            mixed[start:end] = block[start - at : end - at]
        return bytes(mixed)

    def _copy(self, number: int) -> bytes:
        block = self._read.get(number)
        if block is None:
            copy = self._copies[number]
            block = self._journal.read(copy.offset, self._block_size)
            if copy.checksum and not copy.checksum.fits(copy.sequence, block):
                reason = f"the checksum of block {number} in the journal is wrong"
                raise GuestUnreadable(what=f"the file system on {self.name}", reason=reason)
            if copy.escaped:
                block = struct.pack(">I", _MAGIC) + block[4:]
            if len(self._read) < 4096:
                self._read[number] = block
        return block


class _Journal:
    def __init__(self, journal: Blocks, block_size: int, name: str) -> None:
        self._journal, self._size, self._name = journal, block_size, name
        raw = self._raw(0)
        magic, kind, _, size, *numbers = (int(number) for number in struct.unpack_from(">8I", raw))
        self._length, self._first, self._sequence, self._start = numbers
        old = kind == _SUPER_1
        self._features = 0 if old else int.from_bytes(raw[0x28:0x2C], "big")
        self._sums = not old and bool(int.from_bytes(raw[0x24:0x28], "big") & _SUMS)
        if magic != _MAGIC or kind not in (_SUPER_1, _SUPER_2) or size != block_size:
            raise GuestUnreadable(what=name, reason="its superblock is not right")
        if self._features & _READABLE:
            raise Unsupported(what=name, reason=f"journal features {self._features & _READABLE:#x}")
        self._seed = _crc(0xFFFFFFFF, raw[0x30:0x40])
        self._fast = int.from_bytes(raw[0x54:0x58], "big") or 256 if self._features & _FAST else 0
        self._end = self._length - self._fast
        if self._length * block_size > journal.size or not 0 < self._first < self._end:
            raise GuestUnreadable(what=name, reason="its superblock contradicts itself")
        if self._start and not self._first <= self._start < self._end:
            raise GuestUnreadable(what=name, reason="it starts outside itself")

    def newest(self) -> dict[int, _Copy]:
        """Block → its newest copy, over all committed transactions."""
        if self._start == 0:
            return {}
        done = list(self._transactions())
        self._refuse_fast_commits(self._sequence + len(done))
        revoked: dict[int, int] = {}
        for index, one in enumerate(done):
            revoked.update(dict.fromkeys(one.revokes, index))
        return {
            number: copy
            for index, one in enumerate(done)
            for number, copy in one.writes
            if index > revoked.get(number, -1)
        }

    def _transactions(self) -> Iterator[_Transaction]:
        """The committed ones, up to one that was not written whole."""
        broken: _Transaction | None = None
        newest = 0
        for one in self._committed():
            if broken:
                raise GuestUnreadable(what=self._name, reason=f"transaction {broken.sequence} in it is damaged")
            if one.whole:
                newest = one.time
                yield one
            elif one.time < newest:
                return  # of an older life of this file system
            elif self._features & _ASYNC:
                broken = one  # the last one, if all is well
            else:
                raise GuestUnreadable(what=self._name, reason=f"transaction {one.sequence} in it is damaged")

    def _committed(self) -> Iterator[_Transaction]:
        """Those with a commit block. No block of the journal is looked at twice, so a circle ends."""
        at, left = self._start, self._end - self._first
        now = _Transaction(self._sequence & 0xFFFFFFFF)
        while left > 0:
            raw = self._raw(at)
            magic, kind, sequence = struct.unpack_from(">3I", raw)
            if magic != _MAGIC or sequence != now.sequence or not self._intact(kind, raw):
                return
            used = 1
            if kind == _DESCRIPTOR:
                used += self._describe(raw, at, now)
                self._add_up(now, at, min(used, left))
            elif kind == _REVOKE:
                now.revokes += self._revoked(raw)
            elif kind == _COMMIT:
                now.time = int.from_bytes(raw[48:56], "big")
                now.whole = not self._sums or _sum_fits(raw, now.sum)
                yield now
                now = _Transaction((now.sequence + 1) & 0xFFFFFFFF)
            else:
                return
            at, left = self._after(at, used), left - used

    def _describe(self, raw: bytes, at: int, now: _Transaction) -> int:
        """Note what a descriptor block announces; how many blocks of content follow it."""
        count = 0
        for number, flags, checksum in self._tags(raw):
            count += 1
            place = self._after(at, count) * self._size
            now.writes.append((number, _Copy(place, now.sequence, bool(flags & _ESCAPED), checksum)))
        return count

    def _add_up(self, now: _Transaction, at: int, count: int) -> None:
        """The descriptor block and what follows it, where the commit block has their sum. Blocks that revoke are not in
        it."""
        for number in range(count if self._sums else 0):
            now.sum = _crc_be(now.sum, self._raw(self._after(at, number)))

    def _tags(self, raw: bytes) -> Iterator[tuple[int, int, _Checksum | None]]:
        """(block, flags, checksum)."""
        v3, v2, wide = (bool(self._features & bit) for bit in (_CSUM_3, _CSUM_2, _BIT64))
        size = 16 if v3 else 8 + (2 if v2 else 0) + (4 if wide else 0)
        at, end = 12, len(raw) - (4 if v2 or v3 else 0)
        while at + size <= end:
            checksum = None
            if v3:
                number, flags, high, value = struct.unpack_from(">4I", raw, at)
                checksum = _Checksum(self._seed, 0xFFFFFFFF, value)
            else:
                number, value, flags = struct.unpack_from(">IHH", raw, at)
                high = struct.unpack_from(">I", raw, at + 8)[0] if wide else 0
                checksum = _Checksum(self._seed, 0xFFFF, value) if v2 else None
            yield number | (high << 32 if wide else 0), flags, checksum
            if flags & _LAST:
                return
            at += size + (0 if flags & _SAME_UUID else 16)

    def _revoked(self, raw: bytes) -> list[int]:
        used = int.from_bytes(raw[12:16], "big")
        width = 8 if self._features & _BIT64 else 4
        if not 16 <= used <= len(raw):
            raise GuestUnreadable(what=self._name, reason=f"a revoke block has {used} bytes")
        return [int.from_bytes(raw[at : at + width], "big") for at in range(16, used - width + 1, width)]

    def _intact(self, kind: int, raw: bytes) -> bool:
        """Whether the checksum of a block of the journal's own is right, where it has one."""
        if not self._features & (_CSUM_2 | _CSUM_3):
            return True
        at = 16 if kind == _COMMIT else len(raw) - 4
        found = int.from_bytes(raw[at : at + 4], "big")
        return _crc(self._seed, raw[:at] + bytes(4) + raw[at + 4 :]) == found

    def _refuse_fast_commits(self, next_sequence: int) -> None:
        """They hold single operations on inodes, which only the kernel and e2fsck know how to do again."""
        if self._fast:
            # jbd2 leaves one block out: j_fc_first is j_last + 1.
            tag, _, _, sequence = struct.unpack_from("<HHII", self._raw(self._end + 1))
            if tag == _FAST_HEAD and sequence == next_sequence & 0xFFFFFFFF:
                raise Unsupported(what=self._name, reason="it has fast commits")

    def _after(self, at: int, count: int) -> int:
        """The block `count` further on in the circle."""
        return self._first + (at - self._first + count) % (self._end - self._first)

    def _raw(self, number: int) -> bytes:
        return self._journal.read(number * self._size, self._size)


def _file(files: Ext4, number: int) -> Blocks:
    """The blocks of an inode."""
    pieces: list[Piece] = []
    end = 0
    for at, place, length in files.places(number):
        if at != end or not place:
            raise GuestUnreadable(what=f"the journal on {files.name}", reason=f"it has a hole at {end}")
        pieces.append(Piece(files._blocks, place, length))
        end = at + length
    return Linear(f"the journal on {files.name}", pieces)


def _sum_fits(commit: bytes, found: int) -> bool:
    """A commit block may also be without a sum: its transaction is believed then, as the kernel does."""
    kind, size, told = struct.unpack_from(">BBxxI", commit, 12)
    return (kind, size, told) in ((_SUM_CRC32, _SUM_BYTES, found), (0, 0, 0))


def _crc_be(seed: int, data: bytes) -> int:
    """CRC-32 as the kernel's crc32_be counts it: from the highest bit down, and not inverted. zlib counts up."""
    return _mirrored(zlib.crc32(data.translate(_BACKWARDS), _mirrored(seed) ^ 0xFFFFFFFF) ^ 0xFFFFFFFF)


def _mirrored(number: int) -> int:
    return int(f"{number:032b}"[::-1], 2)


def _crc(seed: int, data: bytes) -> int:
    """CRC-32C as the kernel counts it: from `seed`, and not inverted."""
    found: int = crc32c(data, seed ^ 0xFFFFFFFF)
    return 0xFFFFFFFF - found
