"""Backends around a backend: each adds one thing and passes the rest through, so they stack in any order.

Retrying    asks again, with growing pauses, where the answer was Temporary
Limited     at most so many bytes a second
Counting    how many requests and bytes went through
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from appliance.errors import AlreadyExists, ObjectNotFound, Temporary
from appliance.store.backend.base import Backend, Buffer, Capabilities, ObjectInfo

__all__ = ["Counting", "Counts", "Limited", "Retrying", "Wrapper"]

_T = TypeVar("_T")

# Pauses of 0.1, 0.2, … 8 s: 21 s in all, enough for a gateway that is restarted, and an admin is still there to see
# the error. Each is cut at random by up to half, so that many appliances do not come back in step.
RETRY_ATTEMPTS: Final = 9
RETRY_FIRST_SECONDS: Final = 0.1
RETRY_LONGEST_SECONDS: Final = 8.0


class Wrapper:
    """Passes every call through."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return self.inner.url

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.get(name, offset, length)

    def put(self, name: str, data: Buffer) -> None:
        self.inner.put(name, data)

    def delete(self, name: str) -> None:
        self.inner.delete(name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def stat(self, name: str) -> ObjectInfo:
        return self.inner.stat(name)

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def close(self) -> None:
        self.inner.close()


class Retrying(Wrapper):
    """Repeats what failed with Temporary, and only that; the last failure is passed on.

    A put that meets an object of exactly its own content succeeds: that object is there as wanted, which is all that
    put promises. It is what remains of an earlier try whose answer was lost, or of one that a proxy sent twice. So two
    writers that must not both believe they were first (a lock, a commit) put something of their own into the object.

    Thread-safe, without state.
    """

    def __init__(
        self, inner: Backend, attempts: int = RETRY_ATTEMPTS, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(inner)
        self._attempts = attempts
        self._sleep = sleep

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._retried(lambda: self.inner.get(name, offset, length))

    def put(self, name: str, data: Buffer) -> None:
        def attempt() -> None:
            try:
                self.inner.put(name, data)
            except AlreadyExists:
                if not self._holds(name, data):
                    raise

        self._retried(attempt)

    def delete(self, name: str) -> None:
        self._retried(lambda: self.inner.delete(name))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """A listing that breaks off goes on after the last name that was seen: names ascend."""
        last = ""
        failures = 0
        while True:
            try:
                for info in self.inner.list(prefix):
                    if info.name > last:
                        last, failures = info.name, 0
                        yield info
            except Temporary:
                failures += 1
                if failures == self._attempts:
                    raise
                self._pause(failures)
            else:
                return

    def stat(self, name: str) -> ObjectInfo:
        return self._retried(lambda: self.inner.stat(name))

    def _retried(self, call: Callable[[], _T]) -> _T:
        for failures in range(1, self._attempts):
            try:
                return call()
            except Temporary:
                self._pause(failures)
        return call()

    def _pause(self, failures: int) -> None:
        pause = min(RETRY_FIRST_SECONDS * 2.0 ** (failures - 1), RETRY_LONGEST_SECONDS)
        self._sleep(pause * random.uniform(0.5, 1.0))

    def _holds(self, name: str, data: Buffer) -> bool:
        """Whether the object has that content. One that is gone again is not ours to explain: false."""
        view = memoryview(data).cast("B")
        try:
            return self.inner.stat(name).size == len(view) and self.inner.get(name) == view
        except ObjectNotFound:
            return False


class Limited(Wrapper):
    """At most `rate` bytes a second, both directions together, on average over a second. Thread-safe."""

    def __init__(self, inner: Backend, rate: float, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(inner)
        self._rate = rate
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.inner.get(name, offset, length)
        self._spend(len(data))
        return data

    def put(self, name: str, data: Buffer) -> None:
        self._spend(memoryview(data).nbytes)
        self.inner.put(name, data)

    def _spend(self, size: int) -> None:
        """Queue behind everything spent before; a second of silence is not saved up for a burst."""
        with self._lock:
            now = time.monotonic()
            pause = max(self._free_at - now, 0.0)
            self._free_at = now + pause + size / self._rate
        if pause:
            self._sleep(pause)


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests by kind, and bytes that went each way. A listing counts as one request, however long."""

    gets: int = 0
    puts: int = 0
    deletes: int = 0
    lists: int = 0
    stats: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def requests(self) -> int:
        return self.gets + self.puts + self.deletes + self.lists + self.stats


class Counting(Wrapper):
    """Counts attempts, so also those that fail; bytes only of those that succeed. Thread-safe."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """A snapshot."""
        return self._counts

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._add(gets=1)
        data = self.inner.get(name, offset, length)
        self._add(bytes_read=len(data))
        return data

    def put(self, name: str, data: Buffer) -> None:
        self._add(puts=1)
        self.inner.put(name, data)
        self._add(bytes_written=memoryview(data).nbytes)

    def delete(self, name: str) -> None:
        self._add(deletes=1)
        self.inner.delete(name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._add(lists=1)
        return self.inner.list(prefix)

    def stat(self, name: str) -> ObjectInfo:
        self._add(stats=1)
        return self.inner.stat(name)

    def _add(self, **more: int) -> None:
        with self._lock:
            self._counts = replace(self._counts, **{key: getattr(self._counts, key) + n for key, n in more.items()})
