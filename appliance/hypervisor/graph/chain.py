"""The chain of one disk in a revert: its names, and how far it has come in the block graph of a QEMU or storage daemon.

    before      device ──────────────────► D
    switched    device ─► O ─► P ────────► D        P's data file: the view of the wanted instant
    hydrated    device ─► O ─────────────► D        `block-commit` of P has moved its blocks into D
    merged      device ──────────────────► D        `block-commit` of O has moved what the guest wrote meanwhile

Where the first job would endanger the guest (`dataplane.pins`) the second moves the blocks of both. Putting a device on
its chain is switching.py, the two jobs are retrieval.py.

`P` is the patch (`restore.patch`), `O` an empty overlay, `D` the guest's own disk. QEMU is only ever a client here: of
the view, until P is hydrated. Every step looks at the graph first and does what is missing, so it may be repeated after
any interruption; the names of nodes and jobs tell where it was (`rw-rvp-vda`, `rw-rvh-vda` …).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import nodes, seat

__all__ = ["Chain", "Place", "drive", "job_of", "names", "place", "top"]


class Place(Enum):
    """How far one disk has come, as its block graph shows it."""

    OWN = "own"
    SWITCHED = "switched"
    HYDRATED = "hydrated"


@dataclass(frozen=True, slots=True)
class Chain:
    """One disk's part in a revert.

    `node` is D, `device` the path of the guest's device (empty in a storage daemon), `source` D's file, `patch` and
    `overlay` the files of P and O, `view` the socket and `export` the name of the view. `reconnect` is how many
    seconds QEMU lets a read wait for a view that is gone before the guest is told of an error. `number` tells the
    disks of one revert apart in QEMU's descriptor sets.
    """

    target: str
    node: str
    device: str
    source: str
    patch: Path
    overlay: Path
    view: Path
    export: str
    reconnect: int
    number: int = 0

    @property
    def p(self) -> str:
        return f"rw-rvp-{self.target}"[:31]

    @property
    def o(self) -> str:
        return f"rw-rvo-{self.target}"[:31]

    @property
    def v(self) -> str:
        return f"rw-rvv-{self.target}"[:31]

    @property
    def hole(self) -> str:
        return f"rw-rvx-{self.target}"[:31]

    @property
    def filter(self) -> str:
        """The filter of either job, under a tap."""
        return f"rw-rvf-{self.target}"[:31]

    @property
    def hydration(self) -> str:
        """The job that moves P's blocks into D."""
        return f"rw-rvh-{self.target}"[:31]

    @property
    def merge(self) -> str:
        """The job that moves what the guest wrote meanwhile into D."""
        return f"rw-rvm-{self.target}"[:31]


def place(monitor: Monitor, chain: Chain) -> Place:
    """Where the disk is now. While a job of ours runs, its filter hides O from the device, or P from O."""
    if job_of(monitor, chain.hydration) is not None:
        return Place.SWITCHED
    if job_of(monitor, chain.merge) is not None:
        return Place.HYDRATED
    if chain.o not in names(monitor) or (chain.device and drive(monitor, chain) != chain.o):
        return Place.OWN
    return Place.SWITCHED if _has_backing(monitor, chain.o, chain.p) else Place.HYDRATED


def names(monitor: Monitor) -> set[str]:
    """Of all nodes."""
    return {str(node["node-name"]) for node in nodes.all_nodes(monitor)}


def drive(monitor: Monitor, chain: Chain) -> str:
    """The node under the device, or under the tap that the device sits on. Raises MonitorError."""
    root = seat.root(monitor, chain.device)
    return seat.below_tap(nodes.edges(monitor), root) if root.startswith(seat.TAP) else root


def top(monitor: Monitor, chain: Chain) -> dict[str, Any]:
    """What a commit has to be told of the top of the graph. Under a tap its filter gets a name, or QEMU's own would
    look like somebody else's job there."""
    if chain.device and (root := seat.root(monitor, chain.device)).startswith(seat.TAP):
        return {"device": root, "filter_node_name": chain.filter}
    return {"device": chain.o}


def _has_backing(monitor: Monitor, node: str, backing: str) -> bool:
    graph = monitor.execute("x-debug-query-block-graph")
    ids = {entry["id"]: entry["name"] for entry in graph["nodes"]}
    return any(
        ids.get(edge["parent"]) == node and edge["name"] == "backing" and ids.get(edge["child"]) == backing
        for edge in graph["edges"]
    )


def job_of(monitor: Monitor, name: str) -> dict[str, Any] | None:
    """The job of that name, if it is there."""
    found: dict[str, Any]
    for found in monitor.execute("query-jobs"):
        if found["id"] == name:
            return found
    return None
