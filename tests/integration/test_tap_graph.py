"""The tap in the block graph of a live guest: every write is in the journal, and nothing else notices.

The oracle is a replay: a copy of the disks at the attach, with the journal's records over it, is byte for byte what is
in the images after the writers have stopped. Long on purpose: one scene, and one oracle for whatever is done to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from appliance.capture import tap as capture
from appliance.capture.tap import Running
from appliance.config import Home
from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import DomainState
from appliance.hypervisor.graph import base, tap
from appliance.hypervisor.graph.tap import TapState
from appliance.journal import Kind
from appliance.process import process_key
from appliance.restore.revert import Reverter
from appliance.units import MiB
from tests.filter.journald import Journald
from tests.support import libvirt, stamps
from tests.support.begin import beginning
from tests.support.protect import image_content
from tests.support.tiny import TinyDisk, make_disk

BOTH = ("qmp", "libvirt")
# Both drivers do the same here; the other one only when there is time.
MOSTLY_LIBVIRT = (pytest.param("qmp", marks=pytest.mark.soak), "libvirt")
MOSTLY_QMP = ("qmp", pytest.param("libvirt", marks=pytest.mark.soak))


def on(*kinds):
    return pytest.mark.parametrize("start", kinds, indirect=True)


def plain(name, size=24 * MiB, form="qcow2", **kind):
    def make(folder):
        return TinyDisk(make_disk(folder / f"{name}.{form}", size, form), form, **kind)

    return make


class Hooked:
    """A monitor that calls `act` before each `command`."""

    def __init__(self, monitor, command, act):
        self.real, self.command, self.act = monitor, command, act
        self.domain, self.storage_daemon = monitor.domain, monitor.storage_daemon

    def execute(self, command, /, **arguments):
        if command == self.command:
            self.act()
        return self.real.execute(command, **arguments)

    def execute_with_fd(self, command, fd, /, **arguments):
        return self.real.execute_with_fd(command, fd, **arguments)


class Scene:
    """A guest, its protection and a journal for its disks."""

    def __init__(self, guest, world):
        self.guest, self.world = guest, world
        self.monitor = world.domain.monitor()
        self.disks = world.domain.disks()
        self.sizes = {disk.target: disk.size for disk in self.disks}
        # Sockets may have paths of 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="rewind-tap-"))
        folder.chmod(0o711)
        self.journald = Journald(folder, self.sizes, commit="20ms")
        self.base = {}

    def __enter__(self):
        self.start_journal()
        return self

    def start_journal(self):
        self.journald.start()
        process = self.world.domain.process()
        os.chown(self.journald.socket, process.uid, process.gid)

    def __exit__(self, *_):
        self.journald.__exit__()

    def attach(self):
        """Also keeps what is in the images at the very instant, while a guest that may be writing stands still."""
        took = []
        watched = Hooked(self.monitor, "blockdev-reopen", lambda: setattr(self, "base", self.base or self.images()))
        self.base = {}
        result = tap.attach(watched, self.disks, self.journald.socket, before=took.append)
        assert took == [True]
        return result

    def images(self):
        """What is in the images now, the guest flushed."""
        with base.paused(self.monitor):
            return {
                target: bytearray(image_content(disk.path, disk.format)[: self.sizes[target]])
                for target, disk in zip(self.guest.targets, self.guest.disks, strict=True)
            }

    def replayed(self, after=0):
        """The copies of the attach with the journal over them, from behind that record on."""
        images = {target: bytearray(data) for target, data in self.base.items()}
        with self.journald.journal() as journal:
            assert journal.verify() == [] and journal.holes() == []
            for record in journal.records(after + 1):
                if record.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
                    data = record.data if record.kind is Kind.WRITE else bytes(record.length)
                    images[record.disk][record.offset : record.offset + record.length] = data
        return images

    def known(self):
        """As if a tap process of the world's home had attached it."""
        journal = str(self.journald.control.status().fields["journal"])
        running = Running(
            process_key(os.getpid()), "attached", server=process_key(self.journald.process.pid), journal=journal,
            control_socket=str(self.journald.control_path), disks=tuple(self.sizes), spool=str(self.journald.spool),
        )  # fmt: skip
        self.world.home.run(self.world.domain.uuid).mkdir(exist_ok=True)
        capture.tell(self.world.home, self.world.domain.uuid, running)

    def states(self):
        return set(tap.state(self.monitor, self.disks).values())

    def write(self, seconds=1.0, rate=100):
        self.guest.ask(f"start {rate}")
        time.sleep(seconds)

    def stop(self):
        return self.guest.ask("stop")["seq"]

    def complete(self, after=0):
        """The guest is quiet, and the journal tells all that it wrote."""
        self.stop()
        now, replayed = self.images(), self.replayed(after)
        for target in now:
            assert replayed[target] == now[target], f"{target}: {differs(replayed[target], now[target])}"
        with self.journald.journal() as journal:
            return journal.last

    def unharmed(self):
        stats = self.guest.ask("stats reset")
        assert stats["errors"] == 0, stats
        return stats

    def gone(self):
        """As if there had never been a tap."""
        assert base.leftovers(self.monitor) == []
        limits = [one["name"] for one in self.monitor.execute("qom-list", path="/objects")]
        assert not [name for name in limits if name.startswith("rw-")]
        graph = base.nodes.read(self.monitor)
        assert [graph.devices[disk.device] for disk in self.disks] == [disk.node for disk in self.disks]
        assert self.world.domain.disks() == self.disks


def differs(one, other):
    places = [at for at in range(0, len(other), 512) if one[at : at + 512] != other[at : at + 512]]
    return f"{len(places)} sectors from {places[:5]}"


@pytest.fixture
def start(request, tmp_path):
    """start(disks) -> Scene."""
    opened = []
    with beginning(request, tmp_path, "tap") as begin:

        def scene(*disks, **options):
            opened.append(Scene(*begin(*disks, **options)).__enter__())
            return opened[-1]

        try:
            yield scene
        finally:
            for one in opened:
                one.__exit__()


@on(*BOTH)
@pytest.mark.timeout(90)
def test_every_write_is_in_the_journal(start):
    """P5-23, P5-38: two disks, one with an iothread, attached and taken off again and again under load."""
    scene = start(plain("a", iothread=True), plain("b"))
    scene.write(0.3)
    result = scene.attach()
    assert 0 < result.pause_seconds < 5
    assert scene.states() == {TapState.RUNNING}
    assert scene.world.domain.disks() == scene.disks, "the tap is not what the disks sit on"
    scene.write()
    assert scene.complete() > 100
    scene.write(0.3)
    tap.detach(scene.monitor, scene.disks)
    tap.detach(scene.monitor, scene.disks)
    assert scene.states() == {TapState.ABSENT}
    scene.gone()
    scene.unharmed()
    pauses = [result.pause_seconds]
    for _ in range(3):
        pauses.append(tap.attach(scene.monitor, scene.disks, scene.journald.socket).pause_seconds)
        time.sleep(0.2)
        tap.detach(scene.monitor, scene.disks)
    scene.gone()
    scene.unharmed()
    print("attach pauses", " ".join(f"{pause * 1000:.1f}" for pause in pauses), "ms")


def exact(scene, point, expected=(0, 0, 0)):
    """The point is one instant of the guest, over all its disks."""
    readers = [scene.world.reader(point, target) for target in scene.guest.targets]
    state = stamps.check(readers, scene.guest.layout, expected)
    assert state.exact, state.messages
    return state.seq


@on(*MOSTLY_LIBVIRT)
@pytest.mark.timeout(90)
def test_epochs_under_the_tap(start):
    """P5-23, P5-25: points are instants, only what is dirty moves, and the journal misses nothing meanwhile."""
    scene = start(plain("a", iothread=True), plain("b", 24 * MiB + 512, "raw"))
    scene.write(0.3)
    scene.attach()
    scene.known()
    seen = [exact(scene, scene.world.point()) for _ in range(3)]
    assert seen == sorted(seen) and seen[0] < seen[-1]
    assert scene.states() == {TapState.RUNNING}
    assert base.leftovers(scene.monitor, base.EPOCH) == []
    scene.complete()
    last = scene.world.point()
    now = scene.images()
    assert {target: scene.world.content(last, target) for target in now} == now
    assert not [note for point in scene.world.repo.points() for note in point.notes]
    scene.unharmed()
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    scene.world.nothing_left()


@on("qmp")
@pytest.mark.timeout(60)
def test_another_homes_tap_is_known_by_its_socket(start, tmp_path):
    """P5-31: a second home must not take a living one's place, which would go on to believe that it records."""
    scene = start(plain("a"), plain("b"))
    domain, home = scene.world.domain, Home(tmp_path / "other")
    assert capture.elsewhere(home, domain) == ""
    scene.attach()
    path = str(scene.journald.socket)
    assert tap.sinks(scene.monitor) == {disk.target: path for disk in scene.disks}
    assert capture.elsewhere(home, domain) == path
    scene.journald.kill()
    assert capture.elsewhere(home, domain) == "", "what is left of a dead one is in nobody's way"
    tap.detach(scene.monitor, scene.disks)
    assert tap.sinks(scene.monitor) == {}


@on("qmp")
@pytest.mark.timeout(90)
def test_a_revert_by_another_home_takes_the_tap_off(start):
    """P5-37: its journal cannot know of what is moved below it, and must not go on as if it did."""
    scene = start(plain("a", iothread=True), plain("b"))
    scene.write(0.3)
    scene.stop()
    first = scene.world.point()
    scene.write(0.3)
    scene.attach()
    reverts(scene, first, False)()
    assert scene.states() == {TapState.ABSENT}
    scene.gone()


@on("qmp")
@pytest.mark.timeout(60)
def test_dead_epoch_is_cleaned_below_the_tap(start):
    """P5-03: its filter, or a hole on which the guest was found paused, goes; the tap misses nothing."""
    scene = start(plain("a", iothread=True))
    monitor, (disk,) = scene.monitor, scene.disks
    scene.attach()

    def build():
        monitor.execute("blockdev-add", driver="null-co", node_name="rw-ep0-s", size=disk.size)
        monitor.execute("blockdev-add", driver="copy-before-write", node_name="rw-ep0-cbw", file=disk.node,
                        target="rw-ep0-s", discard="unmap")  # fmt: skip
        return "rw-ep0-cbw"

    scene.write(0.2)
    with base.paused(monitor):
        base.swap(monitor, disk, build)
    assert scene.world.domain.disks() == scene.disks
    time.sleep(0.2)
    assert set(base.clean(monitor)) == {"rw-ep0-s", "rw-ep0-cbw"}
    assert base.attached(monitor, disk.device) == disk.node
    monitor.execute("stop")
    base.make_hole(monitor, disk)
    base.attach(monitor, disk.device, base.hole_name(disk))
    assert base.clean(monitor, resume=True) == [base.hole_name(disk)]
    assert base.attached(monitor, disk.device) == disk.node
    assert scene.states() == {TapState.RUNNING}
    scene.complete()
    scene.unharmed()
    tap.detach(monitor, scene.disks)
    scene.gone()


@on(*MOSTLY_LIBVIRT)
@pytest.mark.timeout(150)
def test_reverts_under_the_tap(start):
    """P5-23: instant, plain and back; what the guest writes after the switch is in the journal, what we move is not."""
    scene = start(plain("a", iothread=True), plain("b"))
    guest, world = scene.guest, scene.world
    scene.write(0.5)
    first_seq = scene.stop()
    first = world.point()
    scene.write(0.3)
    scene.attach()
    scene.known()
    time.sleep(0.5)
    scene.complete()
    for revert in (reverts(scene, first, True), reverts(scene, first, False)):
        boots = guest.channel.boots
        place = scene.journald.control.status().written
        result = revert()
        guest.channel.wait_up(boots + 1)
        answer = guest.ask("state {} {} {}".format(*first_seq))
        assert answer["exact"] and answer["seq"] == first_seq, answer
        assert scene.states() == {TapState.RUNNING}
        assert base.leftovers(scene.monitor, base.REVERT) == []
        scene.base = {target: bytearray(world.content(first, target)) for target in scene.sizes}
        scene.write(0.5)
        scene.complete(place)
        world.reload()
        print(f"revert's pause {result.pause_seconds:.3f} s")
    boots = guest.channel.boots
    undone = Reverter(world.home, world.settings, world.spec, world.repo, world.domain, world.home.path / "no").undo()
    assert undone.point == result.safety_point
    guest.channel.wait_up(boots + 1)
    assert scene.images() == {target: world.content(world.repo.point(undone.point), target) for target in scene.sizes}
    scene.unharmed()
    world.reload()
    world.point()
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    world.nothing_left()


def reverts(scene, point, instant):
    world = scene.world
    reverter = Reverter(world.home, world.settings, world.spec, world.repo, world.domain, world.home.path / "no")
    return lambda: reverter.revert(point, instant=instant)


@on(*MOSTLY_QMP)
@pytest.mark.timeout(90)
def test_dead_sink_costs_the_guest_nothing(start):
    """P5-24: the journal's process is killed under load; no error in the guest, the tap is taken off and put on."""
    scene = start(plain("a", iothread=True), plain("b"))
    scene.attach()
    scene.write(0.5, rate=0)
    scene.journald.kill()
    eventually(lambda: scene.states() == {TapState.BROKEN}, "no mirror has noticed")
    assert base.clean(scene.monitor) == []
    with pytest.raises(DomainBusy):
        tap.attach(scene.monitor, scene.disks, scene.journald.socket)
    exact(scene, scene.world.point())
    assert scene.states() == {TapState.BROKEN}, "what is left of a tap is its process's business"
    stats = scene.unharmed()
    print(f"longest write {stats['longest_us'] / 1000:.1f} ms" if "longest_us" in stats else stats)
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    with pytest.raises(MonitorError):
        tap.attach(scene.monitor, scene.disks, scene.journald.socket)
    scene.gone()
    assert scene.world.domain.state() is DomainState.RUNNING
    scene.start_journal()
    place = scene.journald.control.status().written
    scene.attach()
    scene.write(0.2)
    scene.complete(place)
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    scene.unharmed()


@on("qmp")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("verb", ["detach", "attach"])
def test_hung_sink_is_killed_meanwhile(start, verb):
    """P5-24: the journal's process hangs under load and is killed by its watchdog while we work: the guest waited no
    longer than that, and the verb ends."""
    scene = start(plain("a", iothread=True))
    if verb == "detach":
        scene.attach()
    scene.write(0.2, rate=0)
    scene.journald.process.send_signal(signal.SIGSTOP)
    dog = threading.Timer(0.5, scene.journald.kill)
    begun = time.monotonic()
    dog.start()
    if verb == "detach":
        tap.detach(scene.monitor, scene.disks)
    else:
        with pytest.raises(MonitorError):
            tap.attach(scene.monitor, scene.disks, scene.journald.socket)
    assert 0.4 < time.monotonic() - begun < 5
    dog.join()
    scene.gone()
    scene.stop()
    scene.unharmed()


@on("libvirt")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("iothread", "mode"), [(False, "pull"), pytest.param(True, "push", marks=pytest.mark.soak)])
def test_others_work_while_tapped(start, iothread, mode):
    """P5-28: snapshot, backup, reset and suspend go on under the tap; commit is possible as soon as it is off.

    QEMU before 9.0 dies of a pull backup of a disk with an iothread: at its end in any case, under a tap at its begin.
    """
    scene = start(plain("a", iothread=iothread), plain("b"))
    guest = scene.guest
    scene.attach()
    scene.known()
    scene.write(0.3)
    words = ["snapshot-create-as", guest.name, "--disk-only", "--no-metadata"]
    for target in guest.targets:
        words += ["--diskspec", f"{target},file={guest.folder}/{target}-over.qcow2"]
    libvirt.virsh(*words)
    overlays = [TinyDisk(guest.folder / f"{target}-over.qcow2") for target in guest.targets]
    guest.disks, below = overlays, guest.disks
    scene.write(0.3)
    libvirt.virsh("backup-begin", guest.name, str(backup_xml(guest, mode)))
    if mode == "pull":
        with pytest.raises(DomainBusy):
            scene.world.domain.disks()
        libvirt.virsh("domjobabort", guest.name)
    eventually(lambda: "None" in libvirt.virsh("domjobinfo", guest.name).stdout, "the backup does not end")
    libvirt.virsh("suspend", guest.name)
    assert scene.states() == {TapState.RUNNING}
    libvirt.virsh("resume", guest.name)
    now = scene.world.domain.disks()
    assert [one.target for one in now] == [one.target for one in scene.disks]
    assert [one.node for one in now] != [one.node for one in scene.disks]
    scene.disks = now
    exact(scene, scene.world.point())
    scene.write(0.2)
    scene.complete()
    boots = guest.channel.boots
    libvirt.virsh("reset", guest.name)
    guest.channel.wait_up(boots + 1)
    scene.write(0.2)
    scene.complete()
    refused = libvirt.virsh("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait", check=False)
    assert refused.returncode != 0
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    for target in guest.targets:
        libvirt.virsh("blockcommit", guest.name, target, "--active", "--pivot", "--wait")
    guest.disks = below
    scene.disks = scene.world.domain.disks()
    scene.unharmed()
    scene.attach()
    scene.write(0.2)
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    exact(scene, scene.world.point())
    scene.world.nothing_left()


def backup_xml(guest, mode):
    """A backup of all disks; in pull mode it stays until it is ended."""
    path = guest.folder / "backup.xml"
    what = f"<server transport='unix' socket='{guest.folder}/backup.sock'/>"
    if mode == "push":
        files = (f"<target file='{guest.folder}/{target}-backup.qcow2'/>" for target in guest.targets)
        named = zip(guest.targets, files, strict=True)
        what = "".join(f"<disk name='{target}' type='file'>{file}</disk>" for target, file in named)
        what = f"<disks>{what}</disks>"
    path.write_text(f"<domainbackup mode='{mode}'>{what}</domainbackup>")
    return path


@on("qmp")
@pytest.mark.soak
@pytest.mark.timeout(120)
def test_instant_revert_of_a_guest_that_writes_at_once(start):
    """P5-17, P5-23: the commits under the mirror run while the guest writes through it, with an iothread."""
    scene = start(plain("a", iothread=True), plain("b"), auto_rate=60)
    guest, world = scene.guest, scene.world
    first = world.point()
    scene.attach()
    scene.known()
    time.sleep(0.5)
    place = scene.journald.control.status().written
    boots = guest.channel.boots
    reverts(scene, first, True)()
    guest.channel.wait_up(boots + 1)
    assert scene.states() == {TapState.RUNNING}
    scene.stop()
    answer = guest.ask("state")
    assert answer["exact"] and min(answer["seq"]) > 0, answer
    # Records between `place` and the switch are of the future that was left: they end where the guest was reset.
    with scene.journald.journal() as journal:
        assert journal.last > place
    world.reload()
    last = world.point()
    assert {target: world.content(last, target) for target in scene.sizes} == scene.images()
    scene.base = scene.images()
    place = scene.journald.control.status().written
    scene.write(0.3)
    scene.complete(place)
    scene.unharmed()
    tap.detach(scene.monitor, scene.disks)
    scene.gone()
    world.nothing_left()


@on("libvirt")
@pytest.mark.timeout(90)
def test_unplugged_under_the_tap(start):
    """P5-23: the disk is detached by its admin; the image is let go of, the other disk's tap goes on."""
    scene = start(plain("a"), plain("b", iothread=True), data=["vda"])
    scene.attach()
    scene.write(0.2)
    libvirt.virsh("detach-disk", scene.guest.name, "vdb", "--live")
    limit = time.monotonic() + 20
    while len(scene.world.domain.disks()) > 1:
        assert time.monotonic() < limit, "the guest does not let go of the disk"
        time.sleep(0.1)
    assert tap.state(scene.monitor, scene.disks) == {"vda": TapState.RUNNING, "vdb": TapState.BROKEN}
    gone = scene.disks[1]
    assert gone.node in base.nodes.read(scene.monitor).nodes
    scene.write(0.2)
    scene.journald.kill()
    scene.world.point()
    assert tap.clean(scene.monitor)
    assert scene.states() == {TapState.ABSENT}
    assert gone.node not in base.nodes.read(scene.monitor).nodes
    assert tap.clean(scene.monitor) == []
    scene.disks = scene.disks[:1]
    scene.gone()
    scene.unharmed()


ATTACHING = (
    "blockdev-mirror 1",
    "stop 1",
    "blockdev-reopen 1",
    "qom-set 1",
    "blockdev-reopen 2",
    "qom-set 2",
    "cont 1",
)
TAKING_OFF = ("stop 1", "qom-set 1", "blockdev-reopen 1", "qom-set 2", "cont 1", "job-cancel 1")


@on("libvirt")
@pytest.mark.timeout(120)
def test_killed_in_the_middle(start):
    """P5-24: whoever attaches or takes off is killed: the guest goes on, on its own node or on a whole tap, and one
    cleaning makes either of them as if nothing had been."""
    scene = start(plain("a", iothread=True), plain("b"))
    scene.write(0.1, rate=50)
    attached = [after_death(scene, "attach", at) for at in ATTACHING]
    assert attached[0] == attached[1] == [TapState.ABSENT] * 2
    assert attached[3] == [TapState.RUNNING, TapState.ABSENT]
    assert attached[-1] == [TapState.RUNNING] * 2
    taken = [after_death(scene, "detach", at) for at in TAKING_OFF]
    assert taken[0] == [TapState.RUNNING] * 2
    assert taken[1] == [TapState.ABSENT, TapState.RUNNING]
    assert taken[-1] == [TapState.ABSENT] * 2
    exact(scene, scene.world.point())
    scene.unharmed()


@on("libvirt")
@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_killed_at_any_command(start, verb):
    """P5-24: the same after any command."""
    scene = start(plain("a", iothread=True), plain("b"))
    scene.write(0.1, rate=50)
    number = 1
    while after_death(scene, verb, f" {number}"):
        number += 1
    assert number > 15
    exact(scene, scene.world.point())
    scene.unharmed()


def after_death(scene, verb, at):
    """The states that the guard leaves behind of a process that died there; none when it got through. As it was before,
    in the end."""
    if verb == "detach":
        tap.attach(scene.monitor, scene.disks, scene.journald.socket)
    lock = scene.world.home.domains / f"{scene.world.domain.uuid}.lock"
    order = {"uri": scene.world.domain.uri, "name": scene.guest.name, "lock": str(lock), "verb": verb, "at": at,
             "socket": str(scene.journald.socket)}  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "tests.support.tap_child", json.dumps(order)], timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), at
    eventually(lambda: not guards(scene), "the guard goes on and on")
    assert scene.world.domain.state() is DomainState.RUNNING, at
    graph = base.nodes.read(scene.monitor)
    states = tap.state(scene.monitor, scene.disks)
    for disk in scene.disks:
        assert graph.place(disk.device) == disk.node, at
        assert (graph.devices[disk.device] != disk.node) == (states[disk.target] is TapState.RUNNING), (at, states)
    tap.clean(scene.monitor)
    scene.gone()
    return [states[disk.target] for disk in scene.disks] if done.returncode else []


def guards(scene):
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"appliance.hypervisor.guard" in words and scene.world.domain.uuid.encode() in words:
                found.append(entry.name)
    return found


def eventually(true, words, timeout=20):
    limit = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < limit, words
        time.sleep(0.02)
