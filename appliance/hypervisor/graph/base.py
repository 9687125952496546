"""The ground of every recipe: pause a guest, move its devices over a hole, put everything back.

    with paused(monitor):                        # one instant over all disks
        swap(monitor, disk, build)               # device ─► hole ─► build()'s node;  on error back on its own node
                                                 # leaving restores the state that was found, never on a hole

Rules that were paid for with guests:
* the graph below a device changes only while the guest is paused (an active iothread is killed by it otherwise);
* `qom-set` of the node that a device already sits on aborts QEMU: `attach` always looks first;
* `cont` while a device sits on a hole loses the guest's writes: it stays paused instead, and LeftPaused is raised;
* libvirt's state is not ours: a guest that was found paused is left paused.

Names: every node, job and bitmap of ours begins with `rw-`; an epoch's with `rw-ep`, a revert's with `rw-rv`, so that
whoever cleans up knows what may be taken away and what carries a guest's data.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from appliance.errors import DomainBusy, HypervisorError, LeftPaused, MonitorError
from appliance.hypervisor.base import Disk, Monitor
from appliance.hypervisor.graph import nodes, seat
from appliance.hypervisor.graph.nodes import OURS, REVERT, Graph
from appliance.hypervisor.graph.seat import TAP, attach, attached
from appliance.hypervisor.graph.survey import survey

__all__ = [
    "EPOCH", "OURS", "REVERT", "TAP", "Graph", "Pause", "attach", "attached", "clean", "fill_hole", "hole_name", "jobs",
    "leftovers", "make_hole", "nodes", "paused", "remove_nodes", "survey", "swap", "wait_jobs_gone",
]  # fmt: skip

EPOCH = "rw-ep"
_HOLE = "rw-hole"

# States in which the block graph belongs to somebody else.
_IN_TRANSIT = frozenset({"inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo"})

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pause:
    """What `paused` found and did. `seconds` is set when it has ended, `restored` when the guest then is as it was
    found, also after an error."""

    found_running: bool
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    restored: bool = False


@contextmanager
def paused(monitor: Monitor, *, before: Callable[[bool], None] | None = None) -> Iterator[Pause]:
    """Stop the guest for the block and restore the state that was found, also after an error in the block.

    `before` is told the found state just before `stop` (the guard that resumes a guest whose tamer died). Raises
    DomainBusy when the domain is being migrated or saved (nothing was done), LeftPaused when a device sits on a hole
    at the end (the guest was not resumed).
    """
    status = monitor.execute("query-status")
    if status["status"] in _IN_TRANSIT:
        raise DomainBusy(domain=monitor.domain, reason=f"it is in state {status['status']}")
    if before is not None:
        before(status["running"])
    pause = Pause(status["running"])
    if pause.found_running:
        monitor.execute("stop")
    try:
        yield pause
    except BaseException as error:
        _end(monitor, pause, suspicious=not isinstance(error, LeftPaused), refuse=isinstance(error, LeftPaused))
        raise
    else:
        _end(monitor, pause, suspicious=False, refuse=False)


def _end(monitor: Monitor, pause: Pause, *, suspicious: bool, refuse: bool) -> None:
    if suspicious:
        # A revert that failed in its switch is as bad as a hole: the guest's memory does not belong to what it reads.
        wrong = (_HOLE, seat.TAP_HOLE, REVERT)
        graph = nodes.read(monitor)
        holes = [device for device in graph.devices if graph.place(device).startswith(wrong)]
        if holes:
            raise LeftPaused(domain=monitor.domain, disk=", ".join(holes), reason="it could not be put back")
    if pause.found_running and not refuse:
        monitor.execute("cont")
    pause.restored = not refuse
    pause.seconds = time.monotonic() - pause.began


def hole_name(disk: Disk) -> str:
    """The node that stands in for a disk while its device is moved."""
    return f"{_HOLE}-{disk.target}"[:31]


def make_hole(monitor: Monitor, disk: Disk) -> None:
    """What `swap` needs, made before a pause to make that shorter; `fill_hole` afterwards."""
    monitor.execute("blockdev-add", driver="null-co", node_name=hole_name(disk), size=disk.size, read_zeroes=True)


def fill_hole(monitor: Monitor, disk: Disk) -> None:
    """Delete it; also when it is not there."""
    _remove_quietly(monitor, hole_name(disk))


def swap(monitor: Monitor, disk: Disk, build: Callable[[], str], *, hole_made: bool = False) -> None:
    """Move the disk's device over a hole onto the node whose name `build` returns. Only inside `paused`.

    `build` runs while the device sits on the hole, so nodes that do not share writing can be made and removed. After
    any error the device sits on the disk's own node again, or LeftPaused is raised and the guest must not go on. With
    `hole_made` the caller made the hole and fills it.
    """
    if not hole_made:
        make_hole(monitor, disk)
    try:
        root = seat.root(monitor, disk.device)
        if root != hole_name(disk):
            seat.move(monitor, disk.device, root, hole_name(disk))
        node = build()
        # The hole is the place: no need to look first, and every command counts here.
        seat.move(monitor, disk.device, root, node)
    except BaseException:  # also Ctrl-C: no guest goes on over a hole
        _put_back(monitor, disk)
        if not hole_made:
            fill_hole(monitor, disk)
        raise
    if not hole_made:
        fill_hole(monitor, disk)


def _put_back(monitor: Monitor, disk: Disk) -> None:
    """Back onto the disk's own node, from wherever a failed swap left the device; once more after a lost reply."""
    last: HypervisorError | None = None
    for _ in range(3):
        try:
            graph = nodes.read(monitor)
            if not graph.place(disk.device).startswith(_HOLE):
                return
            remove_nodes(monitor, EPOCH, graph)
            attach(monitor, disk.device, disk.node)
            return
        except HypervisorError as error:
            last = error
            time.sleep(0.02)
    raise LeftPaused(domain=monitor.domain, disk=disk.target, reason=str(last)) from last


def leftovers(monitor: Monitor, prefix: str = OURS) -> list[str]:
    """Nodes and jobs of ours that exist now, by name. The bitmaps that record are no leftovers and not listed."""
    found = [name for name in nodes.read(monitor).nodes if name.startswith((prefix, _HOLE))]
    return found + [job["id"] for job in jobs(monitor) if job["id"].startswith(prefix)]


def clean(monitor: Monitor, disks: Sequence[Disk] = (), prefix: str = EPOCH, resume: bool = False) -> list[str]:
    """Take away what a dead process of ours left: abort its jobs, put each device on its own node, delete its nodes.

    Only names with `prefix` are touched; a revert's nodes carry data, so they are never taken away here. `resume`
    lets the guest go on if it is found paused. Returns what was removed. Nothing of a living process may be cleaned:
    the caller holds the domain's lock. Raises LeftPaused if a device could not be put back.
    """
    found = [] if monitor.storage_daemon else _sweep_tap(monitor)
    if left := leftovers(monitor, prefix):
        found += left
        _log.info("%s: removing leftovers %s", monitor.domain, ", ".join(found))
        _abort_jobs(monitor, prefix)
        if monitor.storage_daemon:
            remove_nodes(monitor, prefix)
        else:
            with paused(monitor):
                _return_devices(monitor, prefix)
                remove_nodes(monitor, prefix)
    _drop_unions(monitor, prefix)
    if resume and monitor.execute("query-status")["status"] == "paused":
        monitor.execute("cont")
    return found


def _sweep_tap(monitor: Monitor) -> list[str]:
    from appliance.hypervisor.graph import tap  # it is built upon this module

    return tap.sweep(monitor)


def _drop_unions(monitor: Monitor, prefix: str) -> None:
    """A bitmap that said what to push outlives its nodes when the process dies between removing both. It is only a copy
    or for this epoch alone: what recorded is still there. One that a job uses goes with the next cleaning."""
    for node in nodes.read(monitor).nodes.values():
        for name in node.bitmaps:
            if name.startswith(prefix):
                with contextlib.suppress(MonitorError):
                    monitor.execute("block-dirty-bitmap-remove", node=node.name, name=name)


def _return_devices(monitor: Monitor, prefix: str) -> None:
    graph = nodes.read(monitor)
    for device in graph.devices:
        node = graph.place(device)
        if not node.startswith((prefix, _HOLE)):
            continue
        own = graph.below_ours(node) if node.startswith(prefix) else _lost_node(graph, device)
        if not own:
            raise LeftPaused(domain=monitor.domain, disk=device, reason="its own node is not known")
        if node.startswith(_HOLE):
            # What was built already does not share writing with the device.
            remove_nodes(monitor, prefix, graph)
            attach(monitor, device, own)
            continue
        disk = Disk(target="clean", source="", format="", size=graph.nodes[node].size, node=own, device=device)
        swap(monitor, disk, lambda own=own, node=node: _take_out(monitor, node, own))  # type: ignore[misc]


def _lost_node(graph: Graph, device: str) -> str:
    """The root image of which the hole took the place: libvirt numbers them, and it is the one that nobody uses."""
    used = {child for node in graph.nodes.values() if not node.ours for child in node.children.values()}
    used.update(graph.below_ours(node) for other, node in graph.devices.items() if other != device)
    hole = graph.nodes[graph.place(device)]
    free = [n.name for n in graph.nodes.values() if not n.ours and n.name not in used and n.size == hole.size]
    return free[0] if len(free) == 1 else ""


def _take_out(monitor: Monitor, top: str, own: str) -> str:
    remove_nodes(monitor, EPOCH)
    return own


def remove_nodes(monitor: Monitor, prefix: str, graph: Graph | None = None) -> None:
    """Delete our nodes from the top down. One that is still in use stays, and the next cleaning finds it."""
    graph = graph or nodes.read(monitor)
    taken = {*graph.devices.values(), *map(graph.place, graph.devices)}
    names = [name for name in graph.nodes if name.startswith((prefix, _HOLE)) and name not in taken]
    for _ in range(len(names)):
        names = [name for name in names if not _remove_quietly(monitor, name)]
        if not names:
            return


def _remove_quietly(monitor: Monitor, node: str) -> bool:
    try:
        monitor.execute("blockdev-del", node_name=node)
    except MonitorError as error:
        # In use by a parent that goes in the next round, or gone already.
        return "find" in str(error)
    return True


def jobs(monitor: Monitor) -> list[dict[str, Any]]:
    """QEMU's background jobs: id, type, status, current-progress, total-progress, error when it failed."""
    listed: list[dict[str, Any]] = monitor.execute("query-jobs")
    return listed


def broken_off(monitor: Monitor, names: Collection[str]) -> dict[str, str]:
    """Those of these jobs that stand still because of an error, which they were told to do, with what QEMU knows of it:
    `nospace` or `failed`."""
    listed: list[dict[str, Any]] = monitor.execute("query-block-jobs")
    return {job["device"]: job["io-status"] for job in listed if job["device"] in names and job["io-status"] != "ok"}


def wait_jobs_gone(monitor: Monitor, names: Sequence[str], timeout: float) -> bool:
    """Whether all these jobs have left within `timeout` seconds; concluded ones are dismissed on the way."""
    limit = time.monotonic() + timeout
    while True:
        mine = [job for job in jobs(monitor) if job["id"] in names]
        for job in mine:
            if job["status"] == "concluded":
                monitor.execute("job-dismiss", id=job["id"])
        if not mine:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)


def _abort_jobs(monitor: Monitor, prefix: str) -> None:
    mine = [job["id"] for job in jobs(monitor) if job["id"].startswith(prefix)]
    for name in mine:
        try:
            monitor.execute("job-cancel", id=name)
        except MonitorError:
            pass  # concluded already, which is what we want
    if not wait_jobs_gone(monitor, mine, 10):
        raise DomainBusy(domain=monitor.domain, reason=f"jobs {', '.join(mine)} of ours do not end")
