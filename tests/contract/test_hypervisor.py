"""One contract for every hypervisor driver: a new driver adds a fixture, not tests.

Each test gets a `Place`: a tiny guest on two disks that is running, and the domain as the driver shows it.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import pytest

from appliance.errors import AgentUnavailable, DomainBusy, DomainLost, DomainNotFound, MonitorError
from appliance.hypervisor import connect
from appliance.hypervisor.base import DomainState, offline_node
from appliance.hypervisor.graph import base, nodes
from appliance.units import MiB
from tests.support import iothreads
from tests.support.libvirt import virsh
from tests.support.tiny import BareGuest, LibvirtGuest, TinyDisk, make_disk


@dataclass
class Place:
    guest: object
    hypervisor: object
    domain: object
    kind: str


def disks_in(folder):
    below = TinyDisk(make_disk(folder / "base.qcow2", 64 * MiB))
    return [
        TinyDisk(make_disk(folder / "a.qcow2", 64 * MiB, backing=below), iothread=True),
        TinyDisk(make_disk(folder / "b.raw", 20 * MiB + 512, "raw"), "raw"),
    ]


@pytest.fixture(params=["qmp", "libvirt"])
def place(request, tmp_path):
    if request.param == "libvirt":
        request.getfixturevalue("libvirt_uri")
        folder = request.getfixturevalue("libvirt_images")
        guest, uri = LibvirtGuest(folder, disks_in(folder), name="contract"), LibvirtGuest.uri
    else:
        disks = disks_in(tmp_path)
        guest = BareGuest(tmp_path, disks, name="contract")
        told = zip(guest.targets, disks, strict=True)
        uri = guest.uri + "".join(f"&disk={target}:{disk.format}:{disk.path}" for target, disk in told)
    with guest:
        guest.start()
        hypervisor = connect(uri)
        try:
            yield Place(guest, hypervisor, hypervisor.domain("contract"), request.param)
        finally:
            hypervisor.close()


@pytest.mark.timeout(60)
def test_what_a_domain_is(place):
    """P0-04: name, disks, state, definition, process, versions."""
    assert "contract" in place.hypervisor.domains()
    domain = place.domain
    assert domain.state() is DomainState.RUNNING
    assert place.hypervisor.domain(domain.uuid).name == "contract"
    with pytest.raises(DomainNotFound):
        place.hypervisor.domain("nobody")
    first, second = domain.disks()
    assert (first.target, first.format, first.size, first.bus) == ("vda", "qcow2", 64 * MiB, "virtio")
    assert (second.target, second.format, second.size) == ("vdb", "raw", 20 * MiB + 512)
    assert first.iothread == iothreads.protected() and not second.iothread
    assert first.persistent and not second.persistent
    assert not first.refusal and not second.refusal
    assert first.source == str(place.guest.disks[0].path)
    assert domain.process().pid == place.guest.pid
    assert place.hypervisor.versions()["qemu"].count(".") == 2
    text = domain.definition()
    found = ET.fromstring(text).findtext("name") if place.kind == "libvirt" else json.loads(text)["name"]
    assert found == "contract"


@pytest.mark.timeout(60)
def test_monitor_answers_and_refuses(place):
    """Errors are QEMU's own words; the connection survives them."""
    monitor = place.domain.monitor()
    assert monitor.execute("query-status")["running"]
    with pytest.raises(MonitorError, match="nonsense"):
        monitor.execute("nonsense")
    with pytest.raises(MonitorError, match="nowhere"):
        monitor.execute("blockdev-del", node_name="nowhere")
    with open("/dev/null") as file:
        monitor.execute_with_fd("getfd", file.fileno(), fdname="rw-test")
    monitor.execute("closefd", fdname="rw-test")


@pytest.mark.timeout(60)
def test_pause_restores_what_it_found(place):
    """P5-02: a guest that an admin paused stays paused, one that ran goes on, also after an error."""
    domain = place.domain
    monitor = domain.monitor()
    with base.paused(monitor) as pause:
        assert domain.state() is DomainState.PAUSED
    assert domain.state() is DomainState.RUNNING
    assert 0 < pause.seconds < 5
    with pytest.raises(ZeroDivisionError), base.paused(monitor):
        raise ZeroDivisionError
    assert domain.state() is DomainState.RUNNING
    domain.suspend()
    with base.paused(monitor):
        pass
    assert domain.state() is DomainState.PAUSED
    domain.resume()
    assert domain.state() is DomainState.RUNNING


@pytest.mark.timeout(60)
def test_swap_puts_everything_back(place):
    """P5-02: after an error between the two moves of a device it sits on its own node, and nothing of ours is left."""
    monitor = place.domain.monitor()
    for disk in place.domain.disks():
        with base.paused(monitor), pytest.raises(ZeroDivisionError):
            base.swap(monitor, disk, lambda: 1 // 0)
        with base.paused(monitor), pytest.raises(MonitorError):
            base.swap(monitor, disk, lambda: "no-such-node")
    before = place.domain.disks()
    assert [nodes.devices(monitor)[d.device] for d in before] == [d.node for d in before]
    assert base.leftovers(monitor) == []
    assert place.domain.state() is DomainState.RUNNING


@pytest.mark.timeout(60)
def test_leftovers_of_a_dead_process_are_cleaned(place):
    """P5-03: a filter and a node that nobody owns any more go, the guest goes on, and it is done once."""
    monitor = place.domain.monitor()
    before = place.domain.disks()
    disk = before[0]

    def build():
        monitor.execute("blockdev-add", driver="null-co", node_name="rw-ep0-s", size=disk.size)
        monitor.execute("blockdev-add", driver="copy-before-write", node_name="rw-ep0-cbw", file=disk.node,
                        target="rw-ep0-s", discard="unmap")  # fmt: skip
        return "rw-ep0-cbw"

    with base.paused(monitor):
        base.swap(monitor, disk, build)
    assert place.domain.disks() == before, "our own filter is not what the disk sits on"
    assert set(base.clean(monitor)) == {"rw-ep0-s", "rw-ep0-cbw"}
    assert base.clean(monitor) == []
    assert nodes.devices(monitor)[disk.device] == disk.node


@pytest.mark.timeout(60)
def test_device_left_on_a_hole_comes_back(place):
    """P5-03: killed between the two moves, the guest is found paused on a hole; its own node is found again."""
    monitor = place.domain.monitor()
    disk = place.domain.disks()[0]
    monitor.execute("stop")
    monitor.execute("blockdev-add", driver="null-co", node_name="rw-hole-vda", size=disk.size)
    base.attach(monitor, disk.device, "rw-hole-vda")
    base.clean(monitor, resume=True)
    assert nodes.devices(monitor)[disk.device] == disk.node
    assert base.leftovers(monitor) == []
    assert place.domain.state() is DomainState.RUNNING


@pytest.mark.timeout(60)
def test_no_agent_is_told(place):
    with pytest.raises(AgentUnavailable):
        place.domain.freeze(2)
    place.domain.thaw(2) if place.kind == "qmp" else None


@pytest.mark.timeout(60)
def test_saved_memory_is_seen(place):
    """Do no harm: a guest that would go on from saved memory must not find other disks."""
    assert place.domain.managed_save() is False
    if place.kind == "libvirt":
        virsh("managedsave", "contract")
        assert place.domain.state() is DomainState.SHUTOFF and place.domain.managed_save() is True
        virsh("managedsave-remove", "contract")
        assert place.domain.managed_save() is False


@pytest.mark.timeout(60)
def test_shut_off_domain_is_read_through_the_storage_daemon(place):
    """P5-09: whole chain open, lock held while we look, let go afterwards; a running one is refused."""
    domain = place.domain
    with pytest.raises(DomainBusy), domain.offline(domain.disks()):
        pass
    domain.destroy()
    deadline = 50
    while domain.state() is not DomainState.SHUTOFF and deadline:
        deadline -= 1
    disks = domain.disks()
    assert [d.size for d in disks] == [64 * MiB, 20 * MiB + 512]
    with pytest.raises(DomainLost):
        domain.monitor()
    with domain.offline(disks) as monitor:
        graph = nodes.read(monitor)
        assert len(list(graph.chain(offline_node("vda")))) == 2
        with pytest.raises(DomainBusy), domain.offline(disks):
            pass
        if place.kind == "libvirt":
            with pytest.raises(Exception, match="lock"):
                domain.start()
    if place.kind == "libvirt":
        domain.start()
        assert domain.state() is DomainState.RUNNING
