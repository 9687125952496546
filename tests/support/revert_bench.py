"""A protected bare QEMU with a home, a repository and a model of every disk, for tests of reverts."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from appliance.capture import epoch, protection
from appliance.config import Home, Settings
from appliance.hypervisor import connect
from appliance.restore import intent as intents
from appliance.restore import keeper
from appliance.restore.revert import Reverter
from appliance.store import Repository, RepositorySpec, open_backend
from appliance.units import CHUNK, MiB
from tests.support.bare import Machine

__all__ = ["Bench"]


class Bench:
    """`models` are what the disks hold now, `points` what they held: point id → {target: bytes}."""

    def __init__(self, targets=("vda",), *, size=16 * MiB - 1536, kind="qcow2", iothread=False, seed=1, **settings):
        # pytest's own folders have names too long for a socket.
        self.folder = folder = Path(tempfile.mkdtemp(prefix="rw-"))
        self.rand = random.Random(seed)
        self.size = size
        self.home = Home(folder / "home")
        self.home.create()
        (self.home.path / "rewind.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
        self.settings = Settings(**settings)
        url = f"file://{folder}/repo"
        Repository.create(open_backend(url), cache=self.home.cache, key=None).close()
        self.spec = RepositorySpec(url, self.home.cache)
        self.repo = self.spec.open()
        disks = {}
        self.models, self.points = {}, {}
        for target in targets:
            disks[target] = folder / f"{target}.{kind}"
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, disks[target], str(size)], check=True)
            self.models[target] = bytearray(size)
        self.machine = Machine(folder, disks, iothread)
        self.uri = self.machine.uri
        self.hypervisor = None

    def start(self):
        """Start QEMU and protect it; a bare QEMU that is started again goes on with its record."""
        self.machine.start()
        self.hypervisor = connect(self.uri)
        self.domain = self.hypervisor.domain("bare")
        if protection.load(self.home, self.domain.uuid) is None:
            protection.save(self.home, protection.new(self.repo, self.domain, ()))
        return self

    @property
    def uuid(self):
        return self.domain.uuid

    def record(self):
        return protection.load(self.home, self.uuid)

    def reverter(self, progress=lambda *_: None):
        return Reverter(self.home, self.settings, self.spec, self.repo, self.domain, self.home.path / "none", progress)

    def intent(self):
        return intents.load(self.home, self.uuid)

    def scribble(self, count=30, longest=5):
        """Guest writes of one repeated byte, zeroes too, at random places of all disks."""
        for _ in range(count):
            target = self.rand.choice(list(self.models))
            length = 512 * self.rand.randrange(1, 1 + longest * CHUNK // 512)
            offset = 512 * self.rand.randrange((self.size - length) // 512)
            byte = self.rand.randrange(1, 256) if self.rand.random() > 0.15 else 0
            self.last_write = (target, offset, length, byte)
            if byte:
                self.machine.write(target, self.models[target], offset, length, byte)
            else:
                self.machine.zero(target, self.models[target], offset, length)

    def point(self):
        """Take a point and remember what it must hold."""
        taken = epoch.take(self.domain, self.spec, self.home, self.settings, self.record(), self.repo, quiesce="never")
        return self.remember(taken.point)

    def remember(self, point):
        self.points[point.id] = {target: bytes(model) for target, model in self.models.items()}
        return point

    def now_is(self, point, targets=None):
        """The models become what they were at the point."""
        for target in targets or self.models:
            self.models[target] = bytearray(self.points[point.id][target])

    def reads_right(self, count=20):
        """Whether random reads by the guest equal the model; only runs of one byte can be asked for."""
        for _ in range(count):
            target = self.rand.choice(list(self.models))
            model = self.models[target]
            offset = 512 * self.rand.randrange(self.size // 512)
            end = offset + 512
            while end < self.size and end - offset < CHUNK and model[end : end + 512] == model[offset : offset + 512]:
                end += 512
            if len(set(model[offset:end])) == 1 and not self.machine.same(target, offset, end - offset, model[offset]):
                return False
        return True

    def images_equal(self, before=None, *, killed=False):
        """Names of the images on disk, QEMU gone, that are not as the models. `before`: the models before a write
        that may or may not have been made, sector by sector; it is not known to the models then. A QEMU that was
        `killed` may leave clusters that are counted and belong to nothing (qemu-img's exit code 3), and no other harm.
        """
        wrong = []
        for target, model in self.models.items():
            out = self.folder / "out.raw"
            image = self.machine.disks[target]
            if image.suffix == ".qcow2":
                checked = subprocess.run(["qemu-img", "check", "-q", image], check=False)
                assert checked.returncode in ((0, 3) if killed else (0,)), image
            subprocess.run(["qemu-img", "convert", "-O", "raw", image, out], check=True)
            found = out.read_bytes()[: self.size]
            for offset in range(0, self.size, 512):
                sector = found[offset : offset + 512]
                if sector != model[offset : offset + 512] and (
                    before is None or not self.may_be(target, offset, sector, before)
                ):
                    wrong.append(target)
                    break
        return wrong

    def may_be(self, target, offset, sector, before):
        """Whether a sector can come from the write that was in flight, or from before it."""
        if sector == before[target][offset : offset + 512]:
            return True
        where, start, length, byte = self.last_write
        return where == target and start <= offset < start + length and sector == bytes([byte]) * 512

    def ours(self):
        """Nodes and jobs of ours that are in the graph."""
        nodes = self.machine.monitor.execute("query-named-block-nodes", flat=True)
        names = [n["node-name"] for n in nodes] + [j["id"] for j in self.machine.monitor.execute("query-jobs")]
        return [name for name in names if name.startswith("rw-")]

    def keeper_pid(self):
        key = keeper.state(self.home, self.uuid).get("key", "")
        return int(key.partition(":")[0]) if key and keeper.lives(key) else None

    def view_pid(self):
        key = keeper.state(self.home, self.uuid).get("view", "")
        return int(key.partition(":")[0]) if key and keeper.lives(key) else None

    def kill(self, *what, number=signal.SIGKILL):
        """Kill `view`, `keeper`, `qemu`."""
        for name in what:
            if name == "qemu":
                self.machine.kill()
                continue
            pid = self.view_pid() if name == "view" else self.keeper_pid()
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, number)

    def wait_ended(self, timeout=20):
        deadline = time.monotonic() + timeout
        while (found := self.intent()) is not None and not found.ended:
            assert time.monotonic() < deadline, found.phase
            time.sleep(0.05)
        return found

    def close(self):
        self.kill("keeper")
        for _ in range(50):
            if self.keeper_pid() is None:
                break
            time.sleep(0.02)
        self.kill("view")
        if self.hypervisor is not None:
            self.hypervisor.close()
        self.machine.kill()
        self.repo.close()
        if "REWIND_KEEP" not in os.environ:
            shutil.rmtree(self.folder, ignore_errors=True)
