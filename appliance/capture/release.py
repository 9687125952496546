"""The end of a domain's protection: nothing of ours stays in its block graph or its images."""

from __future__ import annotations

from contextlib import suppress

from appliance.capture.protection import Protection
from appliance.errors import MonitorError
from appliance.hypervisor.base import Domain, DomainState, Monitor
from appliance.hypervisor.graph import base

__all__ = ["release"]


def release(domain: Domain, record: Protection) -> None:
    """Remove leftovers and the bitmaps of this protection, of a running domain and of one that is shut off.

    Bitmaps on images that became backing files cannot be removed and stay, recording nothing. The caller holds the
    domain's lock and has seen that no revert is under way. Raises what talking to the hypervisor raises.
    """
    if domain.state() is not DomainState.SHUTOFF:
        _release(domain.monitor(), record)
        return
    wanted = set(record.disks) | set(record.state)
    disks = [disk for disk in domain.disks() if not disk.refusal and (disk.target in wanted or not record.disks)]
    with domain.offline(disks) as monitor:
        _release(monitor, record)


def _release(monitor: Monitor, record: Protection) -> None:
    base.clean(monitor, prefix=base.EPOCH)
    for node in base.nodes.read(monitor).nodes.values():
        for name in node.bitmaps:
            if name.startswith(record.prefix) and not node.read_only:
                with suppress(MonitorError):
                    monitor.execute("block-dirty-bitmap-remove", node=node.name, name=name)
