"""What lives: every record that a recovery point needs.

Points of one disk are walked in the order of time, each beside the one before it, so what they share is passed over
and no set of visited nodes is needed. A mark is one bit for each record of the index's single run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from appliance.errors import StoreError
from appliance.model import MapRef, Point
from appliance.store.index import Index
from appliance.store.map import check_root, new_nodes
from appliance.store.node import OFFSET_BITS, block_record
from appliance.store.repository import Repository
from appliance.store.run import TAG, WHERE, Run

__all__ = ["Marks", "live_bytes", "mark_new"]


class Marks:
    """The set of live ids. Not thread-safe. 25 MB for 200 million records."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._bits = bytearray((run.count + 7) // 8)
        self._others: set[bytes] = set()  # of packs that came after the run was made
        self.points: set[tuple[str, str]] = set()
        self.last: dict[tuple[str, str], MapRef] = {}

    def add(self, record: bytes) -> None:
        if ordinals := self.run.ordinals(record):
            first = ordinals[0][0]
            self._bits[first >> 3] |= 1 << (first & 7)
        else:
            self._others.add(record)

    def lost(self, index: Index) -> int:
        """How many live records are nowhere."""
        return sum(index.find(record) is None for record in self._others)

    def __contains__(self, record: bytes) -> bool:
        if ordinals := self.run.ordinals(record):
            return self.at(ordinals[0][0])
        return record in self._others

    def at(self, ordinal: int) -> bool:
        """Of the first record with its id."""
        return bool(self._bits[ordinal >> 3] >> (ordinal & 7) & 1)


def mark_new(repo: Repository, marks: Marks, progress: Callable[[int, int], None] | None = None) -> None:
    """Mark what the points need that were not marked yet.

    Raises IntegrityError or VersionUnsupported when a point or a map cannot be read: what it needs is unknown then,
    and nothing may go.
    """
    while True:
        names = set(repo.point_ids())
        if names <= marks.points:
            return
        damaged: list[StoreError] = []
        points = repo.points(damaged=damaged)
        if damaged:
            raise damaged[0]
        fresh = [point for point in points if (point.domain_uuid, point.id) not in marks.points]
        for done, point in enumerate(fresh):
            _mark(repo, marks, point)
            if progress is not None:
                progress(done + 1, len(fresh))
        # Points that went while we looked need nothing; points that came are looked at in the next turn.
        marks.points |= names


def _mark(repo: Repository, marks: Marks, point: Point) -> None:
    for disk in point.disks:
        key = (point.domain_uuid, disk.disk)
        known = marks.last.get(key)
        last = -1
        check_root(disk.map, repo.blocks, repo.codec)
        for new in new_nodes(repo.blocks, known, disk.map):
            if (tag := new.place >> OFFSET_BITS) != last:
                last = tag
                marks.add(block_record(tag))
            if not new.level:
                for chunk in new.new_ids():
                    marks.add(chunk)
        marks.last[key] = disk.map


def live_bytes(marks: Marks, packs: Iterable[bytes], index: Index) -> dict[bytes, int]:
    """Live sealed bytes by pack. Of several copies one counts: none that is known to be damaged, and none in a
    condemned pack if there is another.
    """
    avoided = index.avoided
    by_tag = {pack[:TAG]: pack for pack in packs}
    found = dict.fromkeys(by_tag.values(), 0)
    ordinal = 0
    parts = max(1, marks.run.count // 250_000)
    for part in range(parts):
        for _, group in groupby(marks.run.records(part, parts), key=_id_of):
            copies = list(group)
            if marks.at(ordinal):
                places = [copy[-WHERE:] for copy in copies if index.usable(copy[:16], copy[-WHERE:])]
                if places:
                    best = min(places, key=lambda place: (place[:TAG] in avoided, place))
                    found[by_tag[best[:TAG]]] += int.from_bytes(best[TAG + 4 :], "big")
            ordinal += len(copies)
    return found


def _id_of(record: bytes) -> bytes:
    return record[:16]
