"""Makes a map from another one and an ascending list of changes, in one pass with one open node a level.

    changes ─► leaf ─► open[1] ─► open[2] ─► … ─► open[height]: no node; its only child is the root
                 └────────┴── closed nodes are appended to the open block of the trunk (level 2 and up) or the pages

A leaf's parent is written right behind its leaves, so that one block brings both. Nodes that come out equal to the
base's keep the base's place. Memory: the open nodes, two open blocks, the cache of blocks read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from itertools import chain

from appliance.model import MapRef
from appliance.store.codec import Codec, compress
from appliance.store.map import Map
from appliance.store.node import (
    BLOCK_SIZE,
    FANOUT,
    OFFSET_BITS,
    Blocks,
    Node,
    block_record,
    encode,
    hashed_part,
    slots_of,
)
from appliance.store.node import height as height_of
from appliance.store.pack import BLOCK
from appliance.store.writer import ChunkWriter
from appliance.units import chunks_of

__all__ = ["build"]


def build(
    blocks: Blocks,
    codec: Codec,
    writer: ChunkWriter,
    base: MapRef | None,
    size: int,
    changes: Iterable[tuple[int, bytes]],
    check: Callable[[bytes], None],
) -> MapRef:
    """The map of a disk of `size` bytes that is `base` (None: zeroes) with `changes` applied; b"" is a zero chunk.

    `check` is called with each new chunk id before it is used and raises if it may not be. Raises ValueError when the
    changes do not ascend or go beyond the disk. Durable when the writer is flushed.
    """
    base = base or MapRef(b"", size)
    builder = _Builder(blocks, codec, writer, base, max(size, base.size))
    count = chunks_of(size)
    beyond = ((index, b"") for index, _ in Map(base, blocks).items(count)) if base.size > size else ()
    root, place = builder.run(chain(_within(changes, count), beyond), check)
    # A smaller disk may need fewer levels: all that is left is below the first child.
    for level in range(height_of(max(size, base.size)) - 1, height_of(size) - 1, -1):
        node = blocks.node(place, level) if root else Node(0, b"", ())
        root, place = (node.ids, node.places[0]) if root else (b"", 0)
    return MapRef(root, size, place if root else 0)


def _within(changes: Iterable[tuple[int, bytes]], count: int) -> Iterable[tuple[int, bytes]]:
    last = -1
    for index, chunk in changes:
        if not last < index < count:
            raise ValueError(f"change of chunk {index} after {last} on a disk of {count} chunks")
        last = index
        yield index, chunk


class _Open:
    """A node under construction; `base` is the id it had, to notice that it did not change."""

    __slots__ = ("base", "base_place", "ids", "number", "places")

    def __init__(self, number: int, base: bytes, base_place: int, node: Node | None) -> None:
        self.number = number
        self.base = base
        self.base_place = base_place
        self.ids = [b""] * FANOUT
        self.places = [0] * FANOUT
        if node is not None:
            for position, slot in enumerate(slots_of(node.present)):
                self.ids[slot] = node.ids[16 * position : 16 * position + 16]
                self.places[slot] = node.places[position] if node.places else 0


class _Output:
    """The open block of one kind of nodes."""

    def __init__(self, blocks: Blocks, writer: ChunkWriter) -> None:
        self._blocks = blocks
        self._writer = writer
        self._data = bytearray()
        self._tag = 0

    def append(self, node: bytes) -> int:
        """The node's place."""
        if len(self._data) + len(node) > BLOCK_SIZE:
            self.seal()
        if not self._data:
            self._tag = self._free_tag()
        place = self._tag << OFFSET_BITS | len(self._data)
        self._data += node
        return place

    def seal(self) -> None:
        if self._data:
            block = bytes(self._data)
            self._writer.add(BLOCK, block_record(self._tag), compress(block))
            self._blocks.add(self._tag, block)
            self._data.clear()

    def _free_tag(self) -> int:
        # 48 bits: among 2^24 blocks of a huge repository a chance hit is a matter of weeks, so it is ruled out here.
        while True:
            tag = secrets.randbits(48)
            if tag and not self._writer.holds(block_record(tag)):
                return tag


class _Builder:
    def __init__(self, blocks: Blocks, codec: Codec, writer: ChunkWriter, base: MapRef, size: int) -> None:
        self._blocks = blocks
        self._codec = codec
        self._height = height_of(size)
        self._pages = _Output(blocks, writer)
        self._trunk = _Output(blocks, writer)
        self._lifts: dict[int, Node] = {}
        root, place = base.root, base.place
        if root:
            for level in range(height_of(base.size), self._height):
                node = Node(1, root, (place,))
                root, place = self._written(level, [root] + [b""] * (FANOUT - 1), [place])
                self._lifts[place] = node  # its block is still open
        top = _Open(0, b"", 0, None)
        top.ids[0], top.places[0] = root, place
        self._open: list[_Open | None] = [None] * self._height + [top]
        self._top = top

    def run(self, changes: Iterable[tuple[int, bytes]], check: Callable[[bytes], None]) -> tuple[bytes, int]:
        """(root id, place)."""
        current = -1
        group: list[tuple[int, bytes]] = []
        for index, chunk in changes:
            if chunk:
                check(chunk)
            if index >> 4 != current:
                if group:
                    self._leaf(current, group)
                current, group = index >> 4, []
            group.append((index & 15, chunk))
        if group:
            self._leaf(current, group)
        for level in range(1, self._height):
            self._close(level)
        self._pages.seal()
        self._trunk.seal()
        return self._top.ids[0], self._top.places[0]

    def _leaf(self, number: int, group: list[tuple[int, bytes]]) -> None:
        parent = self._parent(number)
        slot = number & 15 if self._height > 1 else 0
        base = parent.ids[slot]
        ids = [b""] * FANOUT
        if base and len(group) < FANOUT:
            ids = _Open(number, base, 0, self._blocks.node(parent.places[slot], 0)).ids
        for child, chunk in group:
            ids[child] = chunk
        parent.ids[slot], parent.places[slot] = self._written(0, ids, [], base, parent.places[slot])

    def _parent(self, leaf: int) -> _Open:
        """The open node of level 1 above that leaf; those that are left behind are closed."""
        level = 1
        while level < self._height and ((node := self._open[level]) is None or node.number != leaf >> 4 * level):
            level += 1
        for done in range(1, level):
            self._close(done)
        for below in range(level - 1, 0, -1):
            above = self._open[below + 1]
            assert above is not None
            number = leaf >> 4 * below
            slot = number & 15 if below + 1 < self._height else 0
            base, place = above.ids[slot], above.places[slot]
            existing = (self._lifts.get(place) or self._blocks.node(place, below)) if base else None
            self._open[below] = _Open(number, base, place, existing)
        parent = self._open[1]
        assert parent is not None
        return parent

    def _close(self, level: int) -> None:
        node, above = self._open[level], self._open[level + 1]
        if node is None:
            return
        assert above is not None
        slot = node.number & 15 if level + 1 < self._height else 0
        places = [place for one, place in zip(node.ids, node.places, strict=True) if one]
        above.ids[slot], above.places[slot] = self._written(level, node.ids, places, node.base, node.base_place)
        self._open[level] = None

    def _written(
        self, level: int, ids: list[bytes], places: list[int], base: bytes = b"", base_place: int = 0
    ) -> tuple[bytes, int]:
        """(id, place) of the node; (b"", 0) when it is empty. One equal to the base's is not written again."""
        if not any(ids):
            return b"", 0
        hashed = hashed_part(level, ids)
        node = self._codec.node_id(hashed)
        if node == base:
            return base, base_place
        output = self._pages if level < 2 else self._trunk
        return node, output.append(encode(hashed, places))
