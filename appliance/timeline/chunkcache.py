"""The chunks that were opened last, loaded once however many threads want them, and ahead of those who will.

A chunk counts as on its way from the moment it is queued: marked only when its load begins, readers would load it a
second time and four threads would be no faster than two. A reader does not stand in the pool's queue: what nobody has
begun yet he loads himself.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from appliance.units import CHUNK, MiB

__all__ = ["AHEAD", "CACHE", "ChunkCache"]

CACHE = 64 * MiB
# Threads that load ahead, and how far ahead of a reader in order that is of use, where packs are slow.
AHEAD = 16
# A load takes some 0.1 ms of CPU; above this the time is spent waiting for packs.
_SLOW = 0.0015
# Loads that are looked at to tell whether packs are slow: their median, since one load may wait for a busy CPU.
_RECENT = 15


class _Load:
    """`under_way` is held until the load is done: as good as an Event here, and made in a tenth of the time."""

    __slots__ = ("claimed", "data", "error", "under_way")

    def __init__(self, claimed: bool) -> None:
        self.claimed = claimed
        self.under_way = threading.Lock()
        self.under_way.acquire()
        self.data = b""
        self.error: BaseException | None = None


class ChunkCache:
    """The chunks of one repository that were opened last, up to `capacity` bytes. Any thread may call everything;
    `_lock` guards all fields."""

    def __init__(self, read: Callable[[bytes], bytes], capacity: int = CACHE) -> None:
        self._read = read
        self._most = max(1, capacity // CHUNK)
        self._lock = threading.Lock()
        self._opened: OrderedDict[bytes, bytes] = OrderedDict()
        self._loading: dict[bytes, _Load] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._took: deque[float] = deque(maxlen=_RECENT)
        self._begun = 0
        self._running = 0
        self.slow = False  # whether packs answer slowly, by the last loads
        self.hits = 0
        self.loads = 0
        self.ahead = 0

    def get(self, chunk: bytes) -> bytes:
        """The content of a chunk. Raises what the repository raises; another call tries again."""
        with self._lock:
            found = self._opened.get(chunk)
            if found is not None:
                self._opened.move_to_end(chunk)
                self.hits += 1
                return found
            load = self._loading.get(chunk)
            if load is None:
                load = self._loading[chunk] = _Load(claimed=False)
            mine, load.claimed = not load.claimed, True
        if mine:  # also one that is queued, but that no thread of the pool has begun
            self._run(chunk, load)
        with load.under_way:
            pass
        if load.error is not None:
            raise load.error
        return load.data

    def prefetch(self, chunks: Iterable[bytes]) -> None:
        """Load these in the background, as far as the pool has room. Errors come up when somebody wants the chunk."""
        for chunk in chunks:
            with self._lock:
                if chunk in self._opened or chunk in self._loading:
                    continue
                if len(self._loading) >= 4 * AHEAD:
                    return
                load = self._loading[chunk] = _Load(claimed=False)
                self.ahead += 1
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(AHEAD, "ahead")
                pool = self._pool
            pool.submit(self._run_queued, chunk, load)

    def close(self) -> None:
        """Wait for loads that are under way. Nothing may be asked for afterwards."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _run_queued(self, chunk: bytes, load: _Load) -> None:
        with self._lock:
            mine, load.claimed = not load.claimed, True
        if mine:
            self._run(chunk, load)

    def _run(self, chunk: bytes, load: _Load) -> None:
        with self._lock:
            self._begun += 1
            number, alone = self._begun, self._running == 0
            self._running += 1
        begun = time.monotonic()
        try:
            load.data = self._read(chunk)
        except BaseException as error:  # noqa: BLE001 -- raised by every thread that waits for this chunk
            load.error = error
        took = time.monotonic() - begun
        with self._lock:
            self._running -= 1
            del self._loading[chunk]
            if load.error is None:
                self.loads += 1
                if alone and number == self._begun:
                    self._note(took)
                self._opened[chunk] = load.data
                while len(self._opened) > self._most:
                    self._opened.popitem(last=False)
        load.under_way.release()

    def _note(self, took: float) -> None:
        """How long a load took that was alone: among several, most of the time may have been spent waiting for a CPU,
        and a client that wants several at once needs nothing ahead."""
        self._took.append(took)
        self.slow = len(self._took) > 2 and sorted(self._took)[len(self._took) // 2] > _SLOW
