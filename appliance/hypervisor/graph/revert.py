"""The block graph of a revert, on the monitor of a running QEMU or of a storage daemon.

    before      device ──────────────────► D
    switched    device ─► O ─► P ────────► D        P's data file: the view of the wanted instant
    hydrated    device ─► O ─────────────► D        `block-commit` of P has moved its blocks into D
    merged      device ──────────────────► D        `block-commit` of O has moved what the guest wrote meanwhile

Where the first job would endanger the guest (`dataplane.pins`) the second moves the blocks of both.

`P` is the patch (`restore.patch`), `O` an empty overlay, `D` the guest's own disk. QEMU is only ever a client here: of
the view, until P is hydrated. Every step looks at the graph first and does what is missing, so it may be repeated after
any interruption; the names of nodes and jobs tell where it was (`rw-rvp-vda`, `rw-rvh-vda` …).

Graph changes are made while the guest is stopped: adding nodes under a disk with an active iothread kills QEMU.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import dataplane, nodes, seat

__all__ = [
    "Chain", "Place", "Progress", "ViewLost", "add_nodes", "cancel", "complete", "drop", "enter_hole", "hydrate",
    "leave_hole", "merge_ready", "place", "power_cycle", "reads_view", "stopped", "switch", "unswitch", "wait_ready",
]  # fmt: skip

# Polling and not events: the libvirt driver sees none of our jobs' events, and one query costs a millisecond.
_POLL = 0.05
# libvirt numbers its own descriptor sets from 0.
_FIRST_FDSET = 7100

Progress = Callable[[int, int], None]


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


class ViewLost(MonitorError):
    """A job of ours ended with an error: the view could not be read, or the disk not be written. D is half-way, the
    chain stands as it was, and the step can be repeated."""

    template = "job {command} of {domain!r} failed: {reason}"


# --- looking --------------------------------------------------------------------------------------------------------


def place(monitor: Monitor, chain: Chain) -> Place:
    """Where the disk is now. While a job of ours runs, its filter hides O from the device, or P from O."""
    if _job(monitor, chain.hydration) is not None:
        return Place.SWITCHED
    if _job(monitor, chain.merge) is not None:
        return Place.HYDRATED
    if chain.o not in _nodes(monitor) or (chain.device and _drive(monitor, chain) != chain.o):
        return Place.OWN
    return Place.SWITCHED if _has_backing(monitor, chain.o, chain.p) else Place.HYDRATED


def _nodes(monitor: Monitor) -> set[str]:
    return {str(node["node-name"]) for node in nodes.all_nodes(monitor)}


def _drive(monitor: Monitor, chain: Chain) -> str:
    """The node under the device, or under the tap that the device sits on. Raises MonitorError."""
    root = seat.root(monitor, chain.device)
    return seat.below_tap(nodes.edges(monitor), root) if root.startswith(seat.TAP) else root


def _root(monitor: Monitor, chain: Chain) -> dict[str, Any]:
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


def _job(monitor: Monitor, name: str) -> dict[str, Any] | None:
    found: dict[str, Any]
    for found in monitor.execute("query-jobs"):
        if found["id"] == name:
            return found
    return None


# --- the pause ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(monitor: Monitor, note: Callable[[bool], None] = lambda _stopped: None) -> Iterator[bool]:
    """Stop the guest; yields whether it ran. It goes on afterwards if it ran before, also after an error. `note` is
    told before a running guest is stopped and after it goes on, so that it can be put on record who has stopped it."""
    running = bool(monitor.execute("query-status")["running"])
    if running:
        note(True)
        monitor.execute("stop")
    try:
        yield running
    finally:
        if running:
            monitor.execute("cont")
            note(False)


def power_cycle(monitor: Monitor, timeout: float = 10.0) -> None:
    """Reset the stopped machine and wait until it has happened: a guest that ran on for an instant with its old memory
    would write stale blocks onto the new disk. It stays stopped."""
    monitor.execute("system_reset")
    deadline = time.monotonic() + timeout
    while monitor.execute("query-status")["status"] != "prelaunch":
        if time.monotonic() > deadline:
            raise DomainBusy(domain=monitor.domain, reason=f"the machine was not reset within {timeout:g} s")
        time.sleep(0.002)


# --- switching ------------------------------------------------------------------------------------------------------


def switch(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Put every disk's device onto its O, which reads as the wanted instant. The guest must be stopped.

    Raises MonitorError; every device is on its own D again then, and nothing of ours is left.
    """
    try:
        for chain in chains:
            add_nodes(monitor, chain)
        for chain in chains:
            _set_drive(monitor, chain, chain.o)
    except BaseException:  # also Ctrl-C: a guest goes on with all of its disks as they were, or with none
        unswitch(monitor, chains)
        raise


def unswitch(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Put every device back onto D and take our nodes away: allowed while nothing was committed and the guest has not
    run on O. Raises the first error, after everything has been tried."""
    first: MonitorError | None = None
    for chain in chains:
        try:
            if _drive(monitor, chain) in (chain.o, chain.hole):
                _through_hole(monitor, chain)
            drop(monitor, chain)
        except MonitorError as error:
            first = first or error
    if first is not None:
        raise first


def _set_drive(monitor: Monitor, chain: Chain, node: str) -> None:
    now = _drive(monitor, chain)
    if now == node:
        return
    if now not in (chain.node, chain.hole):
        raise DomainBusy(
            domain=monitor.domain, reason=f"disk {chain.target} is on node {now!r}, somebody is working on it"
        )
    seat.attach(monitor, chain.device, node)


def _through_hole(monitor: Monitor, chain: Chain) -> None:
    # D as O's backing may not be written by others, so O has to go before the device can be on D again.
    size = next(
        node["image"]["virtual-size"]
        for node in nodes.all_nodes(monitor)
        if node["node-name"] == chain.node
    )
    enter_hole(monitor, chain, size)
    leave_hole(monitor, chain, chain.node)


def enter_hole(monitor: Monitor, chain: Chain, size: int) -> None:
    """Put the device onto a hole of the disk's size and take our chain away. The guest must be stopped, and must not
    go on before `leave_hole`: its writes would be lost. May be repeated."""
    if chain.hole not in _nodes(monitor):
        monitor.execute("blockdev-add", driver="null-co", node_name=chain.hole, size=size, read_zeroes=True)
    if _drive(monitor, chain) != chain.hole:
        seat.attach(monitor, chain.device, chain.hole)
    drop(monitor, chain, keep_hole=True)


def leave_hole(monitor: Monitor, chain: Chain, node: str) -> None:
    """Put the device onto `node` instead of the hole. May be repeated."""
    _set_drive(monitor, chain, node)
    if chain.hole in _nodes(monitor):
        monitor.execute("blockdev-del", node_name=chain.hole)


def add_nodes(monitor: Monitor, chain: Chain) -> None:
    """Add view, P and O over D, as far as they are missing. Raises MonitorError."""
    nodes = _nodes(monitor)
    if chain.v not in nodes:
        monitor.execute(
            "blockdev-add", driver="nbd", node_name=chain.v, read_only=True, export=chain.export,
            server={"type": "unix", "path": os.fspath(chain.view)}, reconnect_delay=chain.reconnect,
        )  # fmt: skip
    if chain.p not in nodes:
        monitor.execute(
            "blockdev-add", driver="qcow2", node_name=chain.p, read_only=True, data_file=chain.v, backing=chain.node,
            file=_file(monitor, chain.patch, chain.number * 2, writable=False),
        )  # fmt: skip
    if chain.o not in nodes:
        monitor.execute(
            "blockdev-add", driver="qcow2", node_name=chain.o, discard="unmap", backing=chain.p,
            file=_file(monitor, chain.overlay, chain.number * 2 + 1, writable=True),
        )  # fmt: skip


def _file(monitor: Monitor, path: Path, number: int, writable: bool) -> dict[str, Any]:
    """The file as a block node. It goes to QEMU as a descriptor: QEMU runs as another user who may not open it. A
    storage daemon of ours takes no descriptors and needs none."""
    node = {"driver": "file", "read-only": not writable, "discard": "unmap" if writable else "ignore"}
    if monitor.storage_daemon:
        return {**node, "filename": os.fspath(path)}
    fdset = _FIRST_FDSET + number
    _forget_fds(monitor, fdset)
    handle = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        monitor.execute_with_fd("add-fd", handle, fdset_id=fdset)
    finally:
        # The image lock belongs to the open file description: our copy would keep it beyond QEMU's end.
        os.close(handle)
    return {**node, "filename": f"/dev/fdset/{fdset}"}


def _forget_fds(monitor: Monitor, fdset: int) -> None:
    with contextlib.suppress(MonitorError):  # there is none
        monitor.execute("remove-fd", fdset_id=fdset)


def drop(monitor: Monitor, chain: Chain, keep_hole: bool = False) -> None:
    """Take away our nodes: O, P, view, in that order. Raises MonitorError if one is in use."""
    nodes = _nodes(monitor)
    for node in (chain.o, chain.p, chain.v, *(() if keep_hole else (chain.hole,))):
        if node in nodes:
            monitor.execute("blockdev-del", node_name=node)
    for number in (0, 1):
        _forget_fds(monitor, _FIRST_FDSET + chain.number * 2 + number)


# --- the background retrieval ---------------------------------------------------------------------------------------


def hydrate(
    monitor: Monitor, chain: Chain, speed: int = 0, progress: Progress | None = None, held: bool = True
) -> None:
    """Move P's blocks into D, at most `speed` bytes a second (0: no limit), and take P out of the chain.

    Returns when it is done, at once if it was done before; a job that runs already is followed. `progress` is told
    bytes done and total. `held`: the guest stands still until we let it go on; else see `dataplane` for what is waited
    for. Raises ViewLost, NotDriven, MonitorError, DomainLost.
    """
    if _job(monitor, chain.hydration) is None:
        _begin(monitor, chain, speed, held)
    _finish(monitor, chain.hydration, progress)
    _drop_patch(monitor, chain)


def _begin(monitor: Monitor, chain: Chain, speed: int, held: bool) -> None:
    """Again when the driver let go of the device just then: the job is taken back before it takes it over again."""
    while place(monitor, chain) is Place.SWITCHED:
        if not held:
            dataplane.await_driver(monitor, chain.device)
        monitor.execute(
            "block-commit", job_id=chain.hydration, **_root(monitor, chain), top_node=chain.p, base_node=chain.node,
            speed=speed, auto_dismiss=False, backing_file=chain.source,
        )  # fmt: skip
        if held or dataplane.driven(monitor, chain.device):
            return
        cancel(monitor, [chain])
        if _job(monitor, chain.hydration) is not None:
            return  # it could not be taken back and has to be followed


def _drop_patch(monitor: Monitor, chain: Chain) -> None:
    nodes = _nodes(monitor)
    for node in (chain.p, chain.v):
        if node in nodes:
            monitor.execute("blockdev-del", node_name=node)
    _forget_fds(monitor, _FIRST_FDSET + chain.number * 2)


def _finish(monitor: Monitor, name: str, progress: Progress | None) -> None:
    while (job := _job(monitor, name)) is not None:
        if progress is not None:
            progress(int(job["current-progress"]), int(job["total-progress"]))
        if job["status"] == "concluded":
            monitor.execute("job-dismiss", id=name)
            if "error" in job:
                raise ViewLost(domain=monitor.domain, command=name, reason=str(job["error"]))
            return
        time.sleep(_POLL)


# --- what the guest wrote meanwhile ---------------------------------------------------------------------------------


def merge_ready(monitor: Monitor, chain: Chain, speed: int = 0) -> bool:
    """Start to move O's blocks into D, once P is hydrated; whether they have caught up with the guest.

    Call it again until it says so; then `complete`. Raises ViewLost, MonitorError, DomainLost.
    """
    job = _job(monitor, chain.merge)
    if job is None:
        monitor.execute(
            "block-commit", job_id=chain.merge, **_root(monitor, chain), top_node=chain.o, base_node=chain.node,
            speed=speed, auto_dismiss=False,
        )  # fmt: skip
        return False
    if job["status"] == "concluded":
        _finish(monitor, chain.merge, None)  # raises what it failed of
    return bool(job["status"] == "ready")


def wait_ready(
    monitor: Monitor, chains: Sequence[Chain], speed: int = 0, progress: Progress | None = None, patience: float = 5.0,
    note: Callable[[bool], None] = lambda _stopped: None,
) -> None:  # fmt: skip
    """Merge all disks until each has caught up. A guest that writes faster than the job copies is held for moments
    after `patience` seconds, at most 100 ms in each second; `note` as in `stopped`. Not while a view is read: a `stop`
    would wait for it, so such a guest ends the merge when it rests."""
    begun = time.monotonic()
    if reads_view(monitor, chains):
        patience = math.inf
    held = False
    while not _all_ready(monitor, chains, speed):
        if progress is not None:
            _tell(monitor, chains, progress)
        impatient = time.monotonic() - begun > patience
        if not impatient:
            time.sleep(_POLL)
            continue
        with stopped(monitor, note):
            deadline = time.monotonic() + 0.1
            while not (held := _all_ready(monitor, chains, speed)):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        if held:
            return
        time.sleep(1.0)


def _all_ready(monitor: Monitor, chains: Sequence[Chain], speed: int) -> bool:
    ready = [merge_ready(monitor, chain, speed) for chain in chains]  # every disk's job is started, not only the first
    return all(ready)


def _tell(monitor: Monitor, chains: Sequence[Chain], progress: Progress) -> None:
    jobs = [job for chain in chains if (job := _job(monitor, chain.merge)) is not None]
    progress(sum(int(job["current-progress"]) for job in jobs), sum(int(job["total-progress"]) for job in jobs))


def reads_view(monitor: Monitor, chains: Sequence[Chain]) -> bool:
    """Whether any of these disks still needs its view."""
    return bool(_nodes(monitor) & {chain.v for chain in chains})


def complete(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Pivot every device onto D and take O away. The guest must be stopped, so that what is on record about this step
    can be made true before the guest writes to D. Raises ViewLost, MonitorError; may be repeated."""
    for chain in chains:
        job = _job(monitor, chain.merge)
        if job is not None and job["status"] == "ready":
            monitor.execute("job-complete", id=chain.merge)
    for chain in chains:
        _finish(monitor, chain.merge, None)
        if chain.device and _drive(monitor, chain) != chain.node:
            raise DomainBusy(
                domain=monitor.domain, reason=f"disk {chain.target} is not on {chain.node!r} after the merge"
            )
        drop(monitor, chain)


def cancel(monitor: Monitor, chains: Sequence[Chain], timeout: float = 30.0) -> None:
    """End our jobs where they are; the chains stay as they stand. Safe when there are none."""
    deadline = time.monotonic() + timeout
    for chain in chains:
        for name in (chain.hydration, chain.merge):
            while (job := _job(monitor, name)) is not None and time.monotonic() < deadline:
                with contextlib.suppress(MonitorError):  # it ended by itself meanwhile
                    monitor.execute("job-dismiss" if job["status"] == "concluded" else "job-cancel", id=name)
                time.sleep(_POLL)
