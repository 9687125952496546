"""The driver for one bare QEMU by its QMP socket, and the only importer of qemu.qmp.

    qmp:///path/to/monitor.sock?name=NAME[&uuid=UUID][&disk=TARGET:FORMAT:PATH …]

`disk` says what the domain's disks are while it is shut off, when nobody can be asked. A monitor socket serves one
client: while we are connected nobody else is, so a QEMU that a person also wants to talk to needs a second one.

qemu.qmp is asyncio: one event loop in one daemon thread serves every connection of the process; each call here hands
a coroutine to it and waits. A Connection may be shared by threads; one command is under way at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from qemu.qmp import ExecuteError, QMPClient, QMPError

from appliance.errors import (
    AgentUnavailable,
    ConfigError,
    ConnectError,
    DomainBusy,
    DomainLost,
    DomainNotFound,
    MonitorError,
    NotSupported,
)
from appliance.hypervisor import storage_daemon
from appliance.hypervisor.base import Disk, DomainState, Monitor, QemuProcess
from appliance.hypervisor.graph.survey import survey

__all__ = ["Connection", "QmpDomain", "QmpHypervisor"]

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


class QmpDomain:
    """One QEMU. It cannot be started from here: whoever started it knows its command line."""

    def __init__(self, uri: str, socket_path: Path, options: Mapping[str, Sequence[str]]) -> None:
        self.uri = uri
        self.name = options.get("name", [socket_path.stem])[0]
        self._socket = socket_path
        self._connection: Connection | None = None
        self._offline_disks = [_parse_disk(text) for text in options.get("disk", ())]
        self.uuid = options.get("uuid", [str(uuid.uuid5(uuid.NAMESPACE_URL, f"qmp://{socket_path}"))])[0]

    def state(self) -> DomainState:
        try:
            running = self.monitor().execute("query-status")["running"]
        except DomainLost:
            return DomainState.SHUTOFF
        return DomainState.RUNNING if running else DomainState.PAUSED

    def disks(self) -> Sequence[Disk]:
        if self.state() is DomainState.SHUTOFF:
            return [storage_daemon.describe(disk, self.name) for disk in self._offline_disks]
        return survey(self.monitor())

    def definition(self) -> str:
        """JSON of the disks; of a running QEMU also the machine and the devices."""
        running = self.state() is not DomainState.SHUTOFF
        devices = [_facts(self.monitor(), d) for d in self.disks()] if running else [_plain(d) for d in self.disks()]
        return json.dumps({"name": self.name, "uuid": self.uuid, "disks": devices}, indent=1, sort_keys=True)

    def nvram(self) -> Path | None:
        return None

    def tpm_state(self) -> Path | None:
        return None

    def managed_save(self) -> bool:
        return False  # whoever starts it decides what it goes on from

    def process(self) -> QemuProcess:
        connection = self._connected()
        version = connection.execute("query-version")["qemu"]
        pid, uid, gid = connection.peer
        return QemuProcess(pid, uid, gid, (version["major"], version["minor"], version["micro"]))

    def monitor(self) -> Monitor:
        """The one connection of this object, made anew after it was lost."""
        return self._connected()

    def _connected(self) -> Connection:
        if self._connection is not None:
            try:
                self._connection.execute("query-status")
                return self._connection
            except DomainLost:
                self.close()
        try:
            self._connection = Connection(self._socket, self.name)
        except ConnectError as error:
            raise DomainLost(domain=self.name, reason=str(error.fields["reason"])) from error
        return self._connection

    def offline(self, disks: Sequence[Disk]) -> AbstractContextManager[Monitor]:
        return storage_daemon.offline(self.name, disks)

    def freeze(self, timeout: float) -> int:
        raise AgentUnavailable(domain=self.name, reason="a bare QEMU has no agent that we know of")

    def thaw(self, timeout: float) -> None:
        """Nothing was frozen."""

    def reset(self) -> None:
        self.monitor().execute("system_reset")

    def suspend(self) -> None:
        self.monitor().execute("stop")

    def resume(self) -> None:
        self.monitor().execute("cont")

    def start(self) -> None:
        raise NotSupported(object=self.name, reason="a bare QEMU is started by whoever knows its command line")

    def destroy(self) -> None:
        with suppress(DomainLost):
            self.monitor().execute("quit")
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class QmpHypervisor:
    """The place of exactly one domain."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        options = parse_qs(parts.query)
        if parts.netloc or not parts.path.strip("/"):
            raise ConfigError(reason=f"{uri!r} names no socket", hint="write qmp:///path/to/monitor.sock?name=NAME")
        if unknown := set(options) - {"name", "uuid", "disk"}:
            raise ConfigError(reason=f"{uri!r} has unknown parameters: {', '.join(sorted(unknown))}")
        self.uri = uri
        self._domain = QmpDomain(uri, Path(parts.path), options)

    def domains(self) -> Sequence[str]:
        return [self._domain.name]

    def domain(self, name: str) -> QmpDomain:
        if name not in (self._domain.name, self._domain.uuid):
            raise DomainNotFound(domain=name, uri=self.uri)
        return self._domain

    def define(self, definition: str) -> QmpDomain:
        raise NotSupported(object=self.uri, reason="a bare QEMU cannot be given a new domain")

    def versions(self) -> dict[str, str]:
        try:
            return {"qemu": ".".join(map(str, self._domain.process().version))}
        except DomainLost:
            return {}

    def close(self) -> None:
        self._domain.close()


def _parse_disk(text: str) -> Disk:
    target, _, rest = text.partition(":")
    kind, _, path = rest.partition(":")
    if not (target and path) or kind not in ("qcow2", "raw"):
        raise ConfigError(reason=f"{text!r} is not TARGET:FORMAT:PATH with format qcow2 or raw")
    return Disk(target=target, source=path, format=kind, size=0)


def _plain(disk: Disk) -> dict[str, Any]:
    return {"target": disk.target, "source": disk.source, "format": disk.format, "size": disk.size, "bus": disk.bus}


def _facts(monitor: Monitor, disk: Disk) -> dict[str, Any]:
    return {**_plain(disk), "device": disk.device, "iothread": disk.iothread}
