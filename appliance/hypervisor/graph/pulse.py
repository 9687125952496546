"""Does a guest's disk still answer after we let the guest go on?

A device may never complete a request again after a graph change, without any error. What that looks like from outside:
requests are in flight, and nothing completes. An idle disk is not ill; nor does one look so that completes requests and
does not tell the guest, which is why disks with an iothread are refused with newer QEMU (see `survey`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.errors import MonitorError
from appliance.hypervisor.base import Disk, Monitor

__all__ = ["Beat", "feel", "revive"]

_log = logging.getLogger(__name__)

_OPERATIONS = ("rd_operations", "wr_operations", "flush_operations", "unmap_operations")
_PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Beat:
    """Requests completed so far, and in flight now (None: this device does not tell)."""

    completed: int
    in_flight: int | None


def feel(monitor: Monitor, disks: Sequence[Disk]) -> dict[str, Beat]:
    """By target. Two cheap queries."""
    stats = {one.get("qdev"): one["stats"] for one in monitor.execute("query-blockstats")}
    return {
        disk.target: Beat(sum(stats[disk.device].get(name, 0) for name in _OPERATIONS), _in_flight(monitor, disk))
        for disk in disks
        if disk.device in stats
    }


def _in_flight(monitor: Monitor, disk: Disk) -> int | None:
    try:
        found = monitor.execute("x-query-virtio-queue-status", path=disk.device, queue=0)
    except MonitorError:
        return None
    return int(found["inuse"])


def revive(monitor: Monitor, disks: Sequence[Disk], before: dict[str, Beat]) -> list[str]:
    """The targets that have completed nothing since `before` though requests are in flight; empty is well.

    Waits up to 2 seconds for a disk that looks ill, and then gives the guest one stop and cont as first aid. Only
    while no job of ours runs and the guest was found running.
    """
    limit = time.monotonic() + _PATIENCE
    while ill := _ill(before, feel(monitor, disks)):
        if time.monotonic() > limit:
            break
        time.sleep(0.2)
    if ill and monitor.execute("query-status")["running"]:
        _log.error("%s: disks %s do not complete requests; stopping and resuming once", monitor.domain, ", ".join(ill))
        monitor.execute("stop")
        monitor.execute("cont")
        time.sleep(0.5)
        return _ill(before, feel(monitor, disks))
    return []


def _ill(before: dict[str, Beat], now: dict[str, Beat]) -> list[str]:
    return [
        target
        for target, beat in now.items()
        if beat.in_flight and target in before and beat.completed == before[target].completed
    ]
