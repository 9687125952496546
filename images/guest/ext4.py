"""ext2, ext3 and ext4 read from their blocks, in Python and without writing anything.

    superblock → group descriptors → inode → extent tree (or the old block lists) → content, folder entries

Why not debugfs or libext2fs: they read neither NBD nor a logical volume, show a disk without what is still in its
journal (the normal state of a point of a running guest), answer in text in which a hostile name may hold a line break,
and parse hostile bytes in C. Here a wrong length is an exception. A file system that was not unmounted is read through
`journal.replay`, which lays the journal's blocks over the disk's in memory.

What is not known is Unsupported, by the superblock's feature bits, before anything else is read: external journals,
compression, data inside inodes, encrypted files. Metadata checksums are not verified: what a hostile guest wrote has
right ones, and the journal gives a consistent state.

Source: Linux, Documentation/filesystems/ext4. Every loop ends: trees by their depth and a count of nodes, folders by
their size, lists of blocks by the file's size. Not thread-safe.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag

from appliance.errors import GuestUnreadable
from images.guest.blocks import Blocks, check_inside
from images.guest.files import Node, Unsupported
from images.tree import Kind

__all__ = ["Ext4", "Incompat", "Superblock"]

_MAGIC = 0xEF53
_ROOT = 2
_KINDS = {0x8: Kind.FILE, 0x4: Kind.FOLDER, 0xA: Kind.LINK}

_ENCRYPTED = 0x800
_EXTENTS = 0x80000
_INLINE_DATA = 0x10000000
_EXTENT_MAGIC = 0xF30A
_LONGEST_EXTENT = 1 << 15

# A folder of a real system has some thousand names; a kernel's tree of extents some hundred nodes.
_FOLDER_BYTES = 16 << 20
_TREE_NODES = 1 << 16
_TREE_DEPTH = 5
_KNOWN = 512


class Incompat(IntFlag):
    """Features without which a file system cannot be read."""

    FILETYPE = 0x2
    RECOVER = 0x4
    META_BG = 0x10
    EXTENTS = 0x40
    BIT64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


_READABLE = ~sum(Incompat)
_HAS_JOURNAL = 0x4
_SPARSE_SUPER = 0x1
_SPARSE_SUPER2 = 0x200


@dataclass(frozen=True, slots=True)
class Superblock:
    """What of the superblock is needed to read."""

    inodes: int
    blocks: int
    first_block: int
    block_size: int
    blocks_per_group: int
    inodes_per_group: int
    inode_size: int
    descriptor_size: int
    incompat: int
    sparse: bool
    first_meta_group: int
    journal: int

    @classmethod
    def parse(cls, raw: bytes, name: str) -> Superblock:
        """From its 1024 bytes. Raises GuestUnreadable, Unsupported."""
        if len(raw) != 1024 or _u16(raw, 0x38) != _MAGIC:
            raise GuestUnreadable(what=f"the file system on {name}", reason="its superblock is not one of ext4")
        incompat, compat = _u32(raw, 0x60), _u32(raw, 0x5C)
        if incompat & _READABLE:
            raise Unsupported(what=f"the file system on {name}", reason=f"ext4 features {incompat & _READABLE:#x}")
        journal = _u32(raw, 0xE0) if compat & _HAS_JOURNAL else 0
        if incompat & Incompat.RECOVER and not journal:
            raise Unsupported(what=f"the file system on {name}", reason="its journal is on another disk")
        found = cls(
            inodes=_u32(raw, 0),
            blocks=_u32(raw, 4) | (_u32(raw, 0x150) << 32 if incompat & Incompat.BIT64 else 0),
            first_block=_u32(raw, 0x14),
            block_size=1024 << min(_u32(raw, 0x18), 16),
            blocks_per_group=_u32(raw, 0x20),
            inodes_per_group=_u32(raw, 0x28),
            inode_size=_u16(raw, 0x58) if _u32(raw, 0x4C) else 128,
            descriptor_size=_u16(raw, 0xFE) if incompat & Incompat.BIT64 else 32,
            incompat=incompat,
            sparse=bool(_u32(raw, 0x64) & _SPARSE_SUPER),
            first_meta_group=_u32(raw, 0x104),
            journal=journal,
        )
        if incompat & Incompat.META_BG and compat & _SPARSE_SUPER2:
            raise Unsupported(what=f"the file system on {name}", reason="sparse_super2 with meta_bg")
        found._check(name)
        return found

    def _check(self, name: str) -> None:
        right = (
            self.block_size <= 1 << 16
            and 0 < self.inodes_per_group <= self.block_size * 8
            and 0 < self.blocks_per_group <= self.block_size * 8 * 1024
            and 128 <= self.inode_size <= self.block_size
            and self.inode_size & (self.inode_size - 1) == 0
            and 32 <= self.descriptor_size <= min(1024, self.block_size)
            and self.first_block < self.blocks
        )
        if not right:
            raise GuestUnreadable(what=f"the file system on {name}", reason="its superblock contradicts itself")

    def descriptor_at(self, group: int) -> int:
        """Where on the disk the descriptor of a group is."""
        per_block = self.block_size // self.descriptor_size
        block, within = divmod(group, per_block)
        # With blocks of 1 KiB the superblock is in block 1, also where clusters make group 0 begin at block 0.
        at = max(self.first_block, self.block_size == 1024)
        if not self.incompat & Incompat.META_BG or block < self.first_meta_group:
            at += 1 + block
        else:
            leader = block * per_block
            at = (leader * self.blocks_per_group + self.first_block if leader else at) + self._has_copy(leader)
        return at * self.block_size + within * self.descriptor_size

    def _has_copy(self, group: int) -> bool:
        """Whether a group begins with a copy of the superblock."""
        return not self.sparse or group < 2 or any(_is_power(group, base) for base in (3, 5, 7))


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` blocks of a file from `logical` on. `physical` 0: they read as zeroes."""

    logical: int
    physical: int
    count: int


@dataclass(frozen=True, slots=True)
class _Inode:
    number: int
    node: Node
    flags: int
    place: bytes  # 60 bytes: tree of extents, list of blocks, or a short link


class Ext4:
    """A FileSystem (see there) on `blocks`, which show what the journal holds too."""

    def __init__(self, blocks: Blocks) -> None:
        self.name = blocks.name
        self._blocks = blocks
        if blocks.size < 2048:
            raise GuestUnreadable(what=f"the file system on {self.name}", reason="it is smaller than its superblock")
        self.superblock = Superblock.parse(blocks.read(1024, 1024), self.name)
        self._inodes: OrderedDict[int, _Inode] = OrderedDict()
        self._folders: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        self.root = self._inode(_ROOT).node
        if self.root.kind is not Kind.FOLDER:
            raise self._damaged("its root is not a folder")

    def names(self, folder: Node) -> Iterable[bytes]:
        return self._entries(folder).keys()

    def lookup(self, folder: Node, name: bytes) -> Node | None:
        number = self._entries(folder).get(name)
        return None if number is None else self._inode(number).node

    def target(self, link: Node) -> bytes:
        inode = self._inode(link.number)
        if link.size < len(inode.place):
            return inode.place[: link.size]
        if link.size > 4096:
            raise self._damaged(f"link {link.number} has {link.size} bytes")
        return self._content(inode)

    def read(self, file: Node) -> bytes:
        return self._content(self._inode(file.number))

    def places(self, number: int) -> list[tuple[int, int, int]]:
        """(offset in the file, offset on the disk, length) in bytes of an inode's data; what is missing is zeroes."""
        size = self.superblock.block_size
        inode = self._inode(number)
        return [(run.logical * size, run.physical * size, run.count * size) for run in self._runs(inode)]

    # --- inodes ---

    def _inode(self, number: int) -> _Inode:
        found = self._inodes.get(number)
        if found is None:
            found = self._inodes[number] = self._read_inode(number)
            if len(self._inodes) > _KNOWN * 8:
                self._inodes.popitem(last=False)
        return found

    def _read_inode(self, number: int) -> _Inode:
        sb = self.superblock
        if not 0 < number <= sb.inodes:
            raise self._damaged(f"there is no inode {number}")
        group, index = divmod(number - 1, sb.inodes_per_group)
        descriptor = self._blocks.read(sb.descriptor_at(group), sb.descriptor_size)
        table = _u32(descriptor, 8) | (_u32(descriptor, 0x28) << 32 if len(descriptor) >= 64 else 0)
        raw = self._blocks.read(table * sb.block_size + index * sb.inode_size, 128)
        mode, flags = _u16(raw, 0), _u32(raw, 0x20)
        size = _u32(raw, 4) | _u32(raw, 0x6C) << 32
        kind = _KINDS.get(mode >> 12, Kind.OTHER)
        if flags & (_ENCRYPTED | _INLINE_DATA) and kind is not Kind.OTHER:
            raise Unsupported(what=f"inode {number} on {self.name}", reason="it is encrypted, or its data is inside it")
        return _Inode(number, Node(number, kind, size), flags, raw[0x28:0x64])

    # --- where its blocks are ---

    def _runs(self, inode: _Inode) -> list[_Run]:
        count = -(-inode.node.size // self.superblock.block_size)
        if inode.flags & _EXTENTS:
            return list(self._extents(inode.place, _TREE_DEPTH, [_TREE_NODES], inode.number))
        return list(_joined(self._listed(inode, count)))

    def _extents(self, raw: bytes, depth_left: int, nodes_left: list[int], number: int) -> Iterator[_Run]:
        magic, entries, _, depth = struct.unpack_from("<4H", raw)
        nodes_left[0] -= 1
        if magic != _EXTENT_MAGIC or depth > depth_left or 12 + entries * 12 > len(raw) or nodes_left[0] < 0:
            raise self._damaged(f"the extents of inode {number} are not right")
        for at in range(12, 12 + entries * 12, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", raw, at)
                yield from self._extents(self._block(high << 32 | low), depth - 1, nodes_left, number)
            else:
                logical, length, high, low = struct.unpack_from("<IHHI", raw, at)
                empty = length > _LONGEST_EXTENT
                yield _Run(logical, 0 if empty else high << 32 | low, length - _LONGEST_EXTENT if empty else length)

    def _listed(self, inode: _Inode, count: int) -> Iterator[_Run]:
        """Of ext2 and ext3: twelve numbers of blocks, then numbers of one, two and three steps."""
        numbers = struct.unpack("<15I", inode.place)
        per_block = self.superblock.block_size // 4
        at = 0
        for number, steps in zip(numbers, (*(0,) * 12, 1, 2, 3), strict=True):
            if at >= count:
                return
            yield from self._below(number, steps, at, count)
            at += per_block**steps

    def _below(self, number: int, steps: int, at: int, count: int) -> Iterator[_Run]:
        if number == 0 or at >= count:
            return
        if steps == 0:
            yield _Run(at, number, 1)
            return
        reach = (self.superblock.block_size // 4) ** (steps - 1)
        for index, below in enumerate(struct.unpack(f"<{self.superblock.block_size // 4}I", self._block(number))):
            yield from self._below(below, steps - 1, at + index * reach, count)

    # --- content ---

    def _content(self, inode: _Inode) -> bytes:
        """Its bytes, with zeroes where it has no blocks."""
        size, block = inode.node.size, self.superblock.block_size
        parts: list[bytes] = []
        end = 0
        for run in self._runs(inode):
            start = min(run.logical * block, size)
            if start < end:
                raise self._damaged(f"blocks of inode {inode.number} overlap")
            length = min(run.count * block, size - start)
            parts.append(bytes(start - end))
            parts.append(self._blocks.read(run.physical * block, length) if run.physical else bytes(length))
            end = start + length
        parts.append(bytes(size - end))
        return b"".join(parts)

    def _entries(self, folder: Node) -> dict[bytes, int]:
        found = self._folders.get(folder.number)
        if found is None:
            if folder.kind is not Kind.FOLDER or folder.size > _FOLDER_BYTES:
                raise self._damaged(f"folder {folder.number} has {folder.size} bytes")
            found = self._folders[folder.number] = dict(self._parse_folder(folder))
            if len(self._folders) > _KNOWN:
                self._folders.popitem(last=False)
        return found

    def _parse_folder(self, folder: Node) -> Iterator[tuple[bytes, int]]:
        """Block by block, which passes over the index of a hashed one: its blocks look like unused entries."""
        content, size = self._content(self._inode(folder.number)), self.superblock.block_size
        at = 0
        while at + 8 <= len(content):
            left = size - at % size
            number, length, name_length = struct.unpack_from("<IHB", content, at)
            if length in (0, 0xFFFF):
                length = left  # of blocks of 64 KiB
            if length < 8 or length > left or length % 4 or name_length > length - 8:
                raise self._damaged(f"an entry at {at} of folder {folder.number} is not right")
            name = content[at + 8 : at + 8 + name_length]
            if number and name not in (b"", b".", b".."):
                yield name, number
            at += length

    def _block(self, number: int) -> bytes:
        size = self.superblock.block_size
        check_inside(self._blocks, number * size, size)
        return self._blocks.read(number * size, size)

    def _damaged(self, reason: str) -> GuestUnreadable:
        return GuestUnreadable(what=f"the file system on {self.name}", reason=reason)


def _joined(runs: Iterable[_Run]) -> Iterator[_Run]:
    """Neighbours as one, so that they are read at once."""
    held: _Run | None = None
    for run in runs:
        if held and run.logical == held.logical + held.count and run.physical == held.physical + held.count:
            held = _Run(held.logical, held.physical, held.count + run.count)
            continue
        if held:
            yield held
        held = run
    if held:
        yield held


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _u16(raw: bytes, at: int) -> int:
    value: int = struct.unpack_from("<H", raw, at)[0]
    return value


def _u32(raw: bytes, at: int) -> int:
    value: int = struct.unpack_from("<I", raw, at)[0]
    return value
