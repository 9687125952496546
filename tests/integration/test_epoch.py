"""Epochs of a live guest: each point is one instant, only what is dirty moves, and no fault reaches the guest."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from appliance.capture import work
from appliance.errors import DomainBusy, PushFailed
from appliance.hypervisor.graph import base
from appliance.units import CHUNK, KiB, MiB
from tests.support import limits, stamps
from tests.support.begin import beginning
from tests.support.protect import Once, image_content
from tests.support.tiny import TinyDisk, make_disk

BOTH = ("qmp", "libvirt")


def on(*kinds):
    """Which driver the guest of a test runs under: both where they could differ, else one, for the time it takes."""
    return pytest.mark.parametrize("start", kinds, indirect=True)


@pytest.fixture
def start(request, tmp_path):
    """start(disks, **options): a guest of either kind, booted, and its domain protected. Each disk is a function that
    gets the folder and gives a TinyDisk."""
    with beginning(request, tmp_path, "epoch") as begin:
        yield begin


def plain(name, size=64 * MiB, form="qcow2", options="", chained=False, **kind):
    def make(folder):
        below = TinyDisk(make_disk(folder / f"{name}-base.qcow2", size)) if chained else None
        path = make_disk(folder / f"{name}.{form}", size, form, backing=below, options=options)
        return TinyDisk(path, form, **kind)

    return make


def exact(world, guest, point, expected=(0, 0, 0)):
    """The point is one instant of the guest, over all its disks."""
    readers = [world.reader(point, target) for target in guest.targets]
    state = stamps.check(readers, guest.layout, expected)
    assert state.exact, state.messages
    return state.seq


def same_as_images(world, guest, point):
    """With the writers stopped: the point is what an independent reader finds in the images."""
    for target, disk in zip(guest.targets, guest.disks, strict=True):
        content = world.content(point, target)
        assert content == image_content(disk.path, disk.format)[: len(content)], target


def scatter(guest, count, seed):
    """Random blocks beyond what the writers stamp."""
    answer = guest.ask(f"scatter {guest.targets[0]} {count} {seed} {16 * MiB} {64 * MiB}")
    assert answer["ok"], answer


def limit(world, rate):
    world.settings = replace(world.settings, rate_limit=rate)


def unharmed(guest):
    stats = guest.ask("stats reset")
    assert stats["errors"] == 0, stats
    return stats


@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("start", "disks"),
    [
        pytest.param("qmp", [plain("a", iothread=True), plain("b")], id="qmp-virtio"),
        pytest.param("libvirt", [plain("a", iothread=True), plain("b")], id="libvirt-virtio"),
        pytest.param(
            "libvirt", [plain("a", chained=True), plain("b", 40 * MiB + 512, "raw", iothread=True)], id="chain-raw"
        ),
        # One disk: a guest's kernel may name two SATA disks the other way round.
        pytest.param("qmp", [plain("a", options="compat=0.10", bus="sata")], id="sata-v2"),
        pytest.param("libvirt", [plain("a", bus="scsi"), plain("b", bus="scsi")], id="scsi"),
    ],
    indirect=["start"],
)
def test_points_of_a_writing_guest_are_instants(start, disks):
    """P5-01, A10: several epochs under load over all disks, then one of a quiet guest against the images."""
    guest, world = start(*disks)
    guest.ask("start 40")
    seen = [exact(world, guest, world.point()) for _ in range(3)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    stopped = guest.ask("stop")
    unharmed(guest)
    last = world.point()
    exact(world, guest, last, stopped["seq"])
    same_as_images(world, guest, last)
    world.nothing_left()
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)


@on("qmp")
@pytest.mark.timeout(60)
def test_only_dirty_granules_move(start):
    """A4: at most 1.02 times the dirty bytes move, and a quiet epoch moves and stores nothing."""
    guest, world = start(plain("a", 128 * MiB))
    scatter(guest, 400, 1)
    first = world.point()
    scatter(guest, 100, 2)
    monitor = world.domain.monitor()
    (node,) = [n for n in monitor.execute("query-named-block-nodes", flat=True) if n.get("dirty-bitmaps")]
    dirty = sum(bitmap["count"] for bitmap in node["dirty-bitmaps"])
    second = world.point()
    assert first.stats.moved_bytes >= 300 * CHUNK
    assert 300 <= first.stats.new_chunks <= first.stats.moved_bytes // CHUNK
    assert 0 < second.stats.new_chunks <= dirty // CHUNK
    assert dirty > 50 * CHUNK
    assert second.stats.moved_bytes <= 1.02 * dirty
    assert second.disk("vda").changed_bytes <= dirty
    third = world.point()
    assert third.stats.moved_bytes == 0
    assert third.disk("vda").map.root == second.disk("vda").map.root
    assert third.stats.stored_bytes <= 16 * KiB
    assert third.stats.new_chunks == 0


def stands_still(monitor):
    """A job that failed has changed nothing in the graph: QEMU may be in the middle of a reset, which 7.2 can then end
    by aborting."""
    jobs = [job["id"] for job in base.jobs(monitor)]
    deadline = time.monotonic() + limits.limit(5)
    while not (broken := base.broken_off(monitor, jobs)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert set(broken.values()) == {"failed"}
    nodes = {node["node-name"] for node in monitor.execute("query-named-block-nodes", flat=True)}
    assert nodes >= {f"{name}-f" for name in broken}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("start", "fault"), [("libvirt", "kill"), ("qmp", "stop")], indirect=["start"])
def test_dead_or_hung_intake_costs_the_guest_nothing(start, fault):
    """P5-05, A5: the epoch fails, the guest sees no error, and the next point has everything."""
    guest, world = start(plain("a", iothread=True), plain("b"))
    world.point()
    guest.ask("start 100")
    scatter(guest, 200, 3)
    limit(world, 4 * MiB)

    def befall():
        os.kill(world.intake_pid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        if fault == "kill":
            stands_still(world.domain.monitor())

    with pytest.raises(PushFailed):
        world.point(progress=Once(befall))
    world.nothing_left()
    unharmed(guest)
    limit(world, 0)
    exact(world, guest, world.point())
    stopped = guest.ask("stop")
    last = world.point()
    exact(world, guest, last, stopped["seq"])
    same_as_images(world, guest, last)
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)


@on("libvirt")
@pytest.mark.timeout(60)
def test_guest_reset_in_mid_epoch(start):
    """P5-06, A5: the guest is reset while its epoch is pushed; the point is the instant before."""
    guest, world = start(plain("a", iothread=True))
    world.point()
    limit(world, 4 * MiB)
    guest.ask("start 50")
    scatter(guest, 200, 3)
    point = world.point(progress=Once(world.domain.reset))
    exact(world, guest, point)
    world.nothing_left()
    guest.channel.wait_up(2)
    stopped = guest.ask("state")
    assert stopped["exact"]
    last = world.point()
    exact(world, guest, last, stopped["seq"])


@on("libvirt")
@pytest.mark.timeout(60)
def test_suspended_by_the_admin_stays_so(start):
    """P5-02: a guest that is suspended in the middle of an epoch is not resumed by us."""
    guest, world = start(plain("a"))
    world.point()
    limit(world, 4 * MiB)
    guest.ask("start 50")
    scatter(guest, 100, 3)
    point = world.point(progress=Once(world.domain.suspend))
    assert world.domain.state().value == "paused"
    exact(world, guest, point)
    exact(world, guest, world.point())
    assert world.domain.state().value == "paused"
    world.domain.resume()
    unharmed(guest)
    world.nothing_left()


@on(*BOTH)
@pytest.mark.timeout(150)
def test_killed_at_any_command(start):
    """P5-03, A5: our process is killed after any of its QMP commands; the guard puts the guest right within moments,
    and the next point is exact."""
    guest, world = start(plain("a", iothread=True), plain("b"))
    world.point()
    world.hypervisor.close()
    guest.ask("start 30")
    uri = world.hypervisor.uri
    command = [sys.executable, "-m", "tests.support.die", str(world.folder), uri, guest.name]
    total = int(subprocess.run([*command, "100000"], check=True, capture_output=True, text=True).stdout)
    assert total > 40
    slowest = 0.0
    for number in random.Random(5).sample(range(5, total), 6):
        died = subprocess.run([*command, str(number)], capture_output=True, text=True)
        assert died.returncode == -signal.SIGKILL, died.stderr
        begun = time.monotonic()
        while guest.qmp("query-status")["status"] != "running":
            assert time.monotonic() < begun + 10, f"still paused, killed after command {number}"
            time.sleep(0.01)
        slowest = max(slowest, time.monotonic() - begun)
        wait_clean(guest)
        unharmed(guest)
    print(f"of {total} commands; resumed within {slowest:.2f} s")
    world.reload()
    exact(world, guest, world.point())
    stopped = guest.ask("stop")
    last = world.point()
    exact(world, guest, last, stopped["seq"])
    same_as_images(world, guest, last)
    world.nothing_left()
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)


def wait_clean(guest):
    """Until the guard has done its work."""
    limit = time.monotonic() + 15
    while ours := [n["node-name"] for n in guest.qmp("query-named-block-nodes", flat=True) if "rw-" in n["node-name"]]:
        assert time.monotonic() < limit, ours
        time.sleep(0.05)


@on("qmp")
@pytest.mark.timeout(60)
def test_slow_push_copies_before_writes(start):
    """P5-01: what the guest overwrites while it is pushed is still taken as it was."""
    guest, world = start(plain("a", iothread=True), plain("b"))
    world.point()
    limit(world, 6 * MiB)
    guest.ask("start")
    time.sleep(1)
    for _ in range(2):
        exact(world, guest, world.point())
    guest.ask("stop")
    unharmed(guest)
    world.nothing_left()


@on("qmp")
@pytest.mark.timeout(60)
def test_resized_when_the_point_had_just_begun(start, monkeypatch):
    """P5-13: between the plan and the freeze a disk grows: one sentence, and the next point is exact."""
    guest, world = start(plain("a"), plain("b"))
    world.point()
    guest.ask("start 50")
    real = work.frozen

    def resize_first(*arguments):
        node = world.domain.disks()[0].node
        world.domain.monitor().execute("block_resize", node_name=node, size=80 * MiB)
        return real(*arguments)

    monkeypatch.setattr(work, "frozen", resize_first)
    with pytest.raises(DomainBusy, match="vda was resized when the point had just begun") as caught:
        world.point()
    assert "new size" in caught.value.hint
    monkeypatch.setattr(work, "frozen", real)
    world.nothing_left()
    unharmed(guest)
    point = world.point()
    assert point.disk("vda").size == 80 * MiB
    exact(world, guest, point)
    guest.ask("stop")
    same_as_images(world, guest, world.point())


@on("libvirt")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("when", ["between", "during"])
def test_snapshot_by_somebody_else(start, when):
    """P5-08, A11: a disk-only snapshot between or during epochs; the union over the chain is exact."""
    guest, world = start(plain("a", iothread=True), plain("b"))
    world.point()
    limit(world, 6 * MiB)
    guest.ask("start 60")
    scatter(guest, 100, 3)

    def snapshot():
        command = ["virsh", "-q", "-c", guest.uri, "snapshot-create-as", guest.name, "--disk-only", "--no-metadata"]
        for target in guest.targets:
            command += ["--diskspec", f"{target},file={guest.folder}/{target}-{time.time_ns()}.qcow2"]
        subprocess.run(command, check=True, capture_output=True)

    if when == "during":
        exact(world, guest, world.point(progress=Once(snapshot)))
    else:
        snapshot()
        scatter(guest, 50, 4)
    exact(world, guest, world.point())
    snapshot()
    exact(world, guest, world.point())
    for target in guest.targets:
        command = ["virsh", "-q", "-c", guest.uri, "blockcommit", guest.name, target, "--active", "--pivot", "--wait"]
        subprocess.run(command, check=True, capture_output=True)
    exact(world, guest, world.point())
    guest.ask("stop")
    last = world.point()
    same_as_images(world, guest, last)
    world.nothing_left()
    unharmed(guest)
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)
