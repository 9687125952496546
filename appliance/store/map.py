"""Maps: immutable trees of chunk ids that are one whole disk at one instant. Reading, walking, comparing.

    level 2            ┌── node ──┐             16 children a node; the child number at level k of chunk i
    level 1        ┌─ node ─┐    node           is (i >> 4k) & 15
    level 0      leaf      leaf
                16 chunk ids

Two maps of equal content have equal root ids, and so has every subtree: `diff` skips what is equal at any level, so it
costs what differs and not what is there. Maps of disks of different sizes may differ in height; the lower one is then
the first child of an imagined chain of nodes above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from appliance.errors import IntegrityError
from appliance.model import MapRef
from appliance.store.codec import Codec
from appliance.store.node import (
    FANOUT,
    NODE_VERSION,
    OFFSET_BITS,
    OFFSET_MASK,
    PLACES,
    Blocks,
    Node,
    height,
    parse,
    slots_of,
)
from appliance.units import chunks_of

__all__ = ["Map", "NewNode", "check_root", "diff", "new_nodes"]

_EMPTY: Final = Node(0, b"", ())
_FULL_LEAF: Final = bytes((0, NODE_VERSION, 255, 255))
_FULL_PAGE: Final = bytes((1, NODE_VERSION, 255, 255))
_PLACES: Final = PLACES[FANOUT]


def check_root(ref: MapRef, blocks: Blocks, codec: Codec) -> None:
    """That the root node is where the reference says, by hash. Raises IntegrityError."""
    if not ref.root:
        return
    level = height(ref.size) - 1
    block = blocks.get(ref.place >> OFFSET_BITS)
    offset = ref.place & OFFSET_MASK
    node = parse(block, offset, level)
    if codec.node_id(block[offset : offset + 4 + len(node.ids)]) != ref.root:
        raise IntegrityError(object=f"map {ref.root.hex()}", reason="its root is not where it should be")


class Map:
    """A map opened for reading; holds no memory of its own but the leaf that was looked at last, which readers mostly
    go on in. Thread-safe.

    Its methods raise IntegrityError when a block is lost or damaged, and what the backend raises.
    """

    def __init__(self, ref: MapRef, blocks: Blocks) -> None:
        self.ref = ref
        self.size = ref.size
        self.chunks = chunks_of(ref.size)
        self._top = height(ref.size) - 1
        self._blocks = blocks
        self._leaf = -1, _EMPTY  # number and node, replaced together

    def get(self, index: int) -> bytes:
        """The id of that chunk, b"" for zero; beyond the disk's end all is zero."""
        if not self.ref.root or index >= self.chunks:
            return b""
        number, leaf = self._leaf
        if number != index >> 4:
            leaf = self._leaf_of(index)
            self._leaf = index >> 4, leaf
        slot = index & 15
        if not leaf.present >> slot & 1:
            return b""
        position = (leaf.present & (1 << slot) - 1).bit_count()
        return leaf.ids[16 * position : 16 * position + 16]

    def _leaf_of(self, index: int) -> Node:
        """The leaf that has the chunk; an empty one where all is zero."""
        place = self.ref.place
        for level in range(self._top, 0, -1):
            node = self._blocks.node(place, level)
            slot = index >> 4 * level & 15
            if not node.present >> slot & 1:
                return _EMPTY
            place = node.places[(node.present & (1 << slot) - 1).bit_count()]
        return self._blocks.node(place, 0)

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
        """(index, id) of the chunks that are not zero, ascending, `start <= index < stop`."""
        stop = self.chunks if stop is None else min(stop, self.chunks)
        if self.ref.root and start < stop:
            yield from self._items(self._top, self.ref.place, 0, start, stop)

    def _items(self, level: int, place: int, first: int, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        node = self._blocks.node(place, level)
        span = 1 << 4 * level
        for position, slot in enumerate(slots_of(node.present)):
            low = first + slot * span
            if low + span <= start or low >= stop:
                continue
            if level:
                yield from self._items(level - 1, node.places[position], low, start, stop)
            else:
                yield low, node.ids[16 * position : 16 * position + 16]


def diff(blocks: Blocks, a: MapRef | None, b: MapRef | None) -> Iterator[int]:
    """Indexes of the chunks that differ, ascending; None is a disk of zeroes. Equal subtrees are not opened."""
    low, high = sorted((ref or MapRef(b"", 0) for ref in (a, b)), key=lambda ref: height(ref.size))
    yield from _Diff(blocks).tops(low, high)


class _Diff:
    """Walks two trees side by side. Level 1 with its leaves is done in one function: there the time goes."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def tops(self, low: MapRef, high: MapRef) -> Iterator[int]:
        """`high` is at least as high as `low`."""
        level, top = height(low.size) - 1, height(high.size) - 1
        place, root, rest = high.place, high.root, []
        for step in range(top, level, -1):
            node = self._blocks.node(place, step) if root else _EMPTY
            rest.append((step, node))
            root, place = (node.ids[:16], node.places[0]) if node.present & 1 else (b"", 0)
        if root != low.root:
            yield from self.subtree(level, low.place if low.root else 0, place if root else 0, 0)
        for step, node in reversed(rest):
            for position, slot in enumerate(slots_of(node.present)):
                if slot:
                    yield from self.subtree(step - 1, 0, node.places[position], slot << 4 * step)

    def subtree(self, level: int, a: int, b: int, first: int) -> Iterator[int]:
        """`a` and `b` are places of nodes that differ, 0 for an absent one."""
        if level <= 1:
            found: list[int] = []
            (self.pages if level else self.leaves)(a, b, first, found)
            yield from found
            return
        one = self._blocks.node(a, level) if a else _EMPTY
        two = self._blocks.node(b, level) if b else _EMPTY
        for slot, left, right in _differing(one, two):
            low = first + (slot << 4 * level)
            if level > 2:
                yield from self.subtree(level - 1, left, right, low)
            else:
                found = []
                self.pages(left, right, low, found)
                yield from found

    def pages(self, a: int, b: int, first: int, found: list[int]) -> None:
        """Nodes of level 1 and their leaves."""
        if a and b:
            block, other = self._blocks.get(a >> OFFSET_BITS), self._blocks.get(b >> OFFSET_BITS)
            at, to = a & OFFSET_MASK, b & OFFSET_MASK
            if block[at : at + 4] == other[to : to + 4] == _FULL_PAGE:
                self.full_pages(block, at, other, to, first, found)
                return
        one = self._blocks.node(a, 1) if a else _EMPTY
        two = self._blocks.node(b, 1) if b else _EMPTY
        for slot, left, right in _differing(one, two):
            self.leaves(left, right, first + (slot << 4), found)

    def full_pages(self, block: bytes, at: int, other: bytes, to: int, first: int, found: list[int]) -> None:
        """Where nothing is absent, one exclusive-or of all 16 ids finds the few that differ. Written out for the
        leaves as well, without a call or a Node for each: most of the time of a diff is spent here.
        """
        get, from_bytes = self._blocks.get, int.from_bytes
        places, others = _PLACES.unpack_from(block, at + 260), _PLACES.unpack_from(other, to + 260)
        known = other_known = -1
        left = right = b""
        rest = from_bytes(block[at + 4 : at + 260], "little") ^ from_bytes(other[to + 4 : to + 260], "little")
        slot = -1
        while rest:
            skip = ((rest & -rest).bit_length() + 127) >> 7
            slot += skip
            rest >>= skip << 7
            if (tag := places[slot] >> OFFSET_BITS) != known:
                left, known = get(tag), tag
            if (tag := others[slot] >> OFFSET_BITS) != other_known:
                right, other_known = get(tag), tag
            at, to = places[slot] & OFFSET_MASK, others[slot] & OFFSET_MASK
            if not left[at : at + 4] == right[to : to + 4] == _FULL_LEAF:
                self.leaves(places[slot], others[slot], first + (slot << 4), found)
                continue
            chunk = first + (slot << 4) - 1
            ids = from_bytes(left[at + 4 : at + 260], "little") ^ from_bytes(right[to + 4 : to + 260], "little")
            while ids:
                skip = ((ids & -ids).bit_length() + 127) >> 7
                chunk += skip
                found.append(chunk)
                ids >>= skip << 7

    def leaves(self, a: int, b: int, first: int, found: list[int]) -> None:
        one = self._blocks.node(a, 0) if a else _EMPTY
        two = self._blocks.node(b, 0) if b else _EMPTY
        left, right = _by_slot(one), _by_slot(two)
        found += [first + slot for slot in range(FANOUT) if left.get(slot) != right.get(slot)]


def _differing(one: Node, two: Node) -> list[tuple[int, int, int]]:
    """(child number, place in one, place in two) of children whose ids differ; place 0 for an absent child."""
    ids, others = one.ids, two.ids
    if one.present == two.present:
        return [
            (slot, one.places[position], two.places[position])
            for position, slot in enumerate(slots_of(one.present))
            if ids[16 * position : 16 * position + 16] != others[16 * position : 16 * position + 16]
        ]
    left, right = _by_slot(one), _by_slot(two)
    places = dict(zip(slots_of(one.present), one.places, strict=True))
    others_places = dict(zip(slots_of(two.present), two.places, strict=True))
    return [
        (slot, places.get(slot, 0), others_places.get(slot, 0))
        for slot in slots_of(one.present | two.present)
        if left.get(slot) != right.get(slot)
    ]


def _by_slot(node: Node) -> dict[int, bytes]:
    return {slot: node.ids[16 * position : 16 * position + 16] for position, slot in enumerate(slots_of(node.present))}


class NewNode(NamedTuple):
    """A node that the other map does not have at its position; `old` is what that one has there (empty: nothing)."""

    level: int
    id: bytes
    place: int
    node: Node
    old: Node

    def new_ids(self) -> Iterator[bytes]:
        """Children that `old` does not have at the same number."""
        ids = self.node.ids
        if self.node.present == self.old.present:
            others = self.old.ids
            for start in range(0, len(ids), 16):
                if ids[start : start + 16] != others[start : start + 16]:
                    yield ids[start : start + 16]
            return
        before = _by_slot(self.old)
        for slot, one in _by_slot(self.node).items():
            if before.get(slot) != one:
                yield one


def new_nodes(blocks: Blocks, known: MapRef | None, ref: MapRef) -> Iterator[NewNode]:
    """The nodes of `ref` that `known` does not have at the same position and in the same place, a parent before its
    children. Equal nodes may lie in different blocks, when the same content was come to from two sides, and each map
    needs its own.

    After growing by two levels and more at once, all nodes count as new.
    """
    if not ref.root:
        return
    top = height(ref.size) - 1
    root, at, old = _lifted(blocks, known, top)
    if (root, at) == (ref.root, ref.place):
        return
    waiting = [(top, ref.root, ref.place, old)]
    while waiting:
        level, one, place, old = waiting.pop()
        node = blocks.node(place, level)
        yield NewNode(level, one, place, node, old)
        if not level:
            continue
        before = _by_slot(old)
        places = dict(zip(slots_of(old.present), old.places, strict=True))
        for position, slot in enumerate(slots_of(node.present)):
            child = node.ids[16 * position : 16 * position + 16]
            if (before.get(slot), places.get(slot)) != (child, node.places[position]):
                below = blocks.node(places[slot], level - 1) if slot in places else _EMPTY
                waiting.append((level - 1, child, node.places[position], below))


def _lifted(blocks: Blocks, known: MapRef | None, top: int) -> tuple[bytes, int, Node]:
    """(id, place, node) of `known` that covers what a root at level `top` covers; an imagined node has no id."""
    if known is None or not known.root:
        return b"", 0, _EMPTY
    level, root, place = height(known.size) - 1, known.root, known.place
    while level > top:
        node = blocks.node(place, level)
        if not node.present & 1:
            return b"", 0, _EMPTY
        root, place, level = node.ids[:16], node.places[0], level - 1
    if level == top:
        return root, place, blocks.node(place, level)
    return b"", 0, Node(1, root, (place,)) if level + 1 == top else _EMPTY
