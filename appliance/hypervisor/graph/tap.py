"""The block graph of the tap: every write of the guest is also sent to the journal, in the order of its completion.

    device ─► rw-tpg-vda ─► rw-tpm-vda (mirror, job rw-tpj-vda) ─► rw-tpf-vda ─► D
              throttle        └─target─► rw-tps-vda ─► journal     throttle

The throttles have no limits. The lower one is ours to be mirrored from, so that libvirt's nodes stay free for other
jobs; the upper one is what commits under the mirror name as their root. Where `D` is, epochs and reverts put theirs
(see `seat`).

Everything is built over a hole while the guest runs, the mirror READY; in the pause each disk takes two commands: the
lower filter goes onto D, then the device onto the upper one. So at any instant a device is on D or on a whole tap.
Taking off is the same backwards. QEMU drains its requests at both: the sink must answer, or be dead. A watchdog kills
one that hangs; no command gets through to QEMU before.

The caller holds the domain's lock, as for every change of the graph.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import Disk, Monitor
from appliance.hypervisor.graph import base, nodes, seat
from appliance.hypervisor.graph.seat import TAP, tap_name

__all__ = [
    "TAP", "Attached", "TapState", "attach", "clean", "detach", "recording", "sinks", "state", "sweep", "take_off",
]  # fmt: skip

# Smaller would cost the job memory, larger would make it pad what the guest writes.
_GRANULARITY = 4096
_READY_TIMEOUT = 5.0
# A drained job that was READY says so.
_READY = frozenset({"ready", "standby"})
_NODES = ("g", "m", "f", "s", "h")


class TapState(Enum):
    """`BROKEN`: the job has ended or pieces are left; the guest's disk is well, but writes are not recorded."""

    ABSENT = "absent"
    RUNNING = "running"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Attached:
    """`moment` lies in the pause: what completes later is in the journal. `pause_seconds` is 0 for a guest that was
    found paused."""

    pause_seconds: float
    moment: datetime


def attach(
    monitor: Monitor,
    disks: Sequence[Disk],
    socket: Path,
    *,
    before: Callable[[bool], None] | None = None,
    after: Callable[[], None] | None = None,
) -> Attached:
    """Tap these disks, all at one instant. The journal's server answers at `socket`, where QEMU's user must be able to
    reach it; a disk's export is its target.

    `before` as in `base.paused`; `after` is told when the guest is again as it was found, also after an error. Raises
    DomainBusy (a disk is tapped already, or somebody works on it), MonitorError (QEMU or the sink refused): every
    device is on its own node then and nothing is left. LeftPaused as `base.paused`. After DomainLost `clean`.
    """
    sweep(monitor)
    if tapped := [disk.target for disk in disks if _is_tapped(monitor, disk)]:
        raise DomainBusy(domain=monitor.domain, reason=f"{', '.join(tapped)}: there is a tap already")
    try:
        for disk in disks:
            _build(monitor, disk, socket)
        _await_ready(monitor, disks)
        pause, moment = _seat(monitor, disks, before, after)
    except BaseException:  # also Ctrl-C: half a tap would be taken for one that has ended
        _drop(monitor, [disk.target for disk in disks])
        raise
    for disk in disks:
        _delete(monitor, tap_name("h", disk.target))
    return Attached(pause.seconds if pause.found_running else 0.0, moment)


def _is_tapped(monitor: Monitor, disk: Disk) -> bool:
    return seat.root(monitor, disk.device).startswith(TAP)


def _build(monitor: Monitor, disk: Disk, socket: Path) -> None:
    """The whole tap over a hole: nothing here touches the disk."""
    f, g, m, s, h, t = (tap_name(part, disk.target) for part in "fgmsht")
    monitor.execute("object-add", qom_type="throttle-group", id=t)
    monitor.execute("blockdev-add", driver="null-co", node_name=h, size=disk.size, read_zeroes=True)
    _add_sink(monitor, s, disk.target, socket)
    monitor.execute("blockdev-add", driver="throttle", node_name=f, throttle_group=t, file=h, discard="unmap")
    monitor.execute(
        "blockdev-mirror", job_id=tap_name("j", disk.target), device=f, target=s, filter_node_name=m, sync="none",
        copy_mode="write-blocking", on_target_error="report", granularity=_GRANULARITY, auto_dismiss=False,
    )  # fmt: skip
    monitor.execute("blockdev-add", driver="throttle", node_name=g, throttle_group=t, file=m, discard="unmap")


def _add_sink(monitor: Monitor, name: str, export: str, socket: Path) -> None:
    """By path and not by a descriptor. QEMU tries to connect again, in the background and for as long as the node is
    there; of a descriptor it remembers the number, and closes whatever file has that number by then."""
    server = {"type": "unix", "path": os.fspath(socket)}
    monitor.execute("blockdev-add", driver="nbd", node_name=name, export=export, server=server)


def _await_ready(monitor: Monitor, disks: Sequence[Disk]) -> None:
    limit = time.monotonic() + _READY_TIMEOUT
    while waiting := _not_ready(monitor, disks):
        if time.monotonic() > limit:
            raise DomainBusy(domain=monitor.domain, reason=f"the mirror of {', '.join(waiting)} does not get ready")
        time.sleep(0.002)


def recording(monitor: Monitor, disks: Sequence[Disk]) -> bool:
    """Whether these taps, which were seen RUNNING under the same lock, still are: one query, for a pause."""
    try:
        return not _not_ready(monitor, disks)
    except MonitorError:
        return False


def _not_ready(monitor: Monitor, disks: Sequence[Disk]) -> list[str]:
    """Raises MonitorError for a job that has ended."""
    found = {job["id"]: job for job in base.jobs(monitor)}
    waiting = []
    for disk in disks:
        job = found.get(tap_name("j", disk.target), {"status": "gone"})
        if job["status"] in ("gone", "concluded", "aborting"):
            reason = job.get("error", "the job has ended")
            raise MonitorError(domain=monitor.domain, command="blockdev-mirror", reason=f"{disk.target}: {reason}")
        if job["status"] not in _READY:
            waiting.append(disk.target)
    return waiting


def _seat(
    monitor: Monitor,
    disks: Sequence[Disk],
    before: Callable[[bool], None] | None,
    after: Callable[[], None] | None,
) -> tuple[base.Pause, datetime]:
    with _pause(monitor, before, after) as pause:
        for disk in disks:
            if (where := seat.attached(monitor, disk.device)) != disk.node:
                raise DomainBusy(domain=monitor.domain, reason=f"someone works on {disk.target}: it is on {where!r}")
        try:
            for disk in disks:
                seat.reopen(monitor, tap_name("f", disk.target), disk.node)
                monitor.execute("qom-set", path=disk.device, property="drive", value=tap_name("g", disk.target))
            _await_ready(monitor, disks)
        except BaseException:  # also Ctrl-C: the guest goes on after this pause
            _unseat(monitor, [disk.target for disk in disks])
            raise
        moment = datetime.now(UTC)
    return pause, moment


@contextlib.contextmanager
def _pause(
    monitor: Monitor, before: Callable[[bool], None] | None, after: Callable[[], None] | None
) -> Iterator[base.Pause]:
    pause: base.Pause | None = None
    try:
        with base.paused(monitor, before=before) as pause:
            yield pause
    finally:
        if after is not None and pause is not None and pause.restored:
            after()


def _unseat(monitor: Monitor, targets: Iterable[str]) -> None:
    """In a pause: devices of these taps onto the place below, the lower filters onto their holes. In this order: a
    device is never over a hole."""
    edges = nodes.edges(monitor)
    tapped = {node: device for device, node in nodes.devices(monitor).items() if node.startswith(TAP)}
    for target in targets:
        f, g, h = (tap_name(part, target) for part in "fgh")
        place = seat.below_tap(edges, f)
        if g in tapped:
            monitor.execute("qom-set", path=tapped[g], property="drive", value=place)
        if f in edges and place != h:
            seat.reopen(monitor, f, h)


def detach(
    monitor: Monitor,
    disks: Sequence[Disk],
    *,
    before: Callable[[bool], None] | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Take the tap off these disks, all at one instant; also when its job has ended. May be repeated.

    What the guest wrote before the pause is in the journal. Raises DomainBusy while a revert is under way below the
    tap; the rest as `attach`, and the disks of which the tap is not off yet are whole.
    """
    base.clean(monitor)
    wanted = [disk.target for disk in disks]
    _remove(monitor, [target for target in _present(monitor) if target in wanted], before, after)


def clean(monitor: Monitor) -> list[str]:
    """Take every tap off, and what is left of half-made ones and of disks that were unplugged under theirs (libvirt's
    nodes too, which we alone hold open). Returns what was removed. Raises as `detach`."""
    removed = base.clean(monitor)
    present = _present(monitor)
    names = _pieces(monitor, present)
    _remove(monitor, present, None, None)
    return removed + names


def take_off(monitor: Monitor) -> None:
    """Inside a pause of the caller: take every tap off, also another home's, and leave all else. Raises as `detach`."""
    _remove(monitor, _present(monitor), None, None)


def sinks(monitor: Monitor) -> dict[str, str]:
    """Paths of the sockets to which taps that devices sit on send, by target; of any home."""
    seated = set(nodes.devices(monitor).values())
    prefix = tap_name("s", "")
    found = {}
    for node in nodes.all_nodes(monitor):
        name, file = str(node["node-name"]), str(node.get("file", ""))
        if name.startswith(prefix) and tap_name("g", name[len(prefix) :]) in seated:
            found[name[len(prefix) :]] = file.partition("socket=")[2]
    return found


def sweep(monitor: Monitor) -> list[str]:
    """What `clean` does, but taps on which a device sits stay as they are."""
    seated = set(nodes.devices(monitor).values())
    loose = [target for target in _present(monitor) if tap_name("g", target) not in seated]
    names = _pieces(monitor, loose)
    _remove(monitor, loose, None, None)
    return names


def _present(monitor: Monitor) -> list[str]:
    """Targets of which there is a piece of a tap, a node or a job (names are cut to QEMU's length)."""
    names = {str(node["node-name"]) for node in nodes.all_nodes(monitor)}
    names.update(str(job["id"]) for job in base.jobs(monitor))
    return sorted({name[len(TAP) + 2 :] for name in names if name.startswith(TAP)})


def _pieces(monitor: Monitor, targets: Sequence[str]) -> list[str]:
    if not targets:
        return []
    return [name for name in base.leftovers(monitor, TAP) if name[len(TAP) + 2 :] in targets]


def _remove(
    monitor: Monitor,
    targets: Sequence[str],
    before: Callable[[bool], None] | None,
    after: Callable[[], None] | None,
) -> None:
    if not targets:
        return
    graph = nodes.read(monitor)
    tied = [target for target in targets if _tied(graph, target)]
    _refuse_revert(monitor, graph, tied)
    orphans = _orphans(graph, tied)
    if tied:
        for target in tied:
            if (h := tap_name("h", target)) not in graph.nodes:
                size = graph.nodes[tap_name("f", target)].size
                monitor.execute("blockdev-add", driver="null-co", node_name=h, size=size, read_zeroes=True)
        with _pause(monitor, before, after):
            _unseat(monitor, tied)
    _drop(monitor, targets)
    for name in orphans:
        _delete(monitor, name)


def _tied(graph: nodes.Graph, target: str) -> bool:
    """Whether the lower filter hangs on something that is not the tap's."""
    f = graph.nodes.get(tap_name("f", target))
    return f is not None and f.filtered != tap_name("h", target)


def _refuse_revert(monitor: Monitor, graph: nodes.Graph, targets: Sequence[str]) -> None:
    for target in targets:
        if graph.nodes[tap_name("f", target)].filtered.startswith(base.REVERT):
            raise DomainBusy(domain=monitor.domain, reason=f"a revert of {target} is under way")


def _orphans(graph: nodes.Graph, targets: Sequence[str]) -> list[str]:
    """Nodes that libvirt wanted to delete with their device and could not, because of us; from the top down."""
    seated = set(graph.devices.values())
    found: list[str] = []
    for target in targets:
        if tap_name("g", target) not in seated:
            todo = [graph.below_ours(tap_name("f", target))]
            while todo:
                found.append(name := todo.pop(0))
                todo += graph.nodes[name].children.values() if name in graph.nodes else ()
    return found


def _drop(monitor: Monitor, targets: Sequence[str]) -> None:
    """Jobs, nodes and limits of taps that no device sits on and that hang over holes."""
    jobs = [tap_name("j", target) for target in targets]
    for job in base.jobs(monitor):
        if job["id"] in jobs and job["status"] != "concluded":
            with contextlib.suppress(MonitorError):  # ended meanwhile, which is what we want
                monitor.execute("job-cancel", id=job["id"])
    if not base.wait_jobs_gone(monitor, jobs, 10):
        raise DomainBusy(domain=monitor.domain, reason=f"jobs {', '.join(jobs)} of ours do not end")
    for target in targets:
        for part in _NODES:
            _delete(monitor, tap_name(part, target))
        with contextlib.suppress(MonitorError):
            monitor.execute("object-del", id=tap_name("t", target))


def _delete(monitor: Monitor, node: str) -> None:
    """Also when it is not there; one that is in use stays, and the next cleaning finds it."""
    with contextlib.suppress(MonitorError):
        monitor.execute("blockdev-del", node_name=node)


def state(monitor: Monitor, disks: Sequence[Disk]) -> Mapping[str, TapState]:
    """By target. Two queries and one for each disk; none of them waits for the sink."""
    edges = nodes.edges(monitor)
    jobs = {job["id"]: job["status"] for job in base.jobs(monitor)}
    return {disk.target: _state(monitor, disk, edges, jobs) for disk in disks}


def _state(monitor: Monitor, disk: Disk, edges: Mapping[str, Mapping[str, str]], jobs: Mapping[str, str]) -> TapState:
    f, g, m, j = (tap_name(part, disk.target) for part in "fgmj")
    if not {f, g, m, j} & (edges.keys() | jobs.keys()):
        return TapState.ABSENT
    whole = edges.get(g, {}).get("file") == m and f in edges.get(m, {}).values()
    try:
        running = whole and jobs.get(j) in _READY and seat.root(monitor, disk.device) == g
    except MonitorError:
        running = False
    return TapState.RUNNING if running else TapState.BROKEN
