"""What must not be done to a guest whose disk has a thread of its own, and when the rest may.

The nodes of a virtio disk with an iothread are in it while the guest's driver drives the device, and in QEMU's main
thread otherwise. A commit into a backing file lets nobody move them as long as it runs. Begun while the driver drives
the device it does no harm: the nodes stay in the iothread. Begun before (the firmware has not come to the disk yet) it
makes QEMU fail to start the device's thread, go on without, and abort at the driver's next reset of the device:
`virtio_blk_set_status: Assertion '!s->dataplane_started' failed`, seen of QEMU 7.2 between firmware and kernel.

And as long as it runs nobody may stop the guest: QEMU 7.2 then waits in its main thread for the iothread, which waits
for the main thread's lock to tell the guest of a request that has ended (seen in 4 of about 25 `virsh suspend` of a
guest that writes; the whole QEMU hangs for good). A commit of the top image is a mirror, which lets the nodes go where
they have to: it is used instead for such disks, see `pins`.
"""

from __future__ import annotations

import time
from typing import Any

from appliance.errors import MonitorError
from appliance.hypervisor.base import Monitor

__all__ = ["NotDriven", "await_driver", "driven", "pins"]

_POLL = 0.1
# Firmware takes some seconds to come to its disks. Longer than this is for whoever tries again later to wait.
_PATIENCE = 15.0
_DRIVER_OK = "VIRTIO_CONFIG_S_DRIVER_OK"


class NotDriven(MonitorError):
    """The guest is paused, or does not use the disk; nothing was done, and it may be tried again."""

    template = "the guest does not drive device {command} of {domain!r}: {reason}"
    default_hint = "it goes on by itself as soon as the guest does; `rewind status {domain}` shows it"


def pins(monitor: Monitor, device: str) -> bool:
    """Whether a commit into a backing file would hold this device's nodes in a thread of their own."""
    return _has_iothread(monitor, device)


def await_driver(monitor: Monitor, device: str, patience: float = _PATIENCE) -> None:
    """Return when the guest runs and drives the device, at once for one without an iothread. Raises NotDriven after
    `patience` seconds, DomainLost."""
    if not _has_iothread(monitor, device):
        return
    limit = time.monotonic() + patience
    while not driven(monitor, device):
        if time.monotonic() > limit:
            reason = "it is paused, or has no driver for it yet"
            raise NotDriven(domain=monitor.domain, command=device, reason=reason)
        time.sleep(_POLL)


def driven(monitor: Monitor, device: str) -> bool:
    """Whether the guest runs and its driver has taken the device over; of a QEMU that cannot tell it is assumed."""
    if not _has_iothread(monitor, device):
        return True
    if not monitor.execute("query-status")["running"]:
        return False
    try:
        status = monitor.execute("x-query-virtio-status", path=device)["status"]
    except MonitorError as error:
        return "not been found" in str(error)
    return any(str(one).startswith(_DRIVER_OK) for one in status.get("statuses", ()))


def _has_iothread(monitor: Monitor, device: str) -> bool:
    if monitor.storage_daemon or not device:
        return False
    return bool(_property(monitor, device, "iothread") or _property(monitor, device, "iothread-vq-mapping"))


def _property(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return monitor.execute("qom-get", path=path, property=name)
    except MonitorError:
        return None
