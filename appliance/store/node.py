"""Nodes of a map, the blocks they lie in, and how to read them fast.

    node    level u8 | version u8 | present u16 | id[16] per present child        <- the node's id is the hash of this
            and, above level 0:  | place u64 per present child
    block   nodes one after another, at most 16 KiB; a record of kind BLOCK, compressed and sealed
            its id is a random tag of 6 bytes and ten zeroes, so that places can name it
    place   tag (48 bits) << 14 | offset in the block; little-endian in nodes; 0 = none

Children of a level 0 node (a leaf) are chunks. An absent child is all zero: sparse disks cost nothing. Places are not
hashed, so equal disks have equal roots wherever their nodes lie, and a block may move from pack to pack: the index
finds it by its tag.

Whoever reads a node trusts the seal of its block, which binds the bytes to the tag; hashing every node again would
cost more than all the rest of a walk. `check` does hash them.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

from appliance.errors import IntegrityError, VersionUnsupported
from appliance.units import CHUNK

__all__ = [
    "BLOCK_SIZE", "FANOUT", "NODE_VERSION", "Blocks", "Node", "block_record", "encode", "hashed_part", "height",
    "parse", "slots_of",
]  # fmt: skip

FANOUT: Final = 16
NODE_VERSION: Final = 1
BLOCK_SIZE: Final = 16 << 10
OFFSET_BITS: Final = 14
OFFSET_MASK: Final = (1 << OFFSET_BITS) - 1

PLACES: Final = tuple(struct.Struct(f"<{n}Q") for n in range(FANOUT + 1))


def height(size: int) -> int:
    """Levels of the map of a disk of `size` bytes: 1 up to 1 MiB, 6 at 1 TiB. Follows from the size alone."""
    levels, reach = 1, FANOUT * CHUNK
    while reach < size:
        levels, reach = levels + 1, reach * FANOUT
    return levels


def block_record(tag: int) -> bytes:
    return tag.to_bytes(6, "big") + bytes(10)


class Node(NamedTuple):
    """`ids` has 16 bytes for each set bit of `present`, `places` a number each (none at level 0)."""

    present: int
    ids: bytes
    places: tuple[int, ...]


def parse(block: bytes, offset: int, level: int) -> Node:
    """Raises IntegrityError, VersionUnsupported."""
    try:
        if block[offset] != level or block[offset + 1] != NODE_VERSION:
            raise _wrong(block, offset, level)
        present = block[offset + 2] | block[offset + 3] << 8
        count = present.bit_count()
        start = offset + 4
        end = start + 16 * count
        return Node(present, block[start:end], PLACES[count].unpack_from(block, end) if level else ())
    except (IndexError, struct.error):
        raise IntegrityError(object="a map node", reason="it goes beyond its block") from None


def _wrong(block: bytes, offset: int, level: int) -> Exception:
    if block[offset + 1] != NODE_VERSION and block[offset] == level:
        return VersionUnsupported(object="a map node", version=block[offset + 1], supported=NODE_VERSION)
    return IntegrityError(object="a map node", reason=f"level {block[offset]} where {level} is expected")


@lru_cache(maxsize=4096)
def slots_of(present: int) -> tuple[int, ...]:
    """Child numbers of the set bits, ascending."""
    return tuple(slot for slot in range(FANOUT) if present >> slot & 1)


def hashed_part(level: int, ids: list[bytes]) -> bytes:
    """The bytes whose hash is the node's id; `ids` has one for each child number, b"" for zero."""
    joined = b"".join(ids)
    full = len(joined) == 16 * FANOUT
    present = 0xFFFF if full else sum(1 << slot for slot, one in enumerate(ids) if one)
    return bytes((level, NODE_VERSION, present & 255, present >> 8)) + joined


def encode(hashed: bytes, places: list[int]) -> bytes:
    """The whole node; `places` has only those of present children."""
    return hashed + PLACES[len(places)].pack(*places)


class Blocks:
    """Opened blocks, the oldest forgotten first beyond `limit` bytes. Thread-safe; a hit takes no lock.

    `read` gives the wanted block, by its record id, and may give others that lie behind it.
    """

    def __init__(self, read: Callable[[bytes], dict[bytes, bytes]], limit: int = 64 << 20) -> None:
        self._read = read
        self._limit = limit
        self._lock = threading.Lock()
        self._blocks: dict[int, bytes] = {}
        self._size = 0

    def get(self, tag: int) -> bytes:
        """Raises IntegrityError when it is lost or damaged, and what the backend raises."""
        block = self._blocks.get(tag)
        if block is None:
            wanted = block_record(tag)
            found = self._read(wanted)
            block = found[wanted]
            for record, one in found.items():
                self.add(int.from_bytes(record[:6], "big"), one)
        return block

    def node(self, place: int, level: int) -> Node:
        return parse(self.get(place >> OFFSET_BITS), place & OFFSET_MASK, level)

    def add(self, tag: int, block: bytes) -> None:
        with self._lock:
            if tag in self._blocks:
                return
            self._blocks[tag] = block
            self._size += len(block)
            while self._size > self._limit:
                self._size -= len(self._blocks.pop(next(iter(self._blocks))))
