"""What a revert has still to fetch, and who reads it first.

    restore writes the indexes of the pending chunks ─► file ─► view ─► Touches
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Touches", "read_pending", "write_pending"]

# Pending neighbours of a touched chunk: before it, after it, and not farther away than this (in chunks).
_BEFORE, _AFTER, _NEAR = 2, 6, 64


class Touches:
    """Which pending chunks have been read. Not thread-safe.

    A revert has two readers on one connection, which cannot be told apart: the job that fetches every pending chunk in
    ascending order, and the guest. A chunk that is the next untouched one for the job counts as the job's.
    """

    def __init__(self, indexes: Iterable[int]) -> None:
        self._indexes = array("Q", indexes)
        self._touched = bytearray(len(self._indexes))
        self._cursor = 0

    def __len__(self) -> int:
        return len(self._indexes)

    def touch(self, index: int) -> bool | None:
        """None if it is not pending or was touched before; else whether it was touched ahead of the sweep."""
        place = bisect_left(self._indexes, index)
        if place == len(self._indexes) or self._indexes[place] != index or self._touched[place]:
            return None
        self._cursor = self._touched.find(0, self._cursor)
        self._touched[place] = 1
        return place != self._cursor

    def following(self, index: int, count: int) -> list[int]:
        """The next untouched ones after a chunk."""
        found: list[int] = []
        place = self._touched.find(0, bisect_left(self._indexes, index + 1))
        while place >= 0 and len(found) < count:
            found.append(self._indexes[place])
            place = self._touched.find(0, place + 1)
        return found

    def neighbours(self, index: int) -> list[int]:
        """Untouched ones close to a chunk, the following first."""
        place = bisect_left(self._indexes, index)
        after = range(place + 1, min(len(self._indexes), place + 1 + _AFTER))
        before = range(place - 1, max(-1, place - 1 - _BEFORE), -1)
        near = [at for at in (*after, *before) if abs(self._indexes[at] - index) <= _NEAR]
        return [self._indexes[at] for at in near if not self._touched[at]]


def write_pending(path: Path, indexes: Iterable[int]) -> None:
    """Keep ascending chunk indexes for a view in another process: 8 bytes each."""
    values = array("Q", indexes)
    path.write_bytes(values.tobytes())


def read_pending(path: Path) -> array[int]:
    """What `write_pending` kept. OSError and ValueError (not whole) pass through."""
    values = array("Q")
    values.frombytes(path.read_bytes())
    return values
