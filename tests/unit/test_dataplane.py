"""When an instant revert's retrieval may begin: only while the guest's driver drives an iothread disk."""

from __future__ import annotations

import pytest

from appliance.errors import MonitorError
from appliance.hypervisor.graph.dataplane import NotDriven, await_driver, driven

DEVICE = "/machine/peripheral/vda/virtio-backend"


class Monitor:
    """Says what it was told to, in turn; the last of it again and again."""

    domain = "web"
    storage_daemon = False

    def __init__(self, *statuses, iothread="/objects/io0", running=True, unknown=""):
        self.statuses, self.iothread, self.running, self.unknown = list(statuses), iothread, running, unknown
        self.asked = 0

    def execute(self, command, /, **arguments):
        if command == "qom-get":
            assert arguments["path"] == DEVICE
            if arguments["property"] == "iothread" and self.iothread is not None:
                return self.iothread
            raise MonitorError(domain="web", command=command, reason="no such property")
        if command == "query-status":
            return {"running": self.running}
        assert command == "x-query-virtio-status"
        if self.unknown:
            raise MonitorError(domain="web", command=command, reason=self.unknown)
        self.asked += 1
        now = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        words = {"A": "VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid", "D": "VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready"}
        return {"status": {"statuses": [words[letter] for letter in now]}}


def test_it_waits_for_the_driver():
    """P5-23: firmware comes to its disks some seconds after the reset."""
    monitor = Monitor("", "A", "AD")
    await_driver(monitor, DEVICE)
    assert monitor.asked == 3


@pytest.mark.parametrize("monitor", [Monitor("A"), Monitor("AD", running=False)])
def test_it_does_not_wait_for_ever(monitor):
    """P5-23: a paused guest, or one without a driver, must not keep the wheel from who wants to roll back."""
    assert not driven(monitor, DEVICE)
    with pytest.raises(NotDriven, match="does not drive"):
        await_driver(monitor, DEVICE, 0.2)


def test_nothing_is_asked_of_other_disks():
    """No iothread, no storage daemon's disk, no QEMU that cannot tell."""
    for monitor in (Monitor(iothread=None), Monitor(iothread="")):
        await_driver(monitor, DEVICE, 0)
        assert monitor.asked == 0
    await_driver(Monitor(), "", 0)
    assert driven(Monitor(unknown="The command x-query-virtio-status has not been found"), DEVICE)
    assert not driven(Monitor(unknown="the monitor is busy"), DEVICE)
