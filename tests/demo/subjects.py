"""The two guests of the demo behind one face: what they promise under load, how they are damaged, what they answer.

    DebianSubject   a shop in PostgreSQL that takes orders, and documents: database dropped, documents deleted
    TinySubject     stamped rows on a disk of their own, documents on an ext4: both disks are wrecked

A *promise* is a row that a client was told is committed. `promises` keeps when the host learnt of each, so that for any
instant it is known how many rows must be there (`at_least`) and how many can be there (`at_most`).
"""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.support.channel import GuestSilent
from tests.support.debian import DebianGuest
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

__all__ = ["Answer", "DebianSubject", "Subject", "TinySubject"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the guest says about itself. `rows` is None when there is no database any more."""

    rows: int | None
    exact: bool
    documents: bool

    def json(self) -> dict[str, Any]:
        return {"rows": self.rows, "exact": self.exact, "documents": self.documents}


class Subject(Protocol):
    """A guest of the demo."""

    name: str
    uri: str

    def boot(self) -> None: ...

    def begin_load(self) -> None:
        """Let clients write."""

    def damage(self) -> tuple[str, float]:
        """Delete and drop; what was done, and the host's clock just before."""

    def expect_reset(self) -> None:
        """Called before a verb that resets the guest."""

    def wait_answer(self, timeout: float, hopeless: Callable[[], bool]) -> float:
        """Until the guest's service answers after a reset; the host's clock then. Raises when `hopeless`."""

    def answer(self) -> Answer:
        """Look at everything. Clients must not write."""

    def end(self) -> None: ...

    def evidence(self) -> str:
        """What libvirt, QEMU and the guest's kernel said last, for when something went wrong."""


@dataclass(slots=True)
class Promises:
    """(time the question was sent, time the answer came, rows) as the host saw them. Thread-safe by appending only.

    Each of the `writers` makes `rate` rows a second at most.
    """

    writers: int
    rate: int
    seen: list[tuple[float, float, int]] = field(default_factory=list)
    stopped: float = math.inf  # when nobody wrote any more

    def note(self, asked: float, told: float, rows: int) -> None:
        self.seen.append((asked, told, rows))

    def at_least(self, instant: float) -> int:
        """Rows that were promised before the instant."""
        return max((rows for _, told, rows in self.seen if told <= instant), default=0)

    def at_most(self, instant: float) -> int:
        """Rows that can exist then: those known of a moment later (promises travel), and those under way; where nothing
        is known of later, as many more as the writers can have made since somebody looked."""
        if later := [rows for asked, _, rows in self.seen if asked >= instant + 0.2]:
            return 2 + min(later)
        asked, _, rows = self.seen[-1]
        if instant >= self.stopped:
            return rows
        return rows + self.writers * (1 + math.ceil(self.rate * max(0.0, instant - asked)))


class TinySubject:
    """Disk vda: ext4 with documents. Disk vdb: the rows, stamped blocks whose order is known."""

    name = "tiny"

    def __init__(self, folder: Path) -> None:
        self.promises = Promises(writers=2, rate=15)
        self._folder = folder
        documents = make_disk(folder / "documents.raw", 64 << 20, "raw")
        self._make_documents(documents)
        rows = make_disk(folder / "rows.qcow2", 256 << 20)
        disks = [TinyDisk(documents, "raw"), TinyDisk(rows)]
        self.guest = LibvirtGuest(folder, disks, name=self.name, mount="vda", data=["vdb"])
        self.uri = self.guest.uri
        self._load: threading.Thread | None = None
        self._stop = threading.Event()
        self._reset = threading.Event()  # it may be reset from now on
        self._boots = 0

    def _make_documents(self, image: Path) -> None:
        content = self._folder / "content"
        (content / "documents").mkdir(parents=True)
        for number in range(40):
            path = content / "documents" / f"{number}.txt"
            path.write_text(f"document {number}\n" * (number * 50 + 20))
        command = "sha256sum -- *.txt > ../documents.sha256"
        subprocess.run(["sh", "-ec", command], cwd=content / "documents", check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", "-d", content, image], check=True)

    def boot(self) -> None:
        self.guest.boot()

    def begin_load(self) -> None:
        self._stop.clear()
        self._reset.clear()
        self.promises.stopped = math.inf
        self._ask_rows(f"start {self.promises.rate}", timeout=60)
        self._load = threading.Thread(target=self._watch, daemon=True)
        self._load.start()

    def _watch(self) -> None:
        boots = self.guest.channel.boots
        while not self._stop.wait(0.05):
            asked = time.time()
            try:
                seen = self.guest.ask("stats", timeout=2)
            except GuestSilent:
                # It is being reset, and its firmware must not be asked; or the machine has other things to do.
                if self._reset.is_set() or self.guest.channel.boots != boots:
                    return
                continue
            if self.guest.channel.boots != boots:
                return
            self.promises.note(asked, time.time(), self._rows(seen))

    def _ask_rows(self, question: str, timeout: float = 30) -> None:
        """Ask something that is answered with the rows."""
        asked = time.time()
        seen = self.guest.ask(question, timeout)
        self.promises.note(asked, time.time(), self._rows(seen))

    @staticmethod
    def _rows(told: dict[str, Any]) -> int:
        # The third writer also zeroes blocks, and zeroing what is zero is no change that could be counted.
        return int(told["seq"][0]) + int(told["seq"][1])

    def _end_load(self) -> None:
        self._stop.set()
        if self._load is not None:
            self._load.join(10)
            self._load = None

    def damage(self) -> tuple[str, float]:
        self._end_load()
        self._ask_rows("stop")
        before = self.promises.stopped = time.time()
        self.guest.ask("sh rm -rf /data/documents; sync")
        # Random bytes and not zeroes: what is lost must be carried back, not only unmapped.
        layout = self.guest.layout
        self.guest.ask(f"fill vdb {layout.base} {16 << 20} 99", timeout=60)
        return "all documents deleted, all rows overwritten", before

    def expect_reset(self) -> None:
        self._boots = self.guest.channel.boots
        self._reset.set()

    def wait_answer(self, timeout: float, hopeless: Callable[[], bool]) -> float:
        boots = self._boots
        # Questions that arrive while the firmware has the serial port could disturb it: only listen.
        while self._load is not None and self._load.is_alive():
            time.sleep(0.05)
        deadline = time.monotonic() + timeout
        while self.guest.channel.boots == boots:
            try:
                self.guest.channel.wait_up(boots + 1, 1)
            except GuestSilent:
                if hopeless() or time.monotonic() > deadline:
                    raise
        self.guest.ask("hello", timeout)
        return time.time()

    def answer(self) -> Answer:
        self._end_load()
        state = self.guest.ask("state", timeout=60)
        listed = self.guest.ask("sh cd /data/documents && sha256sum -c ../documents.sha256 >/dev/null", timeout=60)
        rows = self._rows(state) if state["exact"] else None
        return Answer(rows, bool(state["exact"]), bool(listed["ok"]))

    def end(self) -> None:
        self._end_load()
        self.guest.undefine()

    def evidence(self) -> str:
        return _domain_log(self.name) + self.guest.console[-1500:]


class DebianSubject:
    """One disk: the whole system of the guest, its PostgreSQL and its documents."""

    name = "shop"

    def __init__(self, folder: Path) -> None:
        self.promises = Promises(writers=1, rate=50)
        self.guest = DebianGuest(folder, name=self.name)
        self.uri = self.guest.uri
        self._stop = threading.Event()
        self._load: threading.Thread | None = None
        self._reset: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        self.guest.boot()

    def begin_load(self) -> None:
        self.guest.forget_promises()
        self.guest.run("systemctl start rows")
        self._stop.clear()
        self._load = threading.Thread(target=self._watch, daemon=True)
        self._load.start()

    def _watch(self) -> None:
        # The serial port tells by itself, so a promise is known when it arrives; asking costs nothing.
        while not self._stop.wait(0.01):
            now = time.time()
            self.promises.note(now, now, self.guest.acknowledged)

    def _end_load(self) -> None:
        self._stop.set()
        if self._load is not None:
            self._load.join(10)
            self._load = None

    def damage(self) -> tuple[str, float]:
        self._end_load()
        before = time.time()
        self.guest.run("rm -rf /srv/documents && sync")
        self.guest.sql("drop database shop with (force)", "postgres")
        self.guest.run("rm -f /var/log/*.log; sync")
        return "/srv/documents deleted, the database dropped", before

    def expect_reset(self) -> None:
        # Looking by ssh whether it was reset yet would cost an emulated processor seconds for each look.
        words = ["virsh", "-q", "-c", self.uri, "event", "--domain", self.name, "--event", "reboot", "--timeout", "240"]
        self._reset = subprocess.Popen(words, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    def wait_answer(self, timeout: float, hopeless: Callable[[], bool]) -> float:
        assert self._reset is not None
        deadline = time.monotonic() + timeout
        while self._reset.poll() is None or not self.guest.ssh_listens():
            if hopeless() or time.monotonic() > deadline:
                self._reset.kill()
                self._reset.wait(10)
                raise RuntimeError("the guest was not reset, or does not come up")
            time.sleep(0.2)
        self.guest.forget_connection()
        while True:
            try:
                # Any database that answers: after `undo` there is no shop.
                self.guest.sql("select 1", "postgres")
                return time.time()
            except (RuntimeError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def answer(self) -> Answer:
        self._end_load()
        self.guest.run("systemctl stop rows")
        documents = self.guest.documents_intact()
        if not int(self.guest.sql("select count(*) from pg_database where datname = 'shop'", "postgres")):
            return Answer(None, False, documents)
        rows = self.guest.rows()
        return Answer(rows.newest, rows.exact, documents)

    def end(self) -> None:
        self._end_load()
        self.guest.__exit__()

    def evidence(self) -> str:
        return _domain_log(self.name) + self.guest.console[-1500:]


def _domain_log(name: str) -> str:
    path = Path(f"/var/log/libvirt/qemu/{name}.log")
    if not path.exists():
        return ""
    # The long command line is of no use here.
    lines = [line for line in path.read_text(errors="replace").splitlines() if not line.endswith("\\")]
    return "\n".join(lines[-15:]) + "\n"
