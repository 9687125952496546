"""Any instant as a disk: bytes and extents of a map.

    pread ─► map ─► id ─► ChunkCache ─► opened chunk ─► copy

Ahead of the reader are loaded: what follows, where a client reads in order and packs are slow (16 chunks; none while
they answer within about a millisecond, since then it only costs CPU); and, in a revert, the pending neighbours of a
pending chunk that the guest touched.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.extents import Extent, merge
from appliance.model import MapRef
from appliance.timeline.chunkcache import AHEAD, CACHE, ChunkCache
from appliance.timeline.pending import Touches, read_pending, write_pending
from appliance.units import CHUNK, chunks_of

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["CACHE", "ChunkCache", "DiskView", "ViewStats", "read_pending", "write_pending"]

# Readers at different places of one disk that are followed.
_STREAMS = 16
# Extents are told for at most so many data chunks at once: 1 GiB, some 30 ms.
_MOST_ITEMS = 16384

_ZEROES = memoryview(bytes(CHUNK))


@dataclass(slots=True)
class ViewStats:
    """Of one disk since it was opened: bytes given out, read requests; pending chunks in all, touched so far, and
    touched by somebody before the sweep that fetches them in order had come there."""

    bytes: int = 0
    requests: int = 0
    pending: int = 0
    touched: int = 0
    touched_first: int = 0


class DiskView:
    """One disk as of one instant, read-only. Any thread may call everything; `_lock` guards streams, touches, stats.

    Raises what the repository raises: IntegrityError for a damaged chunk, ObjectNotFound for a lost one. Other chunks
    stay readable then.
    """

    def __init__(self, repo: Repository, ref: MapRef, cache: ChunkCache | int = CACHE) -> None:
        """Disks of one process share a ChunkCache; given a number of bytes, the view has its own."""
        self.size = ref.size
        self._map = repo.map(ref)
        self._own_cache = not isinstance(cache, ChunkCache)
        self._cache = cache if isinstance(cache, ChunkCache) else ChunkCache(repo.read_chunk, cache)
        self._lock = threading.Lock()
        self._stats = ViewStats()
        self._touches: Touches | None = None
        # Last chunk read -> first chunk not asked for ahead, of each reader; the one that moved last is last.
        self._streams: OrderedDict[int, int] = OrderedDict()

    def stats(self) -> ViewStats:
        """A snapshot."""
        with self._lock:
            own = self._stats
            return ViewStats(own.bytes, own.requests, own.pending, own.touched, own.touched_first)

    def set_pending(self, indexes: Iterable[int]) -> None:
        """These chunks, ascending, are what a revert still has to fetch."""
        touches = Touches(indexes)
        with self._lock:
            self._touches = touches
            self._stats.pending = len(touches)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises ValueError beyond the end."""
        found = bytearray(length)
        self.readinto(memoryview(found), offset)
        return bytes(found)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from `offset`. Raises ValueError beyond the end."""
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise ValueError(f"{len(buffer)} bytes at {offset} are beyond the end of a disk of {self.size} bytes")
        self._look_ahead(range(offset // CHUNK, chunks_of(end)))
        at = offset
        while at < end:
            index, start = divmod(at, CHUNK)
            stop = min(CHUNK, start + end - at)
            chunk = self._map.get(index)
            content = memoryview(self._cache.get(chunk)) if chunk else _ZEROES
            buffer[at - offset : at - offset + stop - start] = content[start:stop]
            at += stop - start
        with self._lock:
            self._stats.bytes += len(buffer)
            self._stats.requests += 1

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What of the range is data and what is zero, from `offset` on without a hole in the list. Of a long range
        only the beginning may be told: go on where the last one ends."""
        return list(merge(self._pieces(offset, min(offset + length, self.size))))

    def first_extent(self, offset: int, length: int) -> Extent:
        """The first of `extents`, cheaper. Raises ValueError for nothing."""
        for extent in merge(self._pieces(offset, min(offset + length, self.size))):
            return extent
        raise ValueError(f"no bytes at {offset}")

    def close(self) -> None:
        """Let go of the cache if it is our own."""
        if self._own_cache:
            self._cache.close()

    def _pieces(self, offset: int, end: int) -> Iterator[Extent]:
        at = offset
        items = self._map.items(offset // CHUNK, chunks_of(end)) if offset < end else ()
        for count, (index, _) in enumerate(items):
            low, high = max(index * CHUNK, offset), min((index + 1) * CHUNK, end)
            if at < low:
                yield Extent(at, low - at, zero=True)
            yield Extent(low, high - low)
            at = high
            if count == _MOST_ITEMS:
                return
        if at < end:
            yield Extent(at, end - at, zero=True)

    def _look_ahead(self, wanted: range) -> None:
        slow = self._cache.slow
        with self._lock:
            coming = self._touched(wanted, slow) + self._sequential(wanted, slow)
        if slow and len(wanted) > 1:
            coming = [*wanted, *coming]
        if coming:
            self._cache.prefetch(chunk for chunk in map(self._map.get, coming) if chunk)

    def _touched(self, wanted: range, slow: bool) -> list[int]:
        """Note that pending chunks are read; what to load on their account."""
        coming: list[int] = []
        if self._touches is None:
            return coming
        for index in wanted:
            first = self._touches.touch(index)
            if first is None:
                continue
            self._stats.touched += 1
            if first:
                self._stats.touched_first += 1
                coming += self._touches.neighbours(index)
            elif slow:
                coming += self._touches.following(index, AHEAD)
        return [index for index in coming if index not in wanted]

    def _sequential(self, wanted: range, slow: bool) -> list[int]:
        """Note where a reader is; what it will want next if packs are slow and it goes on in order."""
        if not wanted or wanted[-1] in self._streams and len(wanted) == 1:
            return []  # still in the chunk that it was in before
        last = wanted[-1]
        known = self._streams.pop(wanted[0], None) or self._streams.pop(wanted[0] - 1, None)
        asked = max(known or 0, last + 1)
        stop = min(last + 1 + AHEAD, chunks_of(self.size))
        in_order = known is not None and slow and self._touches is None
        self._streams[last] = max(asked, stop) if in_order else asked
        while len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        return list(range(asked, stop)) if in_order else []
