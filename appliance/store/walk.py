"""Walks the maps of points and finds what is not there, for `check`: by place, since equal nodes may lie in several.

Each node must hash to its id, and each chunk must be in a pack that counts as good. What the index and the packs are
worth has been found out before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from appliance.errors import IntegrityError
from appliance.model import Point
from appliance.store.node import NODE_VERSION, OFFSET_BITS, Blocks, Node, block_record, height
from appliance.store.repository import Repository

__all__ = ["Bad", "walk"]

# Nodes remembered as good: beyond this all are forgotten and looked at again, which costs time and bounds memory.
_REMEMBERED: Final = 2_000_000


@dataclass(frozen=True, slots=True)
class Bad:
    """Something a point needs that is not there: a chunk, a block, or a node that is not what its parent says."""

    kind: str
    record: bytes


def walk(repo: Repository, points: list[Point], step: Callable[[str, int, int], None]) -> dict[Bad, set[str]]:
    """What is missing, and for which points."""
    walker = _Walker(repo)
    found: dict[Bad, set[str]] = defaultdict(set)
    for done, point in enumerate(points):
        for disk in point.disks:
            if disk.map.root:
                for one in walker.visit(height(disk.map.size) - 1, disk.map.root, disk.map.place):
                    found[one].add(point.id)
        step("walk", done + 1, len(points))
    return found


class _Walker:
    """Walks maps with a cache of its own, so that what was read before the damage does not hide it. What is below a
    node is looked at once: by place, because another copy of an equal node may be the one that is damaged.
    """

    def __init__(self, repo: Repository) -> None:
        self._codec = repo.codec
        self._index = repo.index
        self._blocks = Blocks(repo.reader.block)
        self._good: set[int] = set()
        self._bad: dict[int, frozenset[Bad]] = {}

    def visit(self, level: int, node_id: bytes, place: int) -> frozenset[Bad]:
        if place in self._good:
            return frozenset()
        if place in self._bad:
            return self._bad[place]
        found = self._below(level, node_id, place)
        if found:
            self._bad[place] = found
        elif level:
            self._good.add(place)
            if len(self._good) > _REMEMBERED:
                self._good.clear()
        return found

    def _below(self, level: int, node_id: bytes, place: int) -> frozenset[Bad]:
        record = block_record(place >> OFFSET_BITS)
        if self._index.find(record) is None:
            return frozenset([Bad("missing-block", record)])
        try:
            node = self._blocks.node(place, level)
        except IntegrityError:
            return frozenset([Bad("missing-block", record)])
        if self._codec.node_id(_hashed(level, node)) != node_id:
            return frozenset([Bad("damaged-node", node_id)])
        ids = [node.ids[start : start + 16] for start in range(0, len(node.ids), 16)]
        if not level:
            return frozenset(Bad("missing-chunk", one) for one in ids if self._index.find(one) is None)
        below = (self.visit(level - 1, one, at) for one, at in zip(ids, node.places, strict=True))
        return frozenset().union(*below)


def _hashed(level: int, node: Node) -> bytes:
    return bytes((level, NODE_VERSION, node.present & 255, node.present >> 8)) + node.ids
