"""A monitor by its QMP socket, and the only importer of qemu.qmp.

qemu.qmp is asyncio: one event loop in one daemon thread serves every connection of the process; each call here hands
a coroutine to it and waits. A Connection may be shared by threads; one command is under way at a time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from appliance.errors import ConnectError, DomainBusy, DomainLost, MonitorError

__all__ = ["Connection"]

# Whoever holds a monitor without end is somebody else, and waits are told sooner than people give up.
_CONNECT = 5.0
# A command that drains waits for I/O, at most for as long as a view may be away; after this QEMU is told to be stuck.
_REPLY = 120.0
# What the loop itself may need beyond its own deadline.
_GRACE = 5.0

T = TypeVar("T")
_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()


def _run(work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run the coroutine in the private loop, from any thread. The thread starts with the first use."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="qmp", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, _loop).result(timeout)


class Connection:
    """A Monitor on a Unix socket of QEMU or of a storage daemon. After DomainLost it stays useless; after DomainBusy
    too, but the command that was not answered in two minutes may still be carried out."""

    def __init__(self, path: Path, domain: str, *, storage_daemon: bool = False) -> None:
        """Raises ConnectError when nobody answers, DomainBusy when someone else holds the socket for 5 seconds: that
        one runs, and must never be taken for shut off."""
        self.domain = domain
        self.storage_daemon = storage_daemon
        self._lock = threading.Lock()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=1000)
        sock = socket.socket(socket.AF_UNIX)
        # Nobody else can hold the monitor of a storage daemon of ours: it only is slow to begin on a busy host.
        patience = 6 * _CONNECT if storage_daemon else _CONNECT
        try:
            _reach(sock, os.fspath(path), patience)
            peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self.peer: tuple[int, int, int] = struct.unpack("3i", peer)
            self._client = QMPClient(domain)
            _run(asyncio.wait_for(self._client.connect(sock), patience), patience + _GRACE)
        except (OSError, QMPError) as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise DomainBusy(
                    domain=domain, reason=f"someone else holds its monitor {path}, or it does not answer",
                    hint="a monitor serves one client: start QEMU with a second -qmp socket for rewind",
                ) from error  # fmt: skip
            raise ConnectError(uri=str(path), reason=str(error)) from error

    def execute(self, command: str, /, **arguments: Any) -> Any:
        return self._execute(command, -1, arguments)

    def execute_with_fd(self, command: str, fd: int, /, **arguments: Any) -> Any:
        return self._execute(command, fd, arguments)

    def _execute(self, command: str, fd: int, arguments: Mapping[str, Any]) -> Any:
        with self._lock:
            try:
                words = {k.replace("_", "-"): v for k, v in arguments.items()}
                return _run(asyncio.wait_for(self._issue(command, fd, words), _REPLY), _REPLY + _GRACE)
            except TimeoutError as error:
                # Not lost: a QEMU that is stuck still has its images open, and may yet do what it was told.
                self.close()
                raise DomainBusy(
                    domain=self.domain, reason=f"its QEMU has not answered {command} for {_REPLY:g} seconds",
                    hint="it waits for storage, or is stuck: look at its disks before ending it by force",
                ) from error  # fmt: skip
            except ExecuteError as error:
                raise MonitorError(domain=self.domain, command=command, reason=str(error)) from error
            except (QMPError, OSError, EOFError) as error:
                self.close()
                raise DomainLost(domain=self.domain, reason=f"{command}: {error}") from error

    async def _issue(self, command: str, fd: int, arguments: Mapping[str, Any]) -> Any:
        if fd >= 0:
            # The descriptor travels on the socket just before its command; nothing else is being sent meanwhile.
            self._client.send_fd_scm(fd)
        try:
            return await self._client.execute(command, dict(arguments))
        finally:
            self._events.extend(self._client.events.clear())

    def events(self) -> list[Mapping[str, Any]]:
        """Events that came since the last call, at most the newest 1000, as far as replies have been read."""
        with self._lock:
            taken = list(self._events)
            self._events.clear()
        return taken

    def close(self) -> None:
        with suppress(QMPError, OSError, EOFError):
            _run(asyncio.wait_for(self._client.disconnect(), 5), 5 + _GRACE)


def _reach(sock: socket.socket, path: str, patience: float) -> None:
    """Connect; a server with a full backlog would keep a blocking `connect` for ever. Raises TimeoutError, OSError."""
    sock.setblocking(False)
    limit = time.monotonic() + patience
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() > limit:
                raise TimeoutError(path) from None
            time.sleep(0.05)
