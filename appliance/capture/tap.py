"""Continuous capture of one domain: the process that records, the hand that kills it, and where both are found.

    Recorder    nbdkit with filters/journal and its watchdog: one for all disks of a domain, children of the tap process
    insert      device → … mirror … → disk in the running domain, with a guard for the pause;  remove: back again
    Running     what others see of it, by  HOME/run/UUID/tap.json:

    {"process": the tap process, "server": nbdkit, "journal": id in hex, "session": start of this nbdkit,
     "control": its socket, "spool": the folder, "disks": [targets], "state": "attached"|"waiting"|"epochs"|"paused",
     "reason": why it is not attached, "until": when that ends}

The journal goes on over the ends of its processes: all that used one spool folder share one id and one sequence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.config import Home, Settings, write_json
from appliance.errors import JournalSilent, ToolFailed
from appliance.hypervisor import hostlock
from appliance.hypervisor.graph import tap as graph
from appliance.hypervisor.guard import Guard, guarding
from appliance.journal import Control
from appliance.journal.build import build, plugin
from appliance.nbdkit import Server
from appliance.process import Child, lives, process_key, signal_process, wait_gone

if TYPE_CHECKING:
    from appliance.hypervisor.base import Disk, Domain, Monitor
    from appliance.hypervisor.graph.tap import Attached
    from appliance.timeline.ledger import Ledger

__all__ = [
    "Recorder", "Running", "current", "cut", "elsewhere", "insert", "ledger_of", "ours", "remove", "state_path", "tell",
]  # fmt: skip

_log = logging.getLogger(__name__)

# For each disk. Its mirror has up to 16 requests in flight, but threads that wait for one file and one socket only wake
# each other: against 16 of them, 4 need a few percent less processor and gave 1.1 times the throughput at 4 KiB on two
# processors (at 64 KiB runs disagree); a single one needs least and lets nothing overlap.
_THREADS = 4
_NICE = -10
_ASK = 2.0
_GONE = 5.0
# Of the spool's disk this much is left to others, or a twentieth of a small one; and the least that a journal takes.
_RESERVE = 512 << 20
_LEAST = 1 << 20


@dataclass(frozen=True, slots=True)
class Running:
    """A tap process that lives, as it last described itself. `journal` is empty while it records nothing; only
    `attached` means that the guest's writes are recorded, and even then only what the ledger confirms counts."""

    process: str
    state: str
    reason: str = ""
    until: float = 0.0
    server: str = ""
    journal: str = ""
    session: int = 0
    control_socket: str = ""
    spool: str = ""
    disks: tuple[str, ...] = ()

    @property
    def attached(self) -> bool:
        return self.state == "attached" and lives(self.server)

    def control(self, timeout: float = _ASK) -> Control:
        """Raises JournalSilent when it records nothing now."""
        if not self.control_socket:
            raise JournalSilent(socket=self.control_socket or "no socket", reason="nothing is recorded now")
        return Control(Path(self.control_socket), timeout)

    def position(self, timeout: float = _ASK) -> tuple[str, int]:
        """(journal, number): that write and all before it are in the kernel. Raises JournalSilent, JournalError."""
        status = self.control(timeout).status()
        return str(status.fields["journal"]), status.written


def state_path(home: Home, uuid: str) -> Path:
    return home.run(uuid) / "tap.json"


def current(home: Home, uuid: str) -> Running | None:
    """The tap process of the domain, or None when none lives."""
    try:
        found = json.loads(state_path(home, uuid).read_text())
        running = Running(**{**found, "disks": tuple(found["disks"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return running if lives(running.process) else None


def tell(home: Home, uuid: str, running: Running) -> None:
    """Replace the description."""
    write_json(state_path(home, uuid), asdict(running))


def cut(home: Home, uuid: str) -> None:
    """Kill the domain's journal, where there is one: nothing that is written from now on gets into it."""
    running = current(home, uuid)
    if running is not None and running.server:
        signal_process(running.server, signal.SIGKILL)
        wait_gone(running.server, _GONE)


def ledger_of(home: Home, uuid: str) -> Ledger:
    """The domain's ledger; the folder is made."""
    from appliance.timeline.ledger import Ledger

    path = home.ledger(uuid)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return Ledger(path)


class Recorder:
    """nbdkit with the journal of these disks, and its watchdog; both die with this process. Used by one thread.

    `sizes` are bytes by target.
    """

    def __init__(
        self, home: Home, uuid: str, settings: Settings, sizes: Sequence[tuple[str, int]]
    ) -> None:  # fmt: skip
        self._home, self._uuid, self._settings = home, uuid, settings
        self.sizes = tuple(sizes)
        self.spool = home.spool(uuid)
        self.control_socket = home.run(uuid) / "tap.control"
        self._server: Server | None = None
        self._dog: Child | None = None
        self._journal = ""
        self._session = 0
        self.killed = ""  # why the watchdog has ended it

    def start(self) -> None:
        """Raises ToolFailed with the plugin's own words (a spool that is full, damaged, in use); nothing runs then."""
        compiled = _plugin()
        run = self._home.run(self._uuid)
        run.mkdir(parents=True, exist_ok=True)
        run.chmod(0o711)
        self.spool.mkdir(parents=True, exist_ok=True)
        self.spool.chmod(0o700)
        self.killed = ""
        server = Server(
            compiled, run / "tap.sock", self._parameters(), threads=_THREADS, nice=_NICE,
            log=self._home.log / f"journal-{self._uuid}.log",
        )  # fmt: skip
        server.start()
        self._server = server
        try:
            status = self.control().status()
            self._journal, self._session = str(status.fields["journal"]), int(status.fields["session"])
            self._start_dog()
        except BaseException:  # also Ctrl-C: a journal without its watchdog may hold a guest up
            self.stop()
            raise

    def _parameters(self) -> list[tuple[str, str | os.PathLike[str]]]:
        settings = self._settings
        return [
            ("spool", self.spool),
            *(("disk", f"{target}:{size}") for target, size in self.sizes),
            ("control", self.control_socket),
            ("commit", f"{settings.journal_commit * 1000:.0f}ms"),
            ("segment-age", f"{settings.journal_segment_age * 1000:.0f}ms"),
            ("spool-limit", str(_limit(self.spool, settings.journal_spool_limit))),
        ]

    def _start_dog(self) -> None:
        file = Path(__file__).with_name("watchdog.py")
        key, bound = process_key(self.pid), f"{self._settings.journal_stall:g}"
        self._dog = Child([sys.executable, "-I", "-S", file, key, self.control_socket, bound], name="watchdog")

    @property
    def pid(self) -> int:
        """Of nbdkit. Raises ToolFailed when it was not started."""
        if self._server is None:
            raise ToolFailed(tool="nbdkit", reason="it was not started")
        return self._server.pid

    @property
    def socket(self) -> Path:
        return self._home.run(self._uuid) / "tap.sock"

    @property
    def journal(self) -> str:
        """Its id in hex; empty before the first start."""
        return self._journal

    def control(self, timeout: float = _ASK) -> Control:
        return Control(self.control_socket, timeout)

    def alive(self) -> bool:
        """Whether it records. A watchdog that was lost is replaced on the way."""
        if self._server is None or not self._server.alive():
            self._learn_why(1.0)
            return False
        if self._dog is not None:
            if self._dog.alive() and not _stopped(self._dog.pid):
                return True
            self._dog.kill()
        # Asked of one that has ended for sure: it may have done so this very moment, and takes its reason with it.
        self._learn_why(0.0)
        if self.killed:
            return False  # though it may still be stuck in the kernel
        self._start_dog()
        return True

    def _learn_why(self, timeout: float) -> None:
        if self._dog is not None and not self.killed:
            with contextlib.suppress(TimeoutError, ValueError):
                self._dog.wait(timeout)
                self.killed = str(json.loads(self._dog.tail().rpartition("\n")[2] or "{}").get("killed", ""))

    def why(self) -> str:
        """Why it has ended, as far as anybody knows."""
        self._learn_why(1.0)
        if self.killed:
            return self.killed
        words = self._server.tail().rpartition("\n")[2] if self._server is not None else ""
        return words or "its process has ended"

    def described(self, base: Running) -> Running:
        """`base` with what is found here."""
        return replace(
            base, server=process_key(self.pid), journal=self._journal, session=self._session,
            control_socket=str(self.control_socket), spool=str(self.spool),
            disks=tuple(target for target, _size in self.sizes),
        )  # fmt: skip

    def stop(self) -> None:
        """End both in order. May be repeated, also when it was not started. Nobody may be connected: QEMU would take
        it for an error and end its jobs. One that hangs in the kernel is left to die; it keeps its spool until then."""
        if self._dog is not None:
            self._dog.kill()  # first, or it would find nobody there and say so
            self._dog = None
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                self._server.stop(0.1 if self.killed else _GONE, _GONE)
            self._server = None


def _plugin() -> Path:
    """Compiled now where that is needed. A host that has lost its compiler goes on with what it has."""
    try:
        return build()
    except ToolFailed as error:
        if not (made := plugin()).exists():
            raise
        _log.warning("the journal's plugin cannot be compiled, the one that is there is taken: %s", error)
        return made


def _limit(spool: Path, wanted: int) -> int:
    """What the spool may take on its disk as it is now. What fills a disk wholly harms whoever else is on it, and a
    limit that the disk does not reach would make nobody let go of anything in time."""
    disk = os.statvfs(spool)
    used = sum(entry.stat().st_blocks * 512 for entry in os.scandir(spool) if entry.is_file())
    left = used + disk.f_bavail * disk.f_frsize - min(_RESERVE, disk.f_blocks * disk.f_frsize // 20)
    return max(_LEAST, min(wanted or left, left))


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def elsewhere(home: Home, domain: Domain) -> str:
    """The socket of another home's journal that records the running domain now; empty when there is none. What a dead
    one has left does not answer."""
    for path in map(Path, graph.sinks(domain.monitor()).values()):
        if path.parent.resolve() != home.run(domain.uuid).resolve():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1)
                client.connect(os.fspath(path))
                return str(path)
    return ""


def ours(monitor: Monitor, folder: Path, disks: Sequence[Disk]) -> bool:
    """Whether the taps of these disks lead to the journal in that folder: every home names its nodes the same."""
    found = graph.sinks(monitor)
    return all(Path(found.get(disk.target, "/")).parent.resolve() == folder.resolve() for disk in disks)


def insert(home: Home, domain: Domain, disks: Sequence[Disk], recorder: Recorder) -> Attached:
    """Put the tap under the devices of a running domain, in one pause. The caller holds the domain's locks.

    Raises what `graph.tap.attach` raises: every device is on its own node then, or LeftPaused.
    """
    process = domain.process()
    os.chown(recorder.socket, process.uid, process.gid)
    with _guarded(home, domain) as guard:
        return graph.attach(domain.monitor(), disks, recorder.socket, before=guard.pausing, after=guard.resumed)


def remove(home: Home, domain: Domain, disks: Sequence[Disk]) -> None:
    """Put the devices on their own nodes again, in one pause, and take away what else is left of taps; also when the
    journal is gone. The caller holds the domain's locks. Raises MonitorError, DomainLost, DomainBusy (a revert is under
    way), LeftPaused."""
    monitor = domain.monitor()
    with _guarded(home, domain) as guard:
        graph.detach(monitor, disks, before=guard.pausing, after=guard.resumed)
        graph.clean(monitor)


@contextlib.contextmanager
def _guarded(home: Home, domain: Domain) -> Iterator[Guard]:
    lock = home.domains / f"{domain.uuid}.lock"
    log, host = home.log / "guard.log", hostlock.of_domain(domain)
    with guarding(domain.uri, domain.uuid, lock, log, host) as guard:
        guard.await_ready()
        yield guard
