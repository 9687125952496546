"""The driver for one bare QEMU by its QMP socket.

    qmp:///path/to/monitor.sock?name=NAME[&uuid=UUID][&disk=TARGET:FORMAT:PATH …]

`disk` says what the domain's disks are while it is shut off, when nobody can be asked. A monitor socket serves one
client: while we are connected nobody else is, so a QEMU that a person also wants to talk to needs a second one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from appliance.errors import AgentUnavailable, ConfigError, ConnectError, DomainLost, DomainNotFound, NotSupported
from appliance.hypervisor import storage_daemon
from appliance.hypervisor.base import Disk, DomainState, Monitor, QemuProcess
from appliance.hypervisor.graph.survey import survey
from appliance.hypervisor.qmp import Connection

__all__ = ["QmpDomain", "QmpHypervisor"]


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
