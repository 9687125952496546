"""A line to somewhere far away: a relay that lets through so many bits a second, each so many milliseconds late.

    with FarLine("127.0.0.1", 10809, mbit=100, ms=40) as line:
        connect to 127.0.0.1:line.port        as to the other port, by way of the line
        line.down, line.up                    bytes from and to the server so far

What it models: one line with a capacity in each direction, which all connections share, and half of `ms` in each
direction, so that a question and its answer take `ms` together. A sender waits when `_QUEUE` seconds of the line's work
lie before it, as at a router that has a buffer of that size.

What it does not: it ends TCP at both of its own sides, so nothing is lost, no window has to open and no connection
begins slowly, and a connection is accepted here before the server has been asked. A real line is slower by that, for
all who use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Self

__all__ = ["Direction", "FarLine"]

_PIECE = 16 << 10
_QUEUE = 0.05
# Pieces on the line of one connection: a receiver that does not read holds its sender back.
_UNDER_WAY = 512


class Direction:
    """One direction of a line. `rate` in bytes a second, `delay` in seconds, `now` a clock."""

    def __init__(self, rate: float, delay: float, now: Callable[[], float]) -> None:
        self._rate, self._delay, self._now = rate, delay, now
        self._free = 0.0  # when all that was taken has left
        self.bytes = 0

    def take(self, size: int) -> float:
        """When that many bytes arrive at the other end, which are put on the line now."""
        self._free = max(self._now(), self._free) + size / self._rate
        self.bytes += size
        return self._free + self._delay

    def wait(self) -> float:
        """Seconds until more may be put on it."""
        return max(0.0, self._free - self._now() - _QUEUE)


class FarLine:
    """Runs in a thread of its own until the context is left."""

    def __init__(self, host: str, port: int, *, mbit: float, ms: float) -> None:
        self._host, self._to = host, port
        self._loop = asyncio.new_event_loop()
        rate, delay = mbit * 1e6 / 8, ms / 2000
        self._down, self._up = (Direction(rate, delay, self._loop.time) for _ in range(2))
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0

    @property
    def down(self) -> int:
        return self._down.bytes

    @property
    def up(self) -> int:
        return self._up.bytes

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop
        ).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one side is gone; then both are."""
        with contextlib.closing(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._host, self._to)
            with contextlib.closing(far_writer):
                ways = [
                    asyncio.ensure_future(carry(reader, far_writer, self._up, self._loop.time)),
                    asyncio.ensure_future(carry(far_reader, writer, self._down, self._loop.time)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)


async def carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: Direction, now: Callable[[], float]
) -> None:
    """All that comes from `reader`, until it ends or `writer` is gone."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)
    arriving = asyncio.ensure_future(_arrive(under_way, writer, now))
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                await asyncio.sleep(line.wait())
                if arriving.done():
                    return
                await _put(under_way, (line.take(len(data)), data), arriving)
        await _put(under_way, (line.take(0), b""), arriving)
        await arriving
    finally:
        arriving.cancel()


async def _put(
    under_way: asyncio.Queue[tuple[float, bytes]], piece: tuple[float, bytes], arriving: asyncio.Future[None]
) -> None:
    """Unless nobody takes it any more."""
    putting = asyncio.ensure_future(under_way.put(piece))
    try:
        await asyncio.wait((putting, arriving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        putting.cancel()


async def _arrive(
    under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, now: Callable[[], float]
) -> None:
    with contextlib.suppress(OSError):
        while True:
            when, data = await under_way.get()
            await asyncio.sleep(max(0.0, when - now()))
            if not data:
                return
            writer.write(data)
            await writer.drain()
