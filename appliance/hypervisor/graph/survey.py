"""Which disks a running QEMU has, and which of them cannot be protected, with the reason in one sentence."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import Disk, Monitor
from appliance.hypervisor.graph import nodes
from appliance.hypervisor.graph.nodes import REVERT, Graph, Node

__all__ = ["SILENT", "device_id", "survey"]

# Filters that QEMU's own block jobs put under a device. While one is there somebody else's job runs.
_JOB_FILTERS = frozenset({"copy-before-write", "backup-top", "mirror_top", "commit_top"})

# Where an image can lie and still be opened by path again for a shut-off domain.
_LOCAL = frozenset({"file", "host_device"})

# Nobody keeps a device between two nodes longer, unless it died there.
_PATIENCE = 5.0
# With 10.0.13 (emulated) a guest that writes to such a disk gets no interrupt of it any more after one of 3 to 50 plain
# `stop` and `cont`, the block graph untouched: QEMU has completed its requests, and neither another stop nor another
# request wakes it. 300 in a row did no harm without an iothread, nor with one on 7.2. Filters that take the exchange
# from the device were tried in vain: it is the pause. Of what lies between, 8.1 and 8.2 are reported to hang, and
# nothing was tried.
SILENT = 8


def device_id(qdev: str) -> str:
    """`vd0` from `/machine/peripheral/vd0/virtio-backend` and from a bare `vd0`; empty for a device without a name."""
    parts = qdev.split("/")
    if len(parts) == 1:
        return qdev
    return parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else ""


def survey(monitor: Monitor, targets: Mapping[str, str] | None = None) -> list[Disk]:
    """Every hard disk as it is attached now, nodes of ours left out.

    `targets` names devices by their id (libvirt: alias to target); devices that are not in it are left out. Without
    it a disk is named by its device's id. Raises DomainBusy when a disk's device sits on the filter of somebody
    else's job: QEMU 7.2 aborts if that job ends inside an epoch stacked above it. Who only looks does not hold the
    domain, so another process of ours may be exchanging nodes at this very moment: waits until it has.
    """
    limit = time.monotonic() + _PATIENCE
    while True:
        try:
            return _survey(monitor, targets)
        except _Exchanged:
            if time.monotonic() > limit:
                raise DomainBusy(domain=monitor.domain, reason="a disk's device is between two block nodes") from None
            time.sleep(0.05)


class _Exchanged(Exception):
    """A device has no image under it for a moment, or its node vanished between two questions."""


def _survey(monitor: Monitor, targets: Mapping[str, str] | None) -> list[Disk]:
    graph = nodes.read(monitor)
    found: list[Disk] = []
    for number, entry in enumerate(e for e in monitor.execute("query-block") if e.get("qdev") and e.get("inserted")):
        if entry.get("removable"):
            continue
        name = device_id(entry["qdev"])
        target = targets.get(name) if targets is not None else name or f"disk{number}"
        if target:
            found.append(_disk(monitor, graph, target, entry))
    return found


def _disk(monitor: Monitor, graph: Graph, target: str, entry: Mapping[str, Any]) -> Disk:
    device = entry["qdev"]
    node = graph.below_ours(entry["inserted"]["node-name"])
    if node in graph.nodes and graph.nodes[node].driver in _JOB_FILTERS:
        raise _in_use(monitor.domain, graph, target)
    storage = graph.storage(node)
    if storage not in graph.nodes:
        raise _Exchanged
    image = graph.nodes[storage]
    kind = _property(monitor, device, "type") or ""
    iothread = _iothread(monitor, device, kind)
    return Disk(
        target=target,
        source=_source(graph, image),
        format=_format(image),
        size=image.size,
        bus=_bus(kind),
        node=node,
        device=device,
        iothread=iothread,
        persistent=image.driver == "qcow2" and image.format_data.get("compat") != "0.10",
        read_only=image.read_only,
        refusal=_refusal(monitor, device, kind, iothread, graph, image),
        storage=storage,
    )


def _in_use(domain: str, graph: Graph, target: str) -> DomainBusy:
    if any(name.startswith(REVERT) for name in graph.nodes):
        # Ours, and it may never end by itself: with its keeper dead somebody has to go on with it.
        return DomainBusy(
            domain=domain, reason=f"a revert of {target} is under way",
            hint="`rewind resume` in the home that began it ends it",
        )  # fmt: skip
    return DomainBusy(domain=domain, reason=f"a backup or another block job works on {target}")


def _refusal(monitor: Monitor, device: str, kind: str, iothread: bool, graph: Graph, image: Node) -> str:
    if image.read_only:
        return "it is read-only"
    if image.name.startswith("#"):
        # Such a node belongs to its device alone: the moment the device sits on another one it is gone for good.
        return "it was attached with -drive; attach it with -blockdev and a node name"
    if kind.startswith("scsi") and iothread:
        # Both 7.2 and 10.0 refuse or abort when such a device's node is exchanged, and leave it on the wrong one.
        return "QEMU cannot exchange the block node of a virtio-scsi disk whose controller has an iothread"
    if iothread and nodes.major_version(monitor) >= SILENT:
        return (
            "this QEMU can leave a disk with an iothread waiting for ever when its guest is paused and resumed; remove"
            " the iothread, or shut the domain off for a point or a revert"
        )
    if not kind.startswith(("virtio-blk", "scsi-hd", "ide-hd")):
        return f"devices of type {kind or 'unknown'} are not supported"
    if _property(monitor, device, "share-rw"):
        return "it is shared: another guest may write to it unseen"
    if any(node.encrypted for node in graph.chain(image.name)):
        return "its image is encrypted by QEMU: its scratch data would be written in clear"
    if image.driver not in ("qcow2", "raw", *_LOCAL):
        return f"images of format {image.driver} are not supported"
    return ""


def _iothread(monitor: Monitor, device: str, kind: str) -> bool:
    if not kind.startswith("scsi"):
        return bool(_property(monitor, device, "iothread") or _property(monitor, device, "iothread-vq-mapping"))
    bus = _property(monitor, device, "parent_bus") or ""
    return bool(_property(monitor, bus.rpartition("/")[0], "iothread")) if bus else False


def _property(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return monitor.execute("qom-get", path=path, property=name)
    except MonitorError:
        return None


def _bus(kind: str) -> str:
    known = {"virtio-blk-device": "virtio", "virtio-blk-pci": "virtio", "scsi-hd": "scsi", "ide-hd": "sata"}
    return known.get(kind, kind)


def _format(image: Node) -> str:
    return "raw" if image.driver in _LOCAL else image.driver


def _source(graph: Graph, image: Node) -> str:
    """The path of the image; a file that was opened by descriptor or over a network keeps QEMU's words for it."""
    below = graph.nodes.get(image.children.get("file", ""))
    return below.path if below is not None and below.driver in _LOCAL else image.path
