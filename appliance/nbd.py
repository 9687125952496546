"""A small typed client for NBD servers on unix sockets: the only importer of libnbd.

Requests of any length are cut to what the server accepts. Every call is synchronous and lets other threads run while
it waits; calls on one Connection are served one after the other, so open one for each worker. `pread` goes through
libnbd's synchronous call on purpose: `nbd.Buffer` of libnbd 1.14 leaks when one is made for each request.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import nbd  # libnbd's binding of the distribution; the package of that name on PyPI is something else

from appliance.errors import ConnectError, NbdFailed
from appliance.extents import Extent, merge

__all__ = ["ALLOCATION", "Connection", "connect", "connect_when_ready", "exports"]

ALLOCATION = "base:allocation"

_STATE_ZERO = 2
# The protocol lets a client send 32 MiB where the server names no limit of its own.
_MAX_REQUEST = 32 << 20
# Requests without data are limited by a 32-bit length only; the last 64 KiB keep them aligned.
_MAX_RANGE = (1 << 32) - (64 << 10)


class Connection:
    """One connection to one export. Any thread may use it. Raises NbdFailed, which keeps the server's errno."""

    def __init__(self, handle: Any, export: str) -> None:
        self._handle = handle
        self.export = export
        self._limit = min(handle.get_block_size(nbd.SIZE_MAXIMUM) or _MAX_REQUEST, _MAX_REQUEST)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def size(self) -> int:
        """Bytes of the export."""
        size: int = self._handle.get_size()
        return size

    def read_only(self) -> bool:
        return bool(self._handle.is_read_only())

    def has(self, context: str) -> bool:
        """Whether the server tells that kind of metadata."""
        return bool(self._handle.can_meta_context(context))

    def block_sizes(self) -> tuple[int, int, int]:
        """Minimum, preferred, maximum request in bytes; 0 where the server names none."""
        kinds = (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
        low, preferred, high = (int(self._handle.get_block_size(kind)) for kind in kinds)
        return low, preferred, high

    def pread(self, length: int, offset: int) -> bytes | bytearray:
        """Exactly `length` bytes from `offset`."""
        if 0 < length <= self._limit:
            data: bytearray = self._call("read", offset, length, self._handle.pread, length, offset)
            return data
        return b"".join(self.pread(part, at) for at, part in _pieces(offset, length, self._limit))

    def pwrite(self, data: bytes | bytearray, offset: int) -> None:
        """Write all of it. After an error any part of it may have been written."""
        if 0 < len(data) <= self._limit:
            self._call("write", offset, len(data), self._handle.pwrite, data, offset)
            return
        for at, part in _pieces(offset, len(data), self._limit):
            self.pwrite(data[at - offset : at - offset + part], at)

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes, without sending them if the server can do that."""
        if not self._handle.can_zero():
            for at, part in _pieces(offset, length, 1 << 20):
                self.pwrite(bytes(part), at)
            return
        for at, part in _pieces(offset, length, _MAX_RANGE):
            self._call("zero", at, part, self._handle.zero, part, at)

    def trim(self, length: int, offset: int) -> None:
        """Tell that the content is of no use any more; nothing happens if the server cannot do that."""
        if self._handle.can_trim():
            for at, part in _pieces(offset, length, _MAX_RANGE):
                self._call("trim", at, part, self._handle.trim, part, at)

    def flush(self) -> None:
        """Everything written so far is durable when it returns."""
        if self._handle.can_flush():
            self._call("flush", 0, 0, self._handle.flush)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What of the range is data and what is known to read as zeroes; all data if the server does not tell."""
        found = (
            Extent(at, part, bool(flags & _STATE_ZERO)) for at, part, flags in self.states(offset, length, ALLOCATION)
        )
        return list(merge(found))

    def states(self, offset: int, length: int, context: str) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) that cover the range in order; one of flags 0 if the server has no such context.

        A server may tell less than it was asked for, and its last entry may go beyond: both are allowed for.
        """
        if not self.has(context):
            yield from [(offset, length, 0)] if length else []
            return
        end = offset + length
        while offset < end:
            for part, flags in self._entries(offset, min(end - offset, _MAX_RANGE), context):
                part = min(part, end - offset)
                if part:
                    yield offset, part, flags
                offset += part

    def close(self) -> None:
        """Say good-bye to the server; never raises. May be repeated."""
        handle, self._handle = self._handle, None
        if handle is not None:
            try:
                handle.shutdown()
            except nbd.Error:
                pass  # the server went first

    def _entries(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        found: list[int] = []

        def keep(name: str, _offset: int, entries: list[int], _error: Any) -> int:
            if name == context:
                found.extend(entries)
            return 0

        self._call("block status", offset, length, self._handle.block_status, length, offset, keep)
        if not found or found[0] == 0:
            raise NbdFailed(
                operation="block status", export=self.export, length=length, offset=offset, errno=errno.EPROTO,
                reason="the server told nothing",
            )  # fmt: skip
        return list(zip(found[::2], found[1::2], strict=True))

    def _call(self, operation: str, offset: int, length: int, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except nbd.Error as error:
            raise NbdFailed(
                operation=operation, export=self.export, length=length, offset=offset,
                errno=error.errnum or errno.EIO, reason=error.string,
            ) from error  # fmt: skip


def connect(socket: Path | str, export: str = "", contexts: Iterable[str] = (ALLOCATION,)) -> Connection:
    """Connect to an export of the server on a unix socket. Raises ConnectError; no connection is left then."""
    handle = nbd.NBD()
    try:
        handle.set_export_name(export)
        for context in contexts:
            handle.add_meta_context(context)
        handle.connect_unix(str(socket))
    except nbd.Error as error:
        raise ConnectError(uri=f"nbd+unix:///{export}?socket={socket}", reason=error.string) from error
    return Connection(handle, export)


def connect_when_ready(socket: Path | str, alive: Callable[[], bool], timeout: float = 10.0) -> Connection:
    """Connect to the default export of a server that was just started: its socket is there before it listens.

    Raises ConnectError when it is not `alive` any more, or not ready after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return connect(socket)
        except ConnectError:
            if not alive() or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def exports(socket: Path | str) -> list[str]:
    """Names of the exports that the server on a unix socket lists. Raises ConnectError."""
    handle = nbd.NBD()
    names: list[str] = []
    try:
        handle.set_opt_mode(True)
        handle.connect_unix(str(socket))
        handle.opt_list(lambda name, _description: names.append(name))
        handle.opt_abort()
    except nbd.Error as error:
        raise ConnectError(uri=f"nbd+unix:///?socket={socket}", reason=error.string) from error
    return names


def _pieces(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive pieces no longer than `most`."""
    end = offset + length
    while offset < end:
        part = min(most, end - offset)
        yield offset, part
        offset += part
