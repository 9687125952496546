"""Which blocks of maps to read together with one that is asked for.

A walk over a map goes through the blocks in the order they were written, so when a block is asked for that follows the
last one read from its pack, the next will be too: 2, 4, … 16 are then taken in one request. Random lookups read what
they need and no more. Measured: a diff of two maps of a TiB spends half its time on requests without this.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from appliance.store.pack import BLOCK, Entry

__all__ = ["Ahead"]

_MOST: Final = 16
# A walk may skip some of the blocks, and still is one.
_SKIP: Final = 64 << 10
_PACKS: Final = 64
_TABLES: Final = 16


class Ahead:
    """Thread-safe; `_lock` guards both tables, of which the oldest entries are forgotten."""

    def __init__(self, table: Callable[[bytes], list[Entry]]) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._last: dict[bytes, tuple[int, int]] = {}  # pack -> (end of the last read, blocks it had)
        self._tables: dict[bytes, list[Entry]] = {}

    def entries(self, pack: bytes, offset: int, length: int) -> list[Entry]:
        """The block at that place and those to read with it; empty when it should be read alone."""
        with self._lock:
            end, window = self._last.pop(pack, (-_SKIP - 1, 0))
            window = min(2 * window, _MOST) if 0 <= offset - end <= _SKIP else 1
            self._last[pack] = offset + length, window
            if len(self._last) > _PACKS:
                del self._last[next(iter(self._last))]
            table = self._tables.get(pack)
        if window == 1:
            return []
        if table is None:
            table = self._table(pack)
            with self._lock:
                self._tables[pack] = table
                if len(self._tables) > _TABLES:
                    del self._tables[next(iter(self._tables))]
        start = bisect_left(table, offset, key=lambda entry: entry.offset)
        found = []
        for entry in table[start : start + window]:
            if entry.kind != BLOCK:
                break
            found.append(entry)
        if found:
            with self._lock:
                self._last[pack] = found[-1].offset + found[-1].length, window
        return found
