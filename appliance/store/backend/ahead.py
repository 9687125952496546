"""Ranges that follow each other become few large requests: for places where every request is a round trip.

A disk that is read from its beginning asks for one small range of a pack after the other, nearly in order. As long as
a request begins where an earlier one ended, or a little behind it, what comes next is fetched with it: twice as much
each time, up to LONGEST. A request that fits nowhere is fetched as it is, so scattered reads cost what they cost.

    asked      |a|b|   c|d| …          each letter a request of the caller
    fetched    |a|b------|c---- …      each bar a request to the place: c was there already, d grows the window

What is under way counts as there: who asks for it meanwhile waits for that request instead of sending another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from appliance.store.backend.base import Backend
from appliance.store.backend.wrap import Wrapper

__all__ = ["ReadingAhead"]

# At 30 ms a request and 2 MiB each one stream reads 60 MiB/s, and twice that when the next window is on its way.
LONGEST: Final = 2 << 20
SHORTEST: Final = 256 << 10
# Several threads write a pack, so what adjoins on the disk lies a few chunks apart in it.
NEAR: Final = 256 << 10
MEMORY: Final = 32 << 20
# More would take scattered reads for a stream more often; less would lose streams that share a pack.
WINDOWS: Final = 8


@dataclass(eq=False, slots=True)
class _Window:
    """Bytes `start` to `end` of an object; `data` None while they are on their way, or when that has failed.

    `ended`: the object ends within it. `done` is set last.
    """

    name: str
    start: int
    end: int
    data: bytes | None = None
    ended: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def size(self) -> int:
        return self.end - self.start

    def has(self, offset: int) -> bool:
        return self.start <= offset and (offset < self.end or self.ended)

    def leads_to(self, offset: int) -> bool:
        """Whether a request at `offset` goes on where this window ends."""
        return self.end <= offset <= self.end + NEAR


class ReadingAhead(Wrapper):
    """Keeps at most `memory` bytes of recent windows. Objects never change, so what is kept is right; it may outlive
    an object that somebody else deletes meanwhile.

    Thread-safe: `_lock` guards the windows and is never held during a request.
    """

    def __init__(self, inner: Backend, memory: int = MEMORY) -> None:
        super().__init__(inner)
        self._memory = memory
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, list[_Window]] = OrderedDict()  # by object, least recently used first
        self._held = 0

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length is None or not 0 < length <= LONGEST:
            return self.inner.get(name, offset, length)
        pieces: list[bytes] = []
        end = offset + length
        while offset < end:
            window = self._window(name, offset, end)
            if window.data is None:
                continue  # somebody else's request has failed: ask ourselves
            pieces.append(window.data[offset - window.start : end - window.start])
            offset += len(pieces[-1])
            if window.ended and offset >= window.end:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def delete(self, name: str) -> None:
        with self._lock:
            for window in list(self._windows.get(name, ())):
                self._remove(window)
        self.inner.delete(name)

    def _window(self, name: str, start: int, end: int) -> _Window:
        """The window that has the byte at `start`, if the object has it, and perhaps all to `end`."""
        with self._lock:
            windows = self._windows.setdefault(name, [])
            self._windows.move_to_end(name)
            window = next((one for one in reversed(windows) if one.has(start)), None)
            if ours := window is None:
                window = _next(name, windows, start, end)
                windows.append(window)
                if len(windows) > WINDOWS:
                    self._remove(windows[0])
        if ours:
            self._fetch(window)
        else:
            window.done.wait()
        return window

    def _fetch(self, window: _Window) -> None:
        try:
            data = self.inner.get(window.name, window.start, window.size())
        except BaseException:  # whatever it is: others wait for this window
            with self._lock:
                self._remove(window)
            window.done.set()
            raise
        with self._lock:
            window.ended = len(data) < window.size()
            window.end = window.start + len(data) if window.ended else window.end
            window.data = data
            if window in self._windows.get(window.name, ()):
                self._held += len(data)
                self._shrink(window)
        window.done.set()

    def _shrink(self, keep: _Window) -> None:
        """Drop the oldest windows of the objects that were not asked for the longest; called with the lock held."""
        for windows in list(self._windows.values()):
            for window in list(windows):
                if self._held <= self._memory:
                    return
                if window.data is not None and window is not keep:
                    self._remove(window)

    def _remove(self, window: _Window) -> None:
        """Forget it, if it is still known; who waits for it or reads it goes on. Called with the lock held."""
        windows = self._windows.get(window.name, [])
        if window in windows:
            windows.remove(window)
            self._held -= len(window.data or b"")
        if not windows:
            self._windows.pop(window.name, None)


def _next(name: str, windows: list[_Window], start: int, end: int) -> _Window:
    """A window for `start` to `end` and what may come next; never over what another one has."""
    before = [one for one in windows if one.leads_to(start)]
    if before:
        size = min(max(2 * max(one.size() for one in before), SHORTEST), LONGEST)
        nearest = max(one.end for one in before)
        if nearest + size >= end:
            start = nearest  # what was passed over is asked for soon
        end = max(end, start + size)
    return _Window(name, start, min([end, *(one.start for one in windows if one.start > start)]))
