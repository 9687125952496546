"""A domain with a history, beside a model that knows better: a bytearray for each disk, a copy of it for each point.

    History ── machine    a bare QEMU in software emulation, its firmware and `qemu-io` stand in for the guest
            ├─ model      target → what the guest's disk must hold now
            └─ points     id → (time taken, target → what it must hold for ever)

Every verb goes through the service, as the command line does it. `check_*` compare byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from appliance.config import Home
from appliance.errors import DomainLost, MonitorError, RewindError
from appliance.restore import intent, keeper
from appliance.service import Session, protection, setup, upkeep
from appliance.timeline.view import DiskView
from tests.support.bare import Machine

__all__ = ["History"]

SECTOR = 512
ROOT = Path(__file__).parents[2]


class History:
    """`sizes` gives each disk's size in bytes; a target whose name ends in `r` is a raw image, the others are qcow2."""

    def __init__(self, folder: Path, seed: int, sizes: dict[str, int], *, iothread: bool = False):
        self.folder, self.random, self.iothread = folder, random.Random(seed), iothread
        self.paths = {target: folder / f"{target}.{'raw' if target.endswith('r') else 'qcow2'}" for target in sizes}
        self.model = {target: bytearray(size) for target, size in sizes.items()}
        self.points: dict[str, dict[str, bytes]] = {}
        self.steps = 0
        for target, path in self.paths.items():
            self._tool("create", "-q", "-f", path.suffix[1:], path, sizes[target])
        self.machine: Machine | None = None
        self.home = Home(folder / "home")
        self.settings = folder / "none.yaml"
        self.start()
        with self.session() as session:
            setup.init(session, None)
            self.name = session.hypervisor().domains()[0]
            self.uuid = session.domain(self.name).uuid
            protection.protect(session, self.name)

    # --- the machine ---

    def start(self) -> None:
        """Power on."""
        self.machine = Machine(self.folder, self.paths, iothread=self.iothread).start()

    def power_off(self) -> None:
        """QEMU ends by itself: bitmaps are stored."""
        self.machine.quit()

    def kill(self) -> None:
        """QEMU is killed: what the guest had flushed is in its images, bitmaps are lost."""
        self.machine.kill()
        self.machine.monitor.close()

    @property
    def uri(self) -> str:
        return self.machine.uri

    def session(self) -> Session:
        """The way in; close it after each verb, as a command does."""
        return Session(self.home, self.uri, settings_file=self.settings)

    @staticmethod
    def _tool(*words) -> None:
        subprocess.run(["qemu-img", *(str(word) for word in words)], check=True, capture_output=True)

    # --- what a guest does ---

    def place(self, target: str, most: int) -> tuple[int, int]:
        """A random range of whole sectors, mostly small, often near one that was used before."""
        size = len(self.model[target]) // SECTOR
        length = min(self.random.choice([1, 1, 8, 8, 8, 24, most // SECTOR]), size)
        return self.random.randrange(size - length + 1) * SECTOR, length * SECTOR

    def write(self) -> None:
        target = self.random.choice(list(self.model))
        offset, length = self.place(target, 192 << 10)
        self.machine.write(target, self.model[target], offset, length, self.random.randrange(1, 256))

    def flush(self) -> None:
        """What QEMU still keeps to itself of qcow2 metadata would be lost with it, as on any disk."""
        for target in self.model:
            self.machine.hmp(target, "flush")

    def zero(self) -> None:
        target = self.random.choice(list(self.model))
        offset, length = self.place(target, 512 << 10)
        self.machine.zero(target, self.model[target], offset, length)

    def discard(self) -> None:
        """What a discarded range holds is the device's business: asked afterwards, then known."""
        target = self.random.choice(list(self.model))
        offset, length = self.place(target, 512 << 10)
        self.machine.hmp(target, f"discard {offset} {length}")
        self.zero_range(target, offset, length)

    def zero_range(self, target: str, offset: int, length: int) -> None:
        """Make a range certain after a discard."""
        self.machine.zero(target, self.model[target], offset, length)

    def cycle(self) -> None:
        """A clean power off and on."""
        self.power_off()
        self.check_disks()
        self.start()

    def crash(self) -> None:
        self.flush()
        self.kill()
        self.start()

    def read(self) -> None:
        """A person looks at an old point."""
        if self.points:
            self.check_point(self.random.choice(list(self.points)))

    # --- what an admin does ---

    def point(self) -> str:
        with self.session() as session:
            # Whoever puts a guest right after a kill holds the domain for a moment.
            point = protection.point(session, self.name, wait=30)
        self.points[point.id] = self.now()
        self.note(f"is {point.id}")
        return point.id

    def point_off(self) -> None:
        """A point of the domain while it is shut off."""
        self.power_off()
        self.point()
        self.start()

    def torn_point(self) -> None:
        """The process that takes a point is killed: the point is there, and right, or it is not there."""
        child = self.command("point", self.name, "--wait", "30")
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(self.random.random() * 1.5)
        child.kill()
        child.wait()
        self.await_running()
        self.adopt(self.now())

    def await_running(self, timeout: float = 20.0) -> None:
        """A guest that we were killed over goes on by itself, and the guard takes our nodes away in a pause. Until then
        it writes nothing, and neither may we: `qemu-io` writes also while a stopped guest sits on a hole.
        """
        limit = time.monotonic() + timeout
        while self._disturbed():
            assert time.monotonic() < limit, f"{self.words()}\nthe guest was left paused, or with nodes of ours"
            time.sleep(0.02)

    def _disturbed(self) -> bool:
        nodes = self.machine.monitor.execute("query-named-block-nodes", flat=True)
        ours = any(node["node-name"].startswith("rw-") for node in nodes)
        return ours or not self.machine.monitor.execute("query-status")["running"]

    def delete(self) -> None:
        if len(self.points) < 3:
            return
        victim = self.random.choice(list(self.points)[:-1])
        with self.session() as session:
            try:
                upkeep.forget(session, self.name, None, [victim])
            except RewindError as error:
                assert error.id == "revert-under-way", error
                return
        del self.points[victim]

    def collect(self) -> None:
        with self.session() as session:
            upkeep.gc(session)

    def lose_cache(self) -> None:
        """The catalogue and the index are caches."""
        shutil.rmtree(self.home.cache)
        self.home.cache.mkdir(mode=0o700)

    def grow(self) -> None:
        """The admin gives the guest a larger disk while it runs."""
        target = self.random.choice(list(self.model))
        size = len(self.model[target]) + self.random.choice([512, 65536, 200 << 10])
        if size > 12 << 20:
            return
        try:
            self.machine.monitor.execute("block_resize", node_name=target.upper(), size=size)
        except MonitorError as error:
            # QEMU resizes no image with a bitmap that its own death left inconsistent, whosever it is. The next point
            # heals the bitmap, and then it must be possible.
            assert "inconsistent" in str(error), error
            self.point()
            self.machine.monitor.execute("block_resize", node_name=target.upper(), size=size)
        self.model[target] += bytes(size - len(self.model[target]))

    # --- reverts, in a process of their own as the command line makes them ---

    def command(self, *words: str) -> subprocess.Popen:
        """`rewind` with these words."""
        argv = [sys.executable, "-m", "appliance.cli", "--home", self.home.path, "--connect", self.uri, *words]
        log = (self.folder / "rewind.log").open("ab")
        return subprocess.Popen([str(word) for word in argv], stdout=log, stderr=log, cwd=ROOT, start_new_session=True)

    def listed(self) -> list[str]:
        with self.session() as session:
            return [summary.id for summary in session.catalogue.points()]

    def adopt(self, content: dict[str, bytes]) -> None:
        """Points that verbs made by themselves, or before they were killed, hold this."""
        for point_id in self.listed():
            if point_id not in self.points:
                self.note(f"found {point_id}")
                self.points[point_id] = content

    def now(self) -> dict[str, bytes]:
        return {target: bytes(content) for target, content in self.model.items()}

    def wanted(self, point_id: str) -> dict[str, bytes]:
        """What the disks hold after a revert to the point: they keep their size, and what was not there is zero."""
        then = self.points[point_id]
        return {target: then[target].ljust(len(content), b"\0") for target, content in self.model.items()}

    def target(self) -> str:
        """A point at random, the future of an abandoned timeline included."""
        return self.random.choice(list(self.points))

    def revert(self, *, undo: bool = False, kill: str = "") -> str:
        """One revert, plain or instant; with `kill` some of `view`, `ours`, `qemu` die on the way and `resume` ends it.

        The guest writes as soon as it runs on the wanted instant. Returns how it ended.
        """
        if not self.points:
            return "none"
        self.flush()
        before = self.now()
        point_id = self.safety() if undo else self.target()
        if point_id is None:
            return "none"
        mode = self.random.choice([[], ["--instant"], ["--instant", "--rate", "3000000"]])
        words = ["undo", self.name] if undo else ["revert", self.name, "--to", point_id]
        child = self.command(*words, "--yes", "--wait", "30", *mode)
        killed = self._until_gone(child, point_id, kill)
        if killed or child.returncode:
            assert killed, f"revert failed with {child.returncode}: {self.words()}"
            return self._resumed(before, point_id)
        self.adopt(before)
        return "done"

    def safety(self) -> str | None:
        """The point that `undo` would take the domain to."""
        last = intent.load(self.home, self.uuid)
        if last is None or not last.ended or last.rolling_back or not last.safety_point:
            return None
        return last.safety_point if last.safety_point in self.points else None

    def _until_gone(self, child: subprocess.Popen, point_id: str, kill: str) -> bool:
        """Follow the revert while the guest writes. Whether something was killed."""
        moment = time.monotonic() + self.random.random() * 2.5 if kill else float("inf")
        switched = False
        while child.poll() is None:
            if time.monotonic() > moment:
                self._kill(child, kill)
                return True
            switched = switched or self._switched(point_id)
            if switched and not self._write_quietly():
                return True
            time.sleep(0.01)
        if not switched:
            self._become(self.wanted(point_id) if child.returncode == 0 else self.now())
        return False

    def _switched(self, point_id: str) -> bool:
        """Whether the guest runs on the wanted instant; its model does too, then."""
        try:
            drives = [
                self.machine.monitor.execute("qom-get", path=self.machine.device(target), property="drive")
                for target in self.model
            ]
            running = self.machine.monitor.execute("query-status")["running"]
        except (DomainLost, MonitorError):
            return False
        if not running or not all(drive.startswith("rw-rvo") for drive in drives):
            return False
        self._become(self.wanted(point_id))
        return True

    def _become(self, content: dict[str, bytes]) -> None:
        self.model = {target: bytearray(one) for target, one in content.items()}

    def _write_quietly(self) -> bool:
        keep = self.now()
        try:
            self.write()
            self.flush()
        except DomainLost:
            self._become(keep)
            return False
        return True

    def _kill(self, child: subprocess.Popen, kill: str) -> None:
        """SIGKILL to those that are named, all of them started for this revert or by this test."""
        victims = []
        if "ours" in kill or "all" in kill:
            victims.append(child.pid)
        if "view" in kill or "all" in kill:
            known = keeper.state(self.home, self.uuid)
            victims += [
                int(known[one].split(":")[0]) for one in ("view", *(["key"] if "all" in kill else [])) if known.get(one)
            ]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if "qemu" in kill or "all" in kill:
            self.kill()
        self.exit = child.wait(120)

    def _resumed(self, before: dict[str, bytes], point_id: str) -> str:
        """After a kill: which state there is; the machine runs again."""
        found = self._ended(before, point_id)
        self.start()
        self.adopt(before)
        return found

    def _ended(self, before: Mapping[str, bytes], point_id: str) -> str:
        """`resume` ends what there is to end; all disks hold the one state or the other, never a mix, and the model
        follows. The machine is off."""
        last = intent.load(self.home, self.uuid)
        if last is not None and not last.ended:
            child = self.command("resume", self.name, "--wait", "60")
            # 53: the keeper has ended it meanwhile.
            assert child.wait(300) in (0, 53), f"resume failed: {self.words()}"
        assert keeper.wait_gone(self.home, self.uuid), "the keeper does not end"
        if self.machine.process.poll() is None:
            self.power_off()
        now = self.read_disks()
        states = {"written": self.now(), "wanted": self.wanted(point_id), "before": before}
        found = [name for name, content in states.items() if all(same(now[t], content[t]) for t in now)]
        wrong = {name: {t: difference(now[t], content[t]) for t in now} for name, content in states.items()}
        assert found, f"{self.words()}\nthe disks are a mix after a kill: {wrong}"
        self._become(states[found[0]])
        return found[0]

    def note(self, text: str) -> None:
        """Into the log that a failed assertion shows."""
        with (self.folder / "rewind.log").open("a") as log:
            log.write(f"# {text}\n")

    def words(self) -> str:
        """The last that was done, that our commands said, and that QEMU said."""
        qemu = (self.folder / "qemu.log").read_text(errors="replace").splitlines()
        odd = [line for line in qemu if "ops" not in line and not line.startswith(("wrote", "discard", "read "))]
        return (self.folder / "rewind.log").read_text()[-40_000:] + "\nQEMU: " + "\n".join(odd[-5:])

    def read_disks(self) -> dict[str, bytes]:
        """What the images hold; the machine is off."""
        found = {}
        for target, path in self.paths.items():
            raw = self.folder / f"{target}.now"
            self._tool("convert", "-f", path.suffix[1:], "-O", "raw", path, raw)
            found[target] = raw.read_bytes()
            raw.unlink()
        return found

    # --- the truth ---

    def check_disks(self) -> None:
        """The images hold what the guest wrote; the machine is off."""
        for target, content in self.read_disks().items():
            wrong = difference(content, self.model[target])
            assert same(content, self.model[target]), f"{self.words()}\n{target} differs in chunks {wrong}"

    def check_point(self, point_id: str) -> None:
        """The point reads back as it was."""
        with self.session() as session:
            point = session.repository.point(point_id)
            for target, content in self.points[point_id].items():
                disk = point.disk(target)
                assert disk.size == len(content), (point_id, target, disk.size, len(content))
                view = DiskView(session.repository, disk.map, 8 << 20)
                got = b"".join(view.pread(at, min(1 << 20, disk.size - at)) for at in range(0, disk.size, 1 << 20))
                wrong = difference(got, content)
                assert same(got, content), f"{self.words()}\npoint {point_id}: {target} differs in chunks {wrong}"

    def check_all_points(self) -> None:
        with self.session() as session:
            listed = {summary.id for summary in session.catalogue.points()}
        missing = set(self.points) - listed
        assert not missing, f"points that were promised are not listed: {missing}"
        for point_id in self.points:
            self.check_point(point_id)

    def check_graph(self) -> None:
        """Nothing of ours is left in the machine's block graph."""
        names = [node["node-name"] for node in self.machine.monitor.execute("query-named-block-nodes", flat=True)]
        assert not [name for name in names if name.startswith("rw-")], names
        assert not self.machine.monitor.execute("query-jobs")


def same(a, b) -> bool:
    return bytes(a) == bytes(b)


def difference(a, b) -> list[int]:
    """First chunks that differ, for the message."""
    chunks = range(0, max(len(a), len(b)), 65536)
    return [at // 65536 for at in chunks if a[at : at + 65536] != b[at : at + 65536]][:10]
