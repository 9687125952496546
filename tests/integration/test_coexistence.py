"""Other tools and we on one domain (A11): each does its work between two of our epochs, and in the middle of one.

Of every action: the tool succeeds and what it made is right, or fails with libvirt's own words and nothing has changed;
our epoch is one instant and so is the next; at the end a point of the quiet guest is byte for byte what is in the
images, nothing of ours is left in the graph, no I/O error was seen in the guest, and no write of it waited long.

Long on purpose: the guest is shared by the tests of this file as long as they succeed, and its start costs more than
what they do with it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest

from appliance.capture import protection as records
from appliance.errors import DomainBusy, HypervisorError, PushFailed
from appliance.hypervisor.graph import base
from appliance.service import elsewhere
from appliance.units import MiB
from tests.support import backups, libvirt, world
from tests.support.backups import TARGETS, drop_checkpoints, equal, pull, push
from tests.support.hoststall import HostStall
from tests.support.shared import Refused, Scene, Went, patience, run
from tests.support.tiny import BareGuest, TinyDisk

# Longer than this no write of the guest may wait on a quiet machine, in seconds. The load of another one is in
# `patience`, what its disk makes everybody wait for is measured beside the test.
_STALL = 0.3


@pytest.fixture(scope="module")
def _scenes(libvirt_uri):
    kept: list[Scene] = []
    yield kept
    for one in kept:
        one.close()


@pytest.fixture
def scene(_scenes):
    """A protected guest with its writers running. It is given to the next test too unless something went wrong."""
    if _scenes and _scenes[0].spent:
        _scenes.pop().close()
    if not _scenes:
        _scenes.append(Scene(world.images_folder("shared")))
    (found,) = _scenes
    found.spent = True
    found.pauses.clear()
    found.write()
    found.unharmed()
    return found


@pytest.fixture
def host(scene):
    """The machine under it, as long as the test runs."""
    with HostStall(scene.folder) as found:
        yield found


# What others do. Each does it, checks what came of it, and raises Refused when the tool said no.


def checkpoint(scene):
    """The changes since a checkpoint, laid over a copy of that instant, are a later instant."""
    scene.quiet()
    copies = independent(scene)
    scene.virsh("checkpoint-create-as", scene.name, "c1")
    scene.write()
    scene.scatter(30)
    later = push(scene, since="c1", on=copies)
    scene.exact_files([later["vda"], later["vdb"]])
    drop_checkpoints(scene)


def backup_push(scene):
    """Full, incremental of a writing guest, incremental of a quiet one against an independent copy."""
    full = push(scene, "p1")
    first = scene.exact_files([full["vda"], full["vdb"]])
    scene.scatter(30)
    later = push(scene, "p2", since="p1", on=full)
    second = scene.exact_files([later["vda"], later["vdb"]])
    assert second >= first
    seq = scene.quiet()
    last = push(scene, since="p2", on=later)
    scene.exact_files([last["vda"], last["vdb"]], seq)
    all_equal(last, independent(scene))
    scene.write()
    drop_checkpoints(scene)


def backup_pull(scene):
    """As `backup_push`, read from QEMU's server; what is not dirty is taken from the copy before."""
    with pull(scene, "q1") as served:
        full = served.copy()
    scene.exact_files([full["vda"], full["vdb"]])
    scene.scatter(30)
    with pull(scene, "q2", since="q1") as served:
        later = served.changes(full)
        all_equal(later, served.copy())
    scene.exact_files([later["vda"], later["vdb"]])
    seq = scene.quiet()
    with pull(scene, since="q2") as served:
        last = served.changes(later)
    scene.exact_files([last["vda"], last["vdb"]], seq)
    all_equal(last, independent(scene))
    scene.write()
    drop_checkpoints(scene)


def virtnbdbackup(scene):
    """Full and incremental, restored by its own tool."""
    if shutil.which("virtnbdbackup") is None:
        pytest.skip("virtnbdbackup is not installed")
    number = time.time_ns()
    folder, out = scene.folder / f"vnb-{number}", scene.folder / f"vnb-out-{number}"
    words = ["virtnbdbackup", "-U", libvirt.URI, "-d", scene.name, "-n", "-o", folder, "-S", scene.folder]
    words += ["-f", scene.folder / f"vnb-{number}.sock"]
    run(*words, "-l", "full")
    scene.scatter(30)
    seq = scene.quiet()
    run(*words, "-l", "inc")
    wanted = independent(scene)
    scene.write()
    out.mkdir()
    run("virtnbdrestore", "-n", "-i", folder, "-o", out)
    restored = {}
    for target in TARGETS:
        (found,) = [path for path in out.iterdir() if path.name.startswith((f"{target}.", target[-1] + "."))]
        restored[target] = out / f"{target}.raw"
        run("qemu-img", "convert", "-O", "raw", found, restored[target])
    scene.exact_files([restored["vda"], restored["vdb"]], seq)
    all_equal(restored, wanted)
    drop_checkpoints(scene)


def snapshot(scene):
    number = time.time_ns()
    words = ["snapshot-create-as", scene.name, "--disk-only", "--no-metadata"]
    for target in TARGETS:
        words += ["--diskspec", f"{target},file={scene.folder}/{target}-{number}.qcow2"]
    before = scene.images()
    scene.virsh(*words)
    # Whoever backs up by snapshots copies what is below: it is one instant too.
    copies = {}
    for target in TARGETS:
        copies[target] = scene.folder / f"snap-{target}-{number}.raw"
        run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", before[target], copies[target])
    scene.exact_files([copies["vda"], copies["vdb"]])


def snapshot_and_point(scene):
    snapshot(scene)
    scene.exact(scene.point())


def blockcommit(scene):
    for target in TARGETS:
        scene.virsh("blockcommit", scene.name, target, "--active", "--pivot", "--wait")


def blockcommit_what_is_left(scene):
    """After a test in which somebody may have done it already."""
    for target, path in scene.images().items():
        if "backing-filename" in run("qemu-img", "info", "-U", "--output=json", path):
            scene.virsh("blockcommit", scene.name, target, "--active", "--pivot", "--wait")


def blockpull(scene):
    for target in TARGETS:
        scene.virsh("blockpull", scene.name, target, "--wait")


def blockresize(scene):
    size = int(scene.virsh("domblkinfo", scene.name, "vdc").split("Capacity:")[1].split()[0]) + MiB
    scene.virsh("blockresize", scene.name, "vdc", f"{size}b")
    limit = time.monotonic() + 10
    while scene.guest.ask("sh cat /sys/block/vdc/size")["output"].strip() != str(size // 512):
        assert time.monotonic() < limit, "the guest does not see the new size"
        time.sleep(0.05)
    assert scene.guest.ask(f"sh dd if=/dev/zero of=/dev/vdc bs=64k seek={(size >> 16) - 2} count=1 conv=fsync")["ok"]


def managedsave(scene):
    scene.virsh("managedsave", scene.name)
    scene.virsh("start", scene.name)
    scene.again()


def other_disk(scene):
    """A disk is attached, used and detached."""
    name = attach(scene)
    assert scene.guest.ask(f"sh dd if=/dev/urandom of=/dev/{name} bs=64k count=20 conv=fsync")["ok"]
    detach(scene)


def suspend_resume(scene):
    scene.virsh("suspend", scene.name)
    time.sleep(0.2)
    scene.virsh("resume", scene.name)


def reset(scene):
    boots = scene.guest.channel.boots
    scene.virsh("reset", scene.name)
    scene.wait_up(boots + 1)
    scene.write()


def libvirtd_restart(scene):
    libvirt.stop()
    libvirt.start()


@dataclass(frozen=True)
class Action:
    """`refused`: what libvirt says in the middle of an epoch, where it does say no; `prepare` and `finish` are done
    between epochs, before and after."""

    act: Any
    refused: str = ""
    prepare: Any = None
    finish: Any = None

    def __str__(self):
        return self.act.__name__


ACTIONS = [
    Action(checkpoint),
    Action(backup_push),
    Action(backup_pull),
    Action(virtnbdbackup),
    Action(snapshot, finish=blockcommit_what_is_left),
    Action(blockcommit, "root block node", prepare=snapshot_and_point, finish=blockcommit_what_is_left),
    Action(blockpull, prepare=snapshot_and_point),
    Action(blockresize, "is in use|busy|Permission conflict"),
    Action(managedsave, "unexpectedly failed|Bad address"),
    Action(other_disk),
    Action(suspend_resume),
    Action(reset),
    Action(libvirtd_restart),
]
# The rest is run by `./dev soak`.
QUICK = {("backup_push", "during"), ("snapshot", "during"), ("virtnbdbackup", "during"), ("blockcommit", "between")}


def cases(*whens):
    return [
        pytest.param(
            action, when, id=f"{action}-{when}", marks=() if (str(action), when) in QUICK else (pytest.mark.soak,)
        )
        for action in ACTIONS
        for when in whens
    ]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("action", "when"), cases("between", "during", "beside"))
def test_another_tool(scene, host, action, when):
    """A11, P5-08: see the head of this file. `beside`: at the same time in another thread, so that each may come at any
    moment of the other; then both may say no."""
    if action.prepare is not None:
        action.prepare(scene)
    scene.unharmed()
    said = {"between": between, "during": during, "beside": beside}[when](scene, action)
    longest, pause, stall = scene.unharmed(), max(scene.pauses), host.worst()
    scene.exact(scene.point())
    if action.finish is not None:
        action.finish(scene)
        scene.exact(scene.point())
    scene.write()
    scene.scatter(30)
    scene.settle()
    scene.unharmed()
    told(action, when, said or "right", longest, pause)
    assert max(longest, pause) < _STALL * patience() + 2 * stall, (longest, pause, patience(), stall)


def between(scene, action):
    scene.exact(scene.point())
    action.act(scene)
    scene.scatter(30)
    return ""


def during(scene, action):
    """In the middle of an epoch; it goes on when the other tool has come to its end."""
    try:
        found, _ = scene.during(lambda: action.act(scene))
    except Went as went:
        scene.exact(went.point)
        if not isinstance(went.error, Refused) or not action.refused:
            raise went.error from None
        assert_refused(action.refused, str(went.error))
        return str(went.error).splitlines()[-1]
    assert not action.refused, "it was expected to be refused"
    scene.exact(found)
    return ""


def beside(scene, action):
    said = []

    def work():
        try:
            action.act(scene)
        except Exception as error:
            said.append(error)

    thread = threading.Thread(target=work)
    words = []
    scene.scatter(60)
    scene.point()
    scene.scatter(120)
    thread.start()
    try:
        while True:
            try:
                scene.exact(scene.point(rate=4 * MiB))
            except (DomainBusy, PushFailed, HypervisorError) as error:
                words.append(f"ours: {error}")
            if not thread.is_alive():
                break
            time.sleep(0.3)
    finally:
        thread.join()
    for error in said:
        if not isinstance(error, Refused):
            raise error
        words.append(f"theirs: {error}")
    return "; ".join(dict.fromkeys(words))


def told(action, when, said, longest, pause):
    """One row of the table that `pytest -s` prints."""
    stall = f"longest write {longest * 1e3:.0f} ms, pauses {pause * 1e3:.0f} ms"
    print(f"\n| {action!s:20} | {when:8} | {stall} | {' '.join(said.split())[:200]}")


def assert_refused(pattern, text):
    assert re.search(pattern, text), text


def independent(scene):
    """Raw copies by qemu-img; the guest must be quiet or suspended."""
    number = time.time_ns()
    found = {}
    for target, path in scene.images().items():
        found[target] = scene.folder / f"independent-{target}-{number}.raw"
        run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, found[target])
    return found


def all_equal(ours, theirs):
    for target in TARGETS:
        assert equal(ours[target], theirs[target]), target


def attach(scene, path=None, target="vdx"):
    """The name the guest gave it."""
    before = set(scene.guest.ask("sh ls /sys/block")["output"].split())
    if path is None:
        path = scene.folder / f"extra-{time.time_ns()}.qcow2"
        backups.new_image(path, 16 * MiB)
    scene.virsh("attach-disk", scene.name, path, target, "--driver", "qemu", "--subdriver", "qcow2", "--cache", "none",
                "--targetbus", "virtio")  # fmt: skip
    limit = time.monotonic() + 15
    while not (new := set(scene.guest.ask("sh ls /sys/block")["output"].split()) - before):
        assert time.monotonic() < limit, "the guest does not see the disk"
        time.sleep(0.1)
    return new.pop()


def detach(scene, target="vdx"):
    scene.virsh("detach-disk", scene.name, target)
    limit = time.monotonic() + 30
    while target in scene.images():
        assert time.monotonic() < limit, "the disk does not go"
        time.sleep(0.1)


def shape(scene):
    """Everything of the domain that a point which was refused must not have touched."""
    domain = scene.session.domain(scene.name)
    nodes = domain.monitor().execute("query-named-block-nodes", flat=True)
    bitmaps = {n["node-name"]: sorted(b.get("name", "") for b in n.get("dirty-bitmaps", ())) for n in nodes}
    record = records.path_of(scene.session.home, domain.uuid).read_text()
    return bitmaps, domain.monitor().execute("query-status")["running"], record


def refused_as_busy(scene):
    before = shape(scene)
    with pytest.raises(DomainBusy):
        scene.point()
    assert shape(scene) == before


@pytest.mark.timeout(120)
def test_our_epoch_while_their_backup_is_active(scene, host):
    """A11: refused without a trace, however the backup came before us: begun between epochs, or in the middle of one
    and still there when that has ended. The backup is right, and so is our next point."""
    with contextlib.ExitStack() as stack:
        found, served = scene.during(lambda: stack.enter_context(pull(scene, "o1")))
        scene.exact(found)
        refused_as_busy(scene)
        full = served.copy()
        scene.exact_files([full["vda"], full["vdb"]])
    scene.exact(scene.point())
    scene.scatter(30)
    with pull(scene, "o2", since="o1") as served:
        refused_as_busy(scene)
        later = served.changes(full)
        all_equal(later, served.copy())
    scene.exact(scene.point())
    longest, pause, stall = scene.unharmed(), max(scene.pauses), host.worst()
    drop_checkpoints(scene)
    scene.settle()
    told("point in a backup", "between", "DomainBusy", longest, pause)
    assert max(longest, pause) < _STALL * patience() + 2 * stall, (longest, pause, patience(), stall)


@pytest.mark.timeout(60)
def test_refused_in_the_pause_locks_nobody_out(scene, monkeypatch):
    """A11: somebody comes between our plan and our pause. The guest goes on at once, and so may the next point: nobody
    thinks that there is something to put right, and holds the domain for it."""
    real, first = base.attached, iter(["#block1"])
    monkeypatch.setattr(base, "attached", lambda monitor, device: next(first, "") or real(monitor, device))
    refused_as_busy(scene)
    scene.exact(scene.point())
    scene.settle()


@pytest.mark.timeout(240)
@pytest.mark.soak
def test_disks_with_an_iothread(_scenes):
    """A11, A5: what needs no server in QEMU, whose 7.2 aborts a guest with an iothread when a reader leaves."""
    while _scenes:
        _scenes.pop().close()
    scene = Scene(world.images_folder("shared"), iothread=True)
    _scenes.append(scene)
    scene.spent = scene.used_up = True
    for action in ACTIONS:
        if action.act in (checkpoint, backup_push, snapshot, suspend_resume, reset, other_disk, blockpull):
            scene.write()
            if action.prepare is not None:
                action.prepare(scene)
            said = during(scene, action)
            scene.exact(scene.point())
            if action.finish is not None:
                action.finish(scene)
            longest, pause = scene.unharmed(), max(scene.pauses)
            scene.pauses.clear()
            scene.settle()
            told(f"{action}+iothread", "during", said or "right", longest, pause)


def end(scene, how):
    scene.virsh(how, scene.name)
    limit = time.monotonic() + 40
    while scene.virsh("domstate", scene.name).strip() != "shut off":
        assert time.monotonic() < limit, f"{how} does not end the guest"
        time.sleep(0.1)


@pytest.mark.timeout(180)
@pytest.mark.soak
@pytest.mark.parametrize("when", ["between", "during"])
@pytest.mark.parametrize("how", ["shutdown", "destroy"])
def test_the_guest_ends(scene, how, when):
    """P5-05, A11: between epochs the next point is of a domain that is shut off; in the middle of one there is no
    point, and the bitmaps that were stored with the images tell the next one everything."""
    scene.point()
    scene.scatter(30)
    points = len(scene.session.repository.points())
    said = "right"
    if when == "between":
        end(scene, how)
        found = scene.point()
        scene.exact(found)
        scene.same_as_images(found)
    else:
        with pytest.raises((PushFailed, HypervisorError)) as refusal:
            scene.during(lambda: end(scene, how))
        said = f"ours: {refusal.value}"
        assert len(scene.session.repository.points()) == points
    scene.virsh("start", scene.name)
    scene.again()
    assert scene.guest.ask("state")["exact"]
    scene.write()
    found = scene.point()
    scene.exact(found)
    assert not any("compare" in note for note in found.notes), found.notes
    longest, pause = scene.unharmed(), max(scene.pauses)
    scene.settle()
    told(how, when, said, longest, pause)


@pytest.mark.timeout(120)
@pytest.mark.soak
@pytest.mark.parametrize("when", ["between", "during"])
def test_a_protected_disk_is_detached(scene, when):
    """A11, P5-03: the point that was begun has it, the next one says that it is gone, and its image is free: it can be
    attached again, and is in the point after that."""
    path = scene.images()["vdc"]
    scene.point()
    scene.quiet()
    wanted = independent(scene)["vdc"].read_bytes()
    scene.write()
    if when == "between":
        detach(scene, "vdc")
    else:
        found, _ = scene.during(lambda: detach(scene, "vdc"))
        scene.exact(found)
        assert scene.reader(found, "vdc")(0, len(wanted)) == wanted
    longest = scene.unharmed()
    without = scene.point()
    scene.exact(without)
    assert "vdc" not in [one.disk for one in without.disks]
    assert any("vdc" in note for note in without.notes)
    scene.nothing_left()
    run("qemu-img", "check", "-q", path)  # nobody holds its lock
    scene.used_up = True
    attach(scene, path, "vdc")
    back = scene.point()
    assert scene.reader(back, "vdc")(0, len(wanted)) == wanted
    scene.settle()
    told("detach protected", when, "right", longest, max(scene.pauses))


@pytest.mark.timeout(120)
@pytest.mark.soak
def test_libvirtd_is_killed_in_an_epoch(scene):
    """A11, A5: kill -9 and a new one; the epoch and the session go on."""

    def kill():
        pid = int(libvirt._OWN_PID.read_text())
        run("kill", "-KILL", pid)
        libvirt.stop()
        libvirt.start()

    found, _ = scene.during(kill)
    scene.exact(found)
    scene.exact(scene.point())
    longest = scene.unharmed()
    scene.settle()
    told("libvirtd killed", "during", "right", longest, max(scene.pauses))


class _OnExports(BareGuest):
    """Its disks are NBD exports: of each disk the path is its socket."""

    def _disk_arguments(self, index, disk, target):
        server = f"server.type=unix,server.path={disk.path},export={target}"
        return [
            "-blockdev", f"driver=nbd,node-name={target}-nbd,{server},discard=unmap",
            "-device", f"virtio-blk-pci,id={target},drive={target}-nbd,discard=on,write-cache=on",
        ]  # fmt: skip


@pytest.mark.timeout(120)
def test_an_exported_point_against_an_independent_copy(scene):
    """A10: `qemu-img compare`, nbdcopy and a boot of the exported point agree with what qemu-img copied at the same
    frozen instant; what the booted guest writes stays in the export's overlay."""
    scene.scatter(40, "vdc")
    scene.virsh("suspend", scene.name)
    copies = independent(scene)
    point = scene.point()
    scene.virsh("resume", scene.name)
    seq = scene.exact_files([copies["vda"], copies["vdb"]])
    same_as_export(scene, point, copies)
    scene.guest.kill()  # one guest at a time
    with elsewhere.export(scene.session, scene.name, point.id, writable=True) as served:
        disks = [TinyDisk(server.socket, "raw") for server in served.servers]
        options = {"name": "export", "span": 1 << 20, "data": ("vda", "vdb")}
        with _OnExports(scene.folder, disks, **options) as guest:
            guest.boot()
            state = guest.ask("state {} {} {}".format(*seq))
            assert state["exact"] and state["seq"] == list(seq), state
            guest.ask("start 100")
            guest.ask("sh sleep 1")
            stopped = guest.ask("stop")
            assert stopped["errors"] == 0 and min(stopped["seq"]) > max(0, min(seq))
            assert guest.ask("state {} {} {}".format(*stopped["seq"]))["exact"]
    same_as_export(scene, point, copies)


def same_as_export(scene, point, copies):
    with elsewhere.export(scene.session, scene.name, point.id) as served:
        assert sorted(one.disk for one in served.disks) == sorted(copies)
        for one in served.disks:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", copies[one.disk], one.uri)
            out = scene.folder / f"nbdcopy-{one.disk}.raw"
            run("nbdcopy", one.uri, out)
            assert equal(out, copies[one.disk]), one.disk
            out.unlink()
