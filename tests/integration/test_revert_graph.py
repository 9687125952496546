"""The block graph of a revert in a real QEMU, against a model, with nbdkit's file plugin as the view."""

import random
import subprocess
import time

import pytest

from appliance.hypervisor.graph import retrieval, switching
from appliance.hypervisor.graph.chain import Chain, Place, place
from appliance.restore.patch import write_patch
from appliance.units import CHUNK, MiB
from tests.support.bare import Machine

SIZE = 24 * MiB - 512 * 7
UNIT = CHUNK // 32


class View:
    """nbdkit over a raw file; counts what is read from it by its log."""

    def __init__(self, folder, content, name="view", writable=False):
        self.writable = writable
        self.file = folder / f"{name}.raw"
        self.file.write_bytes(content)
        self.socket = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        self.start()

    def start(self):
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                "nbdkit",
                "-f",
                *([] if self.writable else ["-r"]),
                "-U",
                str(self.socket),
                "--filter=log",
                "file",
                str(self.file),
                f"logfile={self.log}",
                "logappend=true",
            ]  # fmt: skip
        )
        while not self.socket.exists():
            time.sleep(0.01)

    def requests(self, kind):
        """(offset, length) of every request of that kind so far."""
        found = []
        for line in self.log.read_text().splitlines():
            if f" {kind} " in line and "offset=" in line:
                words = dict(word.split("=", 1) for word in line.split() if "=" in word)
                found.append((int(words["offset"], 0), int(words["count"], 0)))
        return found

    def kill(self):
        self.process.kill()
        self.process.wait()


def differing(now, target):
    """(chunk, mask, zero) by 2 KiB."""
    for chunk in range(-(-len(now) // CHUNK)):
        a, b = now[chunk * CHUNK :][:CHUNK], target[chunk * CHUNK :][:CHUNK]
        if a == b:
            continue
        mask = sum(1 << i for i in range(32) if a[i * UNIT :][:UNIT] != b[i * UNIT :][:UNIT])
        yield chunk, mask, not any(b)


def scattered(rand, size, changes):
    """A disk and an older state of it: scattered 4 KiB changes, some chunks zero, some big ones."""
    now = bytearray(rand.randbytes(size))
    target = bytearray(now)
    for _ in range(changes):
        offset = rand.randrange(size // 4096) * 4096
        length = min(4096 * rand.choice([1, 1, 1, 2, 40]), size - offset)
        target[offset : offset + length] = rand.randbytes(length)
    for _ in range(5):
        chunk = rand.randrange(size // CHUNK)
        target[chunk * CHUNK : (chunk + 1) * CHUNK] = bytes(CHUNK)
    return now, target


class Bench:
    """One or more disks, their views, patches and overlays."""

    def __init__(self, folder, rand, targets=("vda",), iothread=False, kind="qcow2", changes=40):
        self.folder = folder
        self.now, self.target, self.views, self.chains, disks = {}, {}, {}, [], {}
        for number, name in enumerate(targets):
            now, target = scattered(rand, SIZE, changes)
            raw = folder / f"{name}-now.raw"
            raw.write_bytes(now)
            disks[name] = folder / f"{name}.{kind}"
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, disks[name]], check=True)
            self.now[name], self.target[name] = now, target
            self.views[name] = View(folder, target, name)
            patch, overlay = folder / f"{name}-P", folder / f"{name}-O"
            self.info = write_patch(patch, SIZE, differing(now, target))
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", overlay, str(SIZE)], check=True
            )
            self.chains.append(
                Chain(
                    name,
                    name.upper(),
                    Machine.device(name),
                    str(disks[name]),
                    patch,
                    overlay,
                    self.views[name].socket,
                    "",
                    30,
                    number,
                )  # fmt: skip
            )
        self.machine = Machine(folder, disks, iothread).start()
        self.monitor = self.machine.monitor

    def close(self):
        self.machine.kill()
        for view in self.views.values():
            view.kill()

    def image_equals(self, name, model):
        """Whether the image, read by qemu-img after QEMU has gone, is exactly the model."""
        out = self.folder / "out.raw"
        subprocess.run(
            ["qemu-img", "check", "-q", self.machine.disks[name]], check=self.machine.disks[name].suffix == ".qcow2"
        )
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.machine.disks[name], out], check=True)
        return out.read_bytes()[:SIZE] == bytes(model)


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(seed=1, **options):
        made.append(Bench(tmp_path, random.Random(seed), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def switch(bench):
    """As a revert does it; the seconds of the pause."""
    begun = time.monotonic()
    with switching.stopped(bench.monitor):
        switching.switch(bench.monitor, bench.chains)
        switching.power_cycle(bench.monitor)
    return time.monotonic() - begun


def finish(bench, speed=0):
    for chain in bench.chains:
        retrieval.hydrate(bench.monitor, chain, speed)
    retrieval.wait_ready(bench.monitor, bench.chains)
    with switching.stopped(bench.monitor):
        retrieval.complete(bench.monitor, bench.chains)


def ours(monitor):
    return [
        n["node-name"]
        for n in monitor.execute("query-named-block-nodes", flat=True)
        if n["node-name"].startswith("rw-")
    ]


@pytest.mark.parametrize(("iothread", "targets", "kind"), [(False, ("vda",), "raw"), (True, ("vda", "vdb"), "qcow2")])
def test_instant(bench, iothread, targets, kind):
    """P5-04 P5-05 P5-07 P5-09: the guest sees the target at once, writes meanwhile, and ends on its own disk."""
    b = bench(iothread=iothread, targets=targets, kind=kind)
    if iothread:
        time.sleep(4)
    pause = switch(b)
    assert [place(b.monitor, chain) for chain in b.chains] == [Place.SWITCHED] * len(targets)
    rand = random.Random(3)
    # Stopped, for the monitor's own I/O on a disk with an active iothread can trip an assertion of QEMU 7.2.
    with switching.stopped(b.monitor):
        for name in targets:
            for _ in range(15):
                offset = rand.randrange(SIZE // 512 - 200) * 512
                b.machine.write(name, b.target[name], offset, 512 * rand.randrange(1, 200), rand.randrange(1, 256))
            b.machine.zero(name, b.target[name], 3 * CHUNK + 512, 5 * CHUNK)
            assert b.machine.same(name, 3 * CHUNK + 512, 5 * CHUNK, 0)
    finish(b)
    assert ours(b.monitor) == []
    assert b.monitor.execute("query-status")["running"]
    b.machine.quit()
    for name in targets:
        assert b.image_equals(name, b.target[name])
    assert pause < 5


def test_only_what_differs_moves(tmp_path):
    """A3 P5-04: read from the view and written to the disk is what differs, by 2 KiB, counted at both servers."""
    now, target = scattered(random.Random(8), SIZE, 60)
    disk, view = View(tmp_path, now, "disk", writable=True), View(tmp_path, target, "view")
    marks = list(differing(now, target))
    info = write_patch(tmp_path / "P", SIZE, marks)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "O", str(SIZE)], check=True)
    machine = Machine(tmp_path, {"vda": disk.socket}).start()
    chain = Chain("vda", "VDA", machine.device("vda"), "disk", tmp_path / "P", tmp_path / "O", view.socket, "", 30)
    try:
        with switching.stopped(machine.monitor):
            switching.switch(machine.monitor, [chain])
            retrieval.hydrate(machine.monitor, chain)
            retrieval.wait_ready(machine.monitor, [chain])
            retrieval.complete(machine.monitor, [chain])
        machine.quit()
    finally:
        machine.kill()
        disk.kill()
        view.kill()
    assert disk.file.read_bytes() == bytes(target)
    assert sum(length for _, length in view.requests("Read")) == info.pending_bytes
    written = disk.requests("Write") + disk.requests("Zero")
    pending = {chunk * CHUNK + bit * UNIT for chunk, mask, _ in marks for bit in range(32) if mask >> bit & 1}
    touched = {start for offset, length in written for start in range(offset // UNIT * UNIT, offset + length, UNIT)}
    assert touched == pending


def test_an_error_before_the_guest_goes_on(bench):
    """Do no harm: when the second disk cannot be switched, both are on their own nodes again."""
    b = bench(targets=("vda", "vdb"))
    b.chains[1].overlay.unlink()
    with pytest.raises(OSError, match="No such file"), switching.stopped(b.monitor):
        switching.switch(b.monitor, b.chains)
    assert ours(b.monitor) == []
    b.machine.write("vda", b.now["vda"], 0, 4096, 7)
    b.machine.quit()
    assert b.image_equals("vda", b.now["vda"])


def test_view_killed_in_the_middle(bench):
    """Failure table: reads wait for the view that comes back, the job goes on, nothing is wrong."""
    b = bench(changes=300)
    switch(b)
    b.monitor.execute("block-commit", job_id="rw-rvh-vda", device="rw-rvo-vda", top_node="rw-rvp-vda", base_node="VDA",
                      speed=1 << 20, auto_dismiss=False)  # fmt: skip
    time.sleep(0.5)
    b.views["vda"].kill()
    time.sleep(0.5)
    b.views["vda"].start()
    b.monitor.execute("block-job-set-speed", device="rw-rvh-vda", speed=0)
    finish(b)
    b.machine.quit()
    assert b.image_equals("vda", b.target["vda"])
