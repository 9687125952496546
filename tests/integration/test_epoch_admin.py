"""What an admin does in the middle of an epoch, through libvirt: the guest is unharmed and the next point is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.errors import DomainLost, HypervisorError, PushFailed
from appliance.hypervisor.base import DomainState
from appliance.hypervisor.graph import base
from appliance.units import MiB
from tests.support import libvirt, stamps
from tests.support.protect import Once, Protected, image_content
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk


@pytest.fixture
def world(libvirt_images, tmp_path):
    disks = [
        TinyDisk(make_disk(libvirt_images / "a.qcow2", 64 * MiB), iothread=True),
        TinyDisk(make_disk(libvirt_images / "b.qcow2", 64 * MiB)),
    ]
    with LibvirtGuest(libvirt_images, disks, name="admin", span=1 << 20, durable=True) as guest:
        guest.boot()
        with Protected(tmp_path, guest.uri, guest.name) as world:
            world.guest = guest
            world.point()
            guest.ask("start 30")
            guest.ask(f"scatter vda 60 1 {16 * MiB} {60 * MiB}")
            world.settings = replace(world.settings, rate_limit=4 * MiB)
            yield world


def exact(world, point):
    readers = [world.reader(point, target) for target in world.guest.targets]
    state = stamps.check(readers, world.guest.layout)
    assert state.exact, state.messages
    return state.seq


def ends_well(world):
    """Points go on without a comparison, and the last one is what the images hold."""
    exact(world, world.point())
    world.guest.ask("stop")
    last = world.point()
    for target, disk in zip(world.guest.targets, world.guest.disks, strict=True):
        assert world.content(last, target) == image_content(disk.path)
    world.nothing_left()
    assert world.guest.ask("stats")["errors"] == 0
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)


@pytest.mark.timeout(90)
def test_libvirtd_restarted(world):
    """P5-07, A5: the daemon goes away in the middle of a push and comes back."""

    def restart():
        libvirt.stop()
        libvirt.start()

    exact(world, world.point(progress=Once(restart)))
    ends_well(world)


@pytest.mark.timeout(90)
def test_destroyed_and_started(world):
    """P5-07, A5: the domain is destroyed in the middle of a push; its frozen and its recording bitmap both survive."""
    with pytest.raises((PushFailed, DomainLost)):
        world.point(progress=Once(world.domain.destroy))
    assert world.domain.state() is DomainState.SHUTOFF
    world.guest.boot()
    world.guest.ask("start 30")
    ends_well(world)


@pytest.mark.timeout(90)
def test_reset_suspended_and_resumed(world):
    """P5-06, A5: several of an admin's actions in one epoch."""

    def act():
        world.domain.suspend()
        world.domain.reset()
        world.domain.resume()

    exact(world, world.point(progress=Once(act)))
    world.guest.channel.wait_up(2)
    world.guest.ask("start 30")
    ends_well(world)


@pytest.mark.timeout(90)
def test_disk_detached(world):
    """P5-13, A5: a disk is detached in the middle of its epoch: libvirt's nodes do not stay behind with us; the next
    point is of the other disk and says so."""
    world.guest.ask("stop")

    def detach():
        libvirt.virsh("detach-disk", "admin", "vdb", "--live")

    try:
        world.point(progress=Once(detach))
    except HypervisorError as error:
        print("detaching:", error)
    monitor = world.domain.monitor()
    if any(disk.target == "vdb" for disk in world.domain.disks()):
        pytest.skip("this guest did not let the disk go")
    assert base.leftovers(monitor) == []
    assert not [name for name in base.nodes.read(monitor).nodes if name.startswith("libvirt-1-")]
    point = world.point()
    assert [disk.disk for disk in point.disks] == ["vda"]
    assert any("vdb" in note for note in point.notes)
    assert world.point().notes == (), "told once"
    assert world.content(point, "vda") == image_content(world.guest.disks[0].path)
