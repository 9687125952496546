"""The block graph of a QEMU or storage daemon, read at one moment.

    device ─root─► rw-… (ours) ─file─► libvirt-N-filter (libvirt's) ─file─► image ─backing─► image …
                                       └───────── Disk.node ──────┘         └ Disk.storage

Reading changes nothing, waits for the end of somebody's block-pull where it has to (`all_nodes`), and what was read can
be old when it is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from appliance.errors import DomainBusy
from appliance.hypervisor.base import Monitor

__all__ = ["OURS", "REVERT", "Bitmap", "Graph", "Node", "all_nodes", "devices", "edges", "major_version", "read"]

# Every node, job, bitmap and fd set of ours begins so. `rw-ep` is an epoch's, `rw-rv` a revert's, `rw-off` the storage
# daemon's. QEMU allows 31 characters in a node name.
OURS = "rw-"
REVERT = "rw-rv"

# Drivers that hand every request down to one child and are not a place where data lives.
FILTERS = frozenset({"throttle", "copy-on-read", "copy-before-write", "preallocate", "mirror_top", "commit_top"})

# Of a job that has not come to its end. Its owner dismisses one that has, in milliseconds.
_AT_WORK = frozenset({"created", "running", "paused", "ready", "standby"})
_DISMISSED, _LOOK = 5.0, 0.02


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a node. `dirty` is in bytes. `good`: it can be merged from."""

    name: str
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool
    dirty: int
    granularity: int

    @property
    def good(self) -> bool:
        return not self.inconsistent and not self.busy


@dataclass(frozen=True, slots=True)
class Node:
    """A block node. `children` maps the name of an edge (`file`, `backing`, `target` …) to a node's name."""

    name: str
    driver: str
    size: int
    path: str
    read_only: bool
    encrypted: bool
    format_data: Mapping[str, Any]
    bitmaps: Mapping[str, Bitmap]
    children: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def filtered(self) -> str:
        """The node below, when this one is a filter; else empty."""
        return self.children.get("file", self.children.get("backing", "")) if self.driver in FILTERS else ""


@dataclass(frozen=True, slots=True)
class Graph:
    """All named nodes, and on which node each device sits (by `query-block`'s qdev)."""

    nodes: Mapping[str, Node]
    devices: Mapping[str, str]

    def place(self, device: str) -> str:
        """The node under the device, or under our tap while the device sits on that (see `seat`)."""
        name = self.devices.get(device, "")
        while name.startswith("rw-tp") and name in self.nodes and (below := self.nodes[name].filtered):
            name = below
        return name

    def below_ours(self, name: str) -> str:
        """The first node from `name` down that is not ours."""
        while name in self.nodes and self.nodes[name].ours:
            below = self.nodes[name].children
            # An image of ours (a revert's overlay) stands for what it lies on; only a filter hands down to its file.
            name = below.get("backing") or below.get("file") or ""
        return name

    def storage(self, name: str) -> str:
        """The first node from `name` down that is not a filter: the top image."""
        while name in self.nodes and (below := self.nodes[name].filtered):
            name = below
        return name

    def chain(self, name: str) -> Iterator[Node]:
        """The images from `name` down its backing chain, filters left out."""
        while name in self.nodes:
            node = self.nodes[name]
            if not node.filtered:
                yield node
            name = node.filtered or node.children.get("backing", "")


def major_version(monitor: Monitor) -> int:
    """Of the QEMU behind the monitor."""
    return int(monitor.execute("query-version")["qemu"]["major"])


def all_nodes(monitor: Monitor) -> list[dict[str, Any]]:
    """Each node by itself, as QEMU lists them. Waits for the end of a block-pull that has ended and that its owner has
    not dismissed yet: its filter has no child any more, and QEMU 7.2 dies of making up a file name for such a one
    (`bdrv_refresh_filename`, an implicit node). Raises DomainBusy when nobody dismisses it."""
    end = time.monotonic() + _DISMISSED
    while any(one["type"] == "stream" and one["status"] not in _AT_WORK for one in monitor.execute("query-jobs")):
        if time.monotonic() >= end:
            raise DomainBusy(domain=monitor.domain, reason="a block-pull has ended and is not dismissed")
        time.sleep(_LOOK)
    listed: list[dict[str, Any]] = monitor.execute("query-named-block-nodes", flat=True)
    return listed


def read(monitor: Monitor) -> Graph:
    """Three queries, four with QEMU before 10.1, which does not tell a node's children otherwise."""
    listed = all_nodes(monitor)
    if listed and all("children" in entry for entry in listed):
        below = {e["node-name"]: {c["child"]: c["node-name"] for c in e["children"]} for e in listed}
    else:
        below = edges(monitor)
    nodes = {entry["node-name"]: _node(entry, below.get(entry["node-name"], {})) for entry in listed}
    for name, node in nodes.items():
        # An image whose backing file was named otherwise than its header does has a JSON of options for a name.
        file = nodes.get(node.children.get("file", ""))
        if file is not None and node.path.startswith("json:") and file.driver in ("file", "host_device"):
            nodes[name] = replace(node, path=file.path)
    return Graph(nodes, devices(monitor))


def devices(monitor: Monitor) -> dict[str, str]:
    """Which node each device (by its qdev) sits on now; empty for a storage daemon."""
    if monitor.storage_daemon:
        return {}
    return {
        entry["qdev"]: entry["inserted"].get("node-name", "")
        for entry in monitor.execute("query-block")
        if entry.get("qdev") and entry.get("inserted")
    }


def edges(monitor: Monitor) -> dict[str, dict[str, str]]:
    """The children of every node by the name of the edge: one query, the cheapest look at a graph."""
    graph = monitor.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    found: dict[str, dict[str, str]] = {}
    for edge in graph["edges"]:
        found.setdefault(names[edge["parent"]], {})[edge["name"]] = names[edge["child"]]
    return found


def _node(entry: Mapping[str, Any], children: Mapping[str, str]) -> Node:
    image = entry.get("image", {})
    bitmaps = (_bitmap(one) for one in entry.get("dirty-bitmaps", ()) if one.get("name"))
    return Node(
        name=entry["node-name"],
        driver=entry["drv"],
        size=image.get("virtual-size", 0),
        path=image.get("filename", ""),
        read_only=entry["ro"],
        encrypted=bool(entry.get("encrypted") or image.get("encrypted") or entry["drv"] == "luks"),
        format_data=image.get("format-specific", {}).get("data", {}),
        bitmaps={bitmap.name: bitmap for bitmap in bitmaps},
        children=children,
    )


def _bitmap(entry: Mapping[str, Any]) -> Bitmap:
    return Bitmap(
        name=entry["name"],
        recording=entry["recording"],
        persistent=entry["persistent"],
        inconsistent=bool(entry.get("inconsistent")),
        busy=entry["busy"],
        dirty=entry["count"],
        granularity=entry["granularity"],
    )
