"""Healing: whatever was lost, the next point is exact, needs no new full, and says why it read more."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from appliance.hypervisor.base import DomainState
from appliance.model import Consistency
from appliance.units import CHUNK, KiB, MiB
from tests.support import stamps
from tests.support.protect import Protected, image_content
from tests.support.tiny import BareGuest, LibvirtGuest, TinyDisk, make_disk


def on(*kinds):
    """Which driver the guest of a test runs under: both where they could differ, else one, for the time it takes."""
    return pytest.mark.parametrize("world", kinds, indirect=True)


@pytest.fixture
def world(request, tmp_path):
    """A protected guest on a qcow2 and a raw disk, booted, first point taken, both disks with something on them."""
    if request.param == "libvirt":
        request.getfixturevalue("libvirt_uri")
        folder, kind = request.getfixturevalue("libvirt_images"), LibvirtGuest
    else:
        folder, kind = tmp_path, BareGuest
    disks = [
        TinyDisk(make_disk(folder / "a.qcow2", 64 * MiB)),
        TinyDisk(make_disk(folder / "b.raw", 32 * MiB, "raw"), "raw"),
    ]
    with kind(folder, disks, name="heal", span=1 << 20, durable=True) as guest:
        guest.boot()
        uri = guest.uri
        if request.param == "qmp":
            told = zip(guest.targets, disks, strict=True)
            uri += "".join(f"&disk={target}:{disk.format}:{disk.path}" for target, disk in told)
        with Protected(tmp_path, uri, guest.name) as world:
            world.guest = guest
            write(world, 1)
            first = world.point()
            assert first.notes == ()
            yield world


def write(world, seed, count=60):
    for target in world.guest.targets:
        answer = world.guest.ask(f"scatter {target} {count} {seed} {8 * MiB} {32 * MiB}")
        assert answer["ok"], answer


def shut_off(world, kill=False):
    if kill:
        subprocess.run(["kill", "-9", str(world.guest.pid)], check=True)
    elif isinstance(world.guest, LibvirtGuest):
        world.domain.destroy()
    else:
        world.domain.destroy()
    if isinstance(world.guest, BareGuest):
        world.guest.kill()
    limit = time.monotonic() + 20
    while world.domain.state() is not DomainState.SHUTOFF:
        assert time.monotonic() < limit
        time.sleep(0.05)


def same(world, point):
    for target, disk in zip(world.guest.targets, world.guest.disks, strict=True):
        content = world.content(point, target)
        assert content == image_content(disk.path, disk.format)[: len(content)], target


@on("qmp", "libvirt")
@pytest.mark.timeout(120)
def test_shut_off_and_back(world):
    """P5-09, P5-11: points of a domain that is shut off; the qcow2 disk goes on by its bitmap, the raw one is compared
    once and, untouched, not read again."""
    write(world, 2)
    shut_off(world)
    off = world.point()
    assert off.consistency is Consistency.OFFLINE
    same(world, off)
    assert [note.split(":")[0] for note in off.notes] == ["compare of vdb"]
    again = world.point()
    assert again.stats.moved_bytes == 0
    assert again.notes == ()
    assert [d.map.root for d in again.disks] == [d.map.root for d in off.disks]
    world.guest.boot()
    write(world, 3, 10)
    live = world.point()
    same(world, live)
    assert [note.split(":")[0] for note in live.notes] == ["compare of vdb"]
    assert live.disk("vda").changed_bytes <= 10 * 2 * CHUNK
    write(world, 4, 10)
    last = world.point()
    same(world, last)
    assert last.notes == ()
    assert last.stats.moved_bytes <= 2 * 10 * CHUNK


@on("libvirt")
@pytest.mark.timeout(120)
def test_killed_qemu_is_compared_and_nothing_is_stored_twice(world):
    """P5-10: kill -9 of QEMU; the bitmaps are inconsistent or gone, the disks are compared, only news are stored."""
    write(world, 2)
    world.point()
    shut_off(world, kill=True)
    world.guest.boot()
    write(world, 3, 5)
    point = world.point()
    same(world, point)
    assert len(point.notes) == 2
    assert all(note.startswith("compare of ") for note in point.notes), point.notes
    # Blocks of random bytes: what is new cannot be stored in less.
    new = 2 * 5 * CHUNK
    assert point.stats.stored_bytes <= new + 64 * KiB
    assert sum(disk.changed_bytes for disk in point.disks) <= new
    write(world, 4, 5)
    last = world.point()
    assert last.notes == ()
    same(world, last)


@on("qmp")
@pytest.mark.timeout(120)
def test_image_changed_behind_our_back(world):
    """P5-12: the image is replaced by an older copy of itself, with the bitmaps of then; the copy is found out."""
    disk = world.guest.disks[0].path
    shut_off(world)
    copy = disk.with_suffix(".old")
    shutil.copy(disk, copy)
    world.guest.boot()
    write(world, 2)
    world.point()
    shut_off(world)
    shutil.copyfile(copy, disk)
    point = world.point()
    same(world, point)
    assert any(note.startswith("compare of vda") for note in point.notes), point.notes
    # And a rewrite by a tool that keeps no bitmap.
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(copy), str(disk)], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(disk)], check=True, capture_output=True)
    point = world.point()
    same(world, point)
    assert any(note.startswith("compare of vda") for note in point.notes), point.notes
    # Written by QEMU's own tools: the bitmap knows.
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 64k", str(disk)], check=True, capture_output=True)
    point = world.point()
    same(world, point)
    assert point.notes == ()
    assert point.stats.moved_bytes == CHUNK


@on("libvirt")
@pytest.mark.timeout(120)
def test_grown_while_off_and_while_running(world):
    """P5-13: a disk that has grown is exact at its new size."""
    shut_off(world)
    disk = world.guest.disks[0].path
    subprocess.run(["qemu-img", "resize", "-q", str(disk), "80M"], check=True)
    point = world.point()
    assert point.disk("vda").size == 80 * MiB
    same(world, point)
    world.guest.boot()
    node = world.domain.disks()[0].node
    world.domain.monitor().execute("block_resize", node_name=node, size=96 * MiB)
    write(world, 5, 5)
    point = world.point()
    assert point.disk("vda").size == 96 * MiB
    same(world, point)


@on("qmp")
@pytest.mark.timeout(60)
def test_first_full_goes_on(world):
    """P5-04: a protection that begins anew stores nothing that the repository has."""
    from appliance.capture import protection

    world.record = protection.new(world.repo, world.domain, ())
    point = world.point()
    same(world, point)
    assert point.stats.stored_bytes <= 32 * KiB
    assert stamps.check([world.reader(point, t) for t in world.guest.targets], world.guest.layout).exact
