"""The driver for libvirt on this host, and the only importer of libvirt's bindings.

`qemu:///system`, `qemu:///session`, `qemu+unix:///…`, `qemu:///embed?root=DIR`. A restart of libvirtd in the middle
is survived: the connection is opened again, and what may safely be asked twice is asked twice. Block graphs are changed
through QEMU's own monitor, which taints a domain (`custom-monitor`) and changes nothing else for libvirt.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import libvirt
import libvirt_qemu

from appliance.errors import (
    AgentUnavailable,
    ConnectError,
    DomainBusy,
    DomainLost,
    DomainNotFound,
    HypervisorError,
    MonitorError,
    NotSupported,
)
from appliance.hypervisor import domain_xml, storage_daemon
from appliance.hypervisor.base import Disk, DomainState, Monitor, QemuProcess
from appliance.hypervisor.domain_xml import Definition
from appliance.hypervisor.graph.survey import survey

__all__ = ["LibvirtDomain", "LibvirtHypervisor"]

T = TypeVar("T")

# A libvirtd that is being restarted is away for about a second; an admin's upgrade may take longer.
_RECONNECT_SECONDS = 15.0

# Asking these again after a lost reply changes nothing. `qom-set` is not among them: repeated, it aborts QEMU.
_REPEATABLE = ("query-", "qom-get", "qom-list", "x-debug-query", "stop", "cont")

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.PAUSED,
}

_loop_lock = threading.Lock()
_loop_started = False


def _start_event_loop() -> None:
    """libvirt wants a running event loop before the first connection: embedded drivers depend on it."""
    global _loop_started
    with _loop_lock:
        if _loop_started:
            return
        # Errors come to us as exceptions; printed as well they would land in the middle of our output.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_loop, name="libvirt-events", daemon=True).start()
        _loop_started = True


def _run_loop() -> None:
    while True:
        with suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


class _Connection:
    """A connection that is opened again when it was lost. `lock` guards the exchange of the handle."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._handle = self._open()

    def _open(self) -> Any:
        try:
            return libvirt.open(self.uri)
        except libvirt.libvirtError as error:
            raise ConnectError(uri=self.uri, reason=error.get_error_message() or str(error)) from error

    def alive(self) -> bool:
        try:
            return bool(self._handle.isAlive())
        except libvirt.libvirtError:
            return False

    def call(self, work: Callable[[Any], T], *, repeat: bool = True) -> T:
        """`work(handle)`. After a lost connection it is opened again, and with `repeat` the work done once more.

        libvirtError for anything else passes through; a lost connection without `repeat` raises ConnectError, and
        whether the work was done is not known.
        """
        handle = self._handle
        try:
            return work(handle)
        except libvirt.libvirtError as error:
            if self.alive():
                raise
            self._reopen(handle)
            if not repeat:
                raise ConnectError(uri=self.uri, reason=f"the connection was lost: {error}") from error
        return work(self._handle)

    def _reopen(self, lost: Any) -> None:
        limit = time.monotonic() + _RECONNECT_SECONDS
        with self._lock:
            while self._handle is lost:
                try:
                    self._handle = self._open()
                except ConnectError:
                    if time.monotonic() > limit:
                        raise
                    time.sleep(0.05)

    def close(self) -> None:
        with suppress(libvirt.libvirtError):
            self._handle.close()


class _LibvirtMonitor:
    """QMP of a running domain through libvirt. Thread-safe: libvirt lets one command at a time through."""

    storage_daemon = False

    def __init__(self, owner: LibvirtDomain) -> None:
        self.domain = owner.name
        self._owner = owner

    def execute(self, command: str, /, **arguments: Any) -> Any:
        return self._execute(command, None, arguments)

    def execute_with_fd(self, command: str, fd: int, /, **arguments: Any) -> Any:
        return self._execute(command, fd, arguments)

    def _execute(self, command: str, fd: int | None, arguments: dict[str, Any]) -> Any:
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": words})

        def send(domain: Any) -> str:
            if fd is None:
                return str(libvirt_qemu.qemuMonitorCommand(domain, text, 0))
            return str(libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)[0])

        reply = json.loads(self._owner.call(send, repeat=command.startswith(_REPEATABLE), command=command))
        if "error" in reply:
            raise MonitorError(domain=self.domain, command=command, reason=reply["error"].get("desc", str(reply)))
        return reply["return"]

    def close(self) -> None:
        """The connection is the hypervisor's."""


class LibvirtDomain:
    """One domain, kept by its UUID: it may be renamed, started and stopped meanwhile."""

    def __init__(self, connection: _Connection, name: str, uuid: str) -> None:
        self.name = name
        self.uuid = uuid
        self.uri = connection.uri
        self._connection = connection
        # The handle of the domain on one connection: looking it up each time would double every command's time.
        self._found: tuple[Any, Any] | None = None

    def _domain(self, handle: Any) -> Any:
        found = self._found
        if found is None or found[0] is not handle:
            self._found = found = (handle, handle.lookupByUUIDString(self.uuid))
        return found[1]

    def call(self, work: Callable[[Any], T], *, repeat: bool = True, command: str = "") -> T:
        """`work(virDomain)` with libvirt's errors as ours."""
        try:
            return self._connection.call(lambda handle: work(self._domain(handle)), repeat=repeat)
        except libvirt.libvirtError as error:
            raise self._translated(error, command) from error

    def _translated(self, error: Any, command: str) -> HypervisorError:
        code, reason = error.get_error_code(), error.get_error_message() or str(error)
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return DomainNotFound(domain=self.name, uri=self.uri)
        if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
            return DomainBusy(domain=self.name, reason=reason)
        if command and not self._active():
            return DomainLost(domain=self.name, reason=reason)
        if command:
            return MonitorError(domain=self.name, command=command, reason=reason)
        return HypervisorError(reason=f"libvirt refused for {self.name!r}: {reason}")

    def _active(self) -> bool:
        """Raises ConnectError: a libvirt that is away is no proof that the domain does not run."""
        try:
            return self._connection.call(lambda handle: bool(self._domain(handle).isActive()))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            reason = error.get_error_message() or str(error)
            raise HypervisorError(reason=f"libvirt refused for {self.name!r}: {reason}") from error

    def state(self) -> DomainState:
        return _STATES.get(self.call(lambda domain: domain.state()[0]), DomainState.SHUTOFF)

    def _definition(self, live: bool = True) -> Definition:
        """Of the running domain while it runs, unless `live` is false."""
        flags = 0 if live else libvirt.VIR_DOMAIN_XML_INACTIVE
        return Definition(self.call(lambda domain: domain.XMLDesc(flags)))

    def disks(self) -> Sequence[Disk]:
        defined = self._definition().disks()
        if not self._active():
            return [self._closed_disk(one) for one in defined]
        aliases = {one.alias: one.target for one in defined}
        seen = {disk.target: disk for disk in survey(self.monitor(), aliases)}
        return [domain_xml.merged(one, seen.get(one.target)) for one in defined]

    def _closed_disk(self, one: domain_xml.DiskElement) -> Disk:
        plain = domain_xml.merged(one, None)
        if plain.refusal:
            return plain
        return storage_daemon.describe(plain, self.name)

    def definition(self) -> str:
        """What libvirt will start next time; of a transient domain, what runs."""
        persistent = self.call(lambda domain: domain.isPersistent())
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if persistent else 0
        return str(self.call(lambda domain: domain.XMLDesc(flags)))

    def change(self, edit: Callable[[str], str]) -> None:
        # Of what is defined again without its passwords, VNC for one asks for none any more.
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        _define(self._connection, edit(str(self.call(lambda domain: domain.XMLDesc(flags)))))

    def nvram(self) -> Path | None:
        return self._definition().nvram()

    def tpm_state(self) -> Path | None:
        definition = self._definition()
        if not definition.has_tpm():
            return None
        places = [definition.tpm_source(), Path("/var/lib/libvirt/swtpm") / self.uuid]
        root = parse_qs(urlsplit(self.uri).query).get("root", [""])[0]
        if root:
            places += [
                Path(root) / part / "swtpm" / self.uuid for part in ("lib", "etc", "var/lib/libvirt", "lib/libvirt")
            ]
        return next((place for place in places if place is not None and place.is_dir()), None)

    def managed_save(self) -> bool:
        return bool(self.call(lambda domain: domain.hasManagedSaveImage()))

    def process(self) -> QemuProcess:
        version = self.monitor().execute("query-version")["qemu"]
        pid = domain_xml.pid_of(self.name, self.uuid, self.uri)
        if pid is None:
            raise DomainLost(domain=self.name, reason="no QEMU process with its UUID is on this host")
        found = Path(f"/proc/{pid}").stat()
        return QemuProcess(pid, found.st_uid, found.st_gid, (version["major"], version["minor"], version["micro"]))

    def monitor(self) -> Monitor:
        if not self._active():
            raise DomainLost(domain=self.name, reason="it does not run")
        return _LibvirtMonitor(self)

    def offline(self, disks: Sequence[Disk]) -> AbstractContextManager[Monitor]:
        if self._active():
            raise DomainBusy(domain=self.name, reason="it runs")
        return storage_daemon.offline(self.name, disks)

    def freeze(self, timeout: float) -> int:
        if not self._definition().agent_connected():
            raise AgentUnavailable(domain=self.name, reason="no agent is connected")

        def freeze(domain: Any) -> int:
            domain.agentSetResponseTimeout(max(1, int(timeout)), 0)
            return int(domain.fsFreeze())

        try:
            return self.call(freeze, repeat=False)
        except HypervisorError as error:
            # It may have frozen some, or all and lost the answer.
            with suppress(HypervisorError):
                self.thaw(timeout)
            raise AgentUnavailable(domain=self.name, reason=error.message) from error

    def thaw(self, timeout: float) -> None:
        self.call(lambda domain: domain.fsThaw())

    def pull(self, target: str, rate: int) -> None:
        flags = libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES
        self.call(lambda domain: domain.blockPull(target, rate, flags), repeat=False)

    def pulling(self, target: str) -> tuple[int, int] | None:
        told = self.call(lambda domain: domain.blockJobInfo(target, 0))
        return (int(told["cur"]), int(told["end"])) if told else None

    def backed(self, target: str) -> bool:
        found = self._definition().backed(target)
        # Detached from the guest that runs it may still be what the next start opens.
        return bool(self._definition(live=False).backed(target) if found is None else found)

    def stopped_by_error(self) -> bool:
        state = self.call(lambda domain: domain.state())
        return bool(state == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR])

    def undefine(self) -> None:
        self.destroy()
        self.call(lambda domain: domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM), repeat=False)

    def reset(self) -> None:
        self.call(lambda domain: domain.reset(), repeat=False)

    def suspend(self) -> None:
        self.call(lambda domain: domain.suspend())

    def resume(self) -> None:
        self.call(lambda domain: domain.resume())

    def start(self) -> None:
        self.call(lambda domain: domain.create(), repeat=False)

    def destroy(self) -> None:
        if self._active():
            self.call(lambda domain: domain.destroy(), repeat=False)


def _define(connection: _Connection, definition: str) -> LibvirtDomain:
    try:
        made = connection.call(lambda handle: handle.defineXML(definition))
    except libvirt.libvirtError as error:
        raise NotSupported(object="the definition", reason=error.get_error_message() or str(error)) from error
    return LibvirtDomain(connection, str(made.name()), str(made.UUIDString()))


class LibvirtHypervisor:
    """One connection to one libvirt of this host; any thread may use it."""

    def __init__(self, uri: str) -> None:
        """Raises ConnectError."""
        _start_event_loop()
        self.uri = uri
        self._connection = _Connection(uri)

    def domains(self) -> Sequence[str]:
        return sorted(str(domain.name()) for domain in self._call(lambda handle: handle.listAllDomains()))

    def domain(self, name: str) -> LibvirtDomain:
        def find(handle: Any) -> tuple[str, str]:
            try:
                found = handle.lookupByName(name)
            except libvirt.libvirtError:
                found = handle.lookupByUUIDString(name)
            return str(found.name()), str(found.UUIDString())

        try:
            found = self._connection.call(find)
        except libvirt.libvirtError as error:
            raise DomainNotFound(domain=name, uri=self.uri) from error
        return LibvirtDomain(self._connection, *found)

    def define(self, definition: str) -> LibvirtDomain:
        return _define(self._connection, definition)

    def versions(self) -> dict[str, str]:
        return {
            "qemu": _version(self._call(lambda handle: handle.getVersion())),
            "libvirt": _version(self._call(lambda handle: handle.getLibVersion())),
        }

    def close(self) -> None:
        self._connection.close()

    def _call(self, work: Callable[[Any], T]) -> T:
        try:
            return self._connection.call(work)
        except libvirt.libvirtError as error:
            raise HypervisorError(reason=f"libvirt at {self.uri}: {error.get_error_message() or error}") from error


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
