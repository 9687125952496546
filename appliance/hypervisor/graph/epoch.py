"""The epoch recipe on a block graph: freeze what was written, keep it as it was, push it, take everything out.

    device ─► rw-epN-cbw ─file─► D            guest writes go through; what they overwrite is saved first
                 └─target─► rw-epN-s          scratch, an unlinked local file
              rw-epN-snap ─file─► rw-epN-cbw  reads D as it was at the freeze
              job rw-epN: rw-epN-snap ─► rw-epN-in (our intake)

    before the pause     add_intake, add_scratch, base.make_hole
    in the first pause   freeze (all disks in one transaction), insert
    while guests run     push … until the jobs have ended
    in the second pause  take_out

Nothing here can make a guest's write fail: a full scratch or a slow target breaks the snapshot (`break-snapshot`) and
with it the job. Bitmaps are named by generation (see `capture.protection`): freezing starts a new one, so nothing has
to be cleared, and an epoch that fails only leaves more to take for the next.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.errors import MonitorError
from appliance.hypervisor.base import Disk, Monitor
from appliance.hypervisor.graph import base, seat
from appliance.units import CHUNK, MiB

__all__ = [
    "Source", "add_intake", "add_scratch", "drop", "finish", "forget", "freeze", "give_back", "insert", "node_of",
    "push", "take_allocated", "take_out", "unwatch_holes", "watch_holes",
]  # fmt: skip

# Descriptor sets of libvirt begin at 0; ours are far away.
_FDSET = 7000

# Before QEMU 8 a read of the snapshot that begins with areas which the guest has overwritten, and goes on into others,
# takes the former from the disk as it is now: `hbitmap_status` tells what is at the end of a run for what is at its
# beginning. Seen with 7.2.22 in 1 of 60 points of a guest that writes without pause, and in a trace of its requests; a
# read of a single cluster is of one kind. 10.0 was seen to be right with any length; nothing between was tried.
_RIGHT = 10

# Requests in flight of a push. With an iothread more than one kills QEMU 10.0 when anything stops or resets the guest;
# elsewhere four made a first full a third faster, and whatever drains QEMU waits for four at most.
_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Source:
    """One disk in an epoch. `number` makes its node names; `node` and `storage` as in Disk.

    `take` are the bitmaps (node, name) whose union is pushed; None: the whole disk is. `recording` is the bitmap that
    records from the freeze on, `before` the ones on the top image that stop recording then. `sparse`: what the top
    image does not hold need not be pushed as zeroes: the intake begins with zeroes everywhere.
    """

    disk: Disk
    number: int
    take: tuple[tuple[str, str], ...] | None
    recording: str
    before: tuple[str, ...] = ()
    sparse: bool = False

    @property
    def job(self) -> str:
        return f"{base.EPOCH}{self.number}"


def node_of(source: Source, part: str) -> str:
    """Name of a node or bitmap of ours: `s`, `cbw`, `snap`, `in`, `a`, `todo`, `since`, `f` (the job's own filter)."""
    return f"{source.job}-{part}"


def add_intake(monitor: Monitor, source: Source, path: Path) -> None:
    """Connect QEMU to the intake's export of this disk. Its user must be able to write to the socket.

    By path, although a descriptor would need no right to it: QEMU remembers a descriptor's number, connects again by
    that when the intake has died, and closes what has the number by then, which may be anything of the guest's.
    """
    server = {"type": "unix", "path": os.fspath(path)}
    name = node_of(source, "in")
    monitor.execute("blockdev-add", driver="nbd", node_name=name, server=server, export=source.disk.target)


def add_scratch(monitor: Monitor, source: Source, descriptor: int, limit: int = 0) -> None:
    """Give QEMU the scratch image behind the descriptor; the caller may close it and unlink the file.

    `limit`: bytes of the file that it may use, which must be as long; 0 for all that there is room for.
    """
    with _fdset(monitor, descriptor, _FDSET + source.number) as path:
        file: dict[str, Any] = {"driver": "file", "filename": path, "discard": "unmap"}
        if limit:
            file = {"driver": "raw", "size": limit, "discard": "unmap", "file": file}
        monitor.execute("blockdev-add", driver="qcow2", node_name=node_of(source, "s"), discard="unmap", file=file)


def watch_holes(monitor: Monitor, source: Source) -> None:
    """Begin to record what is written, before somebody looks for holes."""
    name = node_of(source, "since")
    monitor.execute("block-dirty-bitmap-add", node=source.disk.storage, name=name, granularity=CHUNK)


def unwatch_holes(monitor: Monitor, source: Source) -> None:
    """Also when nobody watches."""
    _remove_bitmap(monitor, source.disk.storage, node_of(source, "since"))


def take_allocated(monitor: Monitor, source: Source, image: Path, bitmap: str) -> Source:
    """The source with only that to take which a bitmap in a qcow2 image tells of, or which was written since
    `watch_holes`. The caller may unlink the image."""
    name = node_of(source, "a")
    if monitor.storage_daemon:
        _add_bitmaps(monitor, name, os.fspath(image))
    else:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with _fdset(monitor, descriptor, _FDSET + source.number) as path:
                _add_bitmaps(monitor, name, path)
        finally:
            os.close(descriptor)
    return replace(source, take=((name, bitmap), (source.disk.storage, node_of(source, "since"))), sparse=True)


def _add_bitmaps(monitor: Monitor, name: str, path: str) -> None:
    file = {"driver": "file", "filename": path, "read-only": True}
    monitor.execute("blockdev-add", driver="qcow2", node_name=name, read_only=True, file=file)


@contextlib.contextmanager
def _fdset(monitor: Monitor, descriptor: int, number: int) -> Iterator[str]:
    monitor.execute_with_fd("add-fd", descriptor, fdset_id=number, opaque="rewind")
    try:
        yield f"/dev/fdset/{number}"
    finally:
        # What QEMU has opened from the set stays open; the set itself would keep the file for ever.
        with contextlib.suppress(MonitorError):
            monitor.execute("remove-fd", fdset_id=number)


def freeze(monitor: Monitor, sources: Sequence[Source], *, todo_on_node: bool = False) -> None:
    """One instant over all disks: the recording bitmaps stop, new ones begin, the union to take is made.

    With the guests of all of them paused or absent. All or nothing: after MonitorError no bitmap has changed.
    `todo_on_node` puts the union where a job directly on the disk wants it.
    """
    actions = [action for source in sources for action in _freeze_actions(source, todo_on_node)]
    monitor.execute("transaction", actions=actions)


def _freeze_actions(source: Source, todo_on_node: bool) -> list[dict[str, Any]]:
    storage = source.disk.storage
    new = {"node": storage, "name": source.recording, "persistent": source.disk.persistent, "granularity": CHUNK}
    actions = [_action("add", **new)]
    actions += [_action("disable", node=storage, name=name) for name in source.before]
    if source.take is not None:
        node = source.disk.node if todo_on_node else storage
        todo = node_of(source, "todo")
        actions.append(_action("add", node=node, name=todo, disabled=True, granularity=CHUNK))
        actions.append(_action("merge", node=node, target=todo, bitmaps=_names(source.take)))
    return actions


def _action(verb: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def _names(bitmaps: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"node": node, "name": name} for node, name in bitmaps]


def insert(monitor: Monitor, source: Source, timeout: int) -> None:
    """Put the copy-before-write under the device. In the same pause as `freeze`, once for each disk.

    `timeout` (seconds) bounds how long the scratch may hold a guest's write up before the snapshot is given up.
    """

    def build() -> str:
        name = node_of(source, "cbw")
        options: dict[str, Any] = {}
        if source.take is not None:
            options["bitmap"] = {"node": source.disk.storage, "name": node_of(source, "todo")}
        monitor.execute(
            "blockdev-add",
            driver="copy-before-write",
            node_name=name,
            file=source.disk.node,
            target=node_of(source, "s"),
            discard="unmap",
            on_cbw_error="break-snapshot",
            cbw_timeout=timeout,
            **options,
        )
        monitor.execute("blockdev-add", driver="snapshot-access", node_name=node_of(source, "snap"), file=name)
        return name

    base.swap(monitor, source.disk, build, hole_made=True)


def push(monitor: Monitor, source: Source, *, speed: int = 0, inserted: bool = True) -> None:
    """Start the job that copies to the intake. `speed` is bytes a second, 0 without limit.

    From the snapshot after `insert`; with `inserted` false straight from the disk, whose guest must be paused or
    absent until the job has ended.

    A job takes its filter out of the graph when it ends. If that comes while QEMU waits for requests on behalf of
    somebody else (a reset lets go of an iothread's disks one by one), QEMU 7.2 may abort. So no job ends by itself: on
    an error it stands still (`base.broken_off`) until it is cancelled, and a whole one is pending until `finish`.
    """
    device = node_of(source, "snap") if inserted else source.disk.node
    what: dict[str, Any] = {"sync": "top" if source.sparse else "full"}
    if source.take is not None:
        todo = node_of(source, "todo")
        if inserted:
            monitor.execute("block-dirty-bitmap-add", node=device, name=todo, disabled=True, granularity=CHUNK)
            taken = _names([(source.disk.storage, todo)])
            monitor.execute("block-dirty-bitmap-merge", node=device, target=todo, bitmaps=taken)
        what = {"sync": "bitmap", "bitmap": todo, "bitmap_mode": "never"}
    monitor.execute(
        "blockdev-backup",
        job_id=source.job,
        device=device,
        target=node_of(source, "in"),
        filter_node_name=node_of(source, "f"),
        auto_finalize=False,
        auto_dismiss=False,
        on_source_error="stop",
        on_target_error="stop",
        speed=speed,
        x_perf={"max-workers": 1 if source.disk.iothread else _WORKERS, "max-chunk": _longest(monitor, inserted)},
        **what,
    )


def _longest(monitor: Monitor, inserted: bool) -> int:
    """Bytes that a push may read at once."""
    if inserted and base.nodes.major_version(monitor) < _RIGHT:
        return CHUNK
    return MiB


def finish(monitor: Monitor, names: Sequence[str]) -> None:
    """Let these jobs end, all of which have copied everything and are pending."""
    for name in names:
        monitor.execute("job-finalize", id=name)


def drop(monitor: Monitor, sources: Sequence[Source]) -> None:
    """Dismiss the ended jobs and let go of the intakes, which flushes them. Outside any pause."""
    ended = {job["id"] for job in base.jobs(monitor) if job["status"] == "concluded"}
    for source in sources:
        if source.job in ended:
            monitor.execute("job-dismiss", id=source.job)
        monitor.execute("blockdev-del", node_name=node_of(source, "in"))


def take_out(monitor: Monitor, source: Source, edges: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Put the device back on its own node, which may be another one by now (a snapshot slid under us). In a pause.

    A device that was detached meanwhile has left its nodes with us: they are deleted too. `edges`: read in this pause.
    """
    edges = edges or base.nodes.edges(monitor)
    top = node_of(source, "cbw")
    if top not in edges:
        return  # it was never put in: an error came before
    own = edges[top]["file"]
    where = base.attached(monitor, source.disk.device)

    def remove() -> str:
        for part in ("snap", "cbw", "s"):
            monitor.execute("blockdev-del", node_name=node_of(source, part))
        return own

    if where == top:
        base.swap(monitor, replace(source.disk, node=own), remove, hole_made=True)
        return
    if over := [one for one in edges if one.startswith(seat.TAP) and edges[one].get("file") == top]:
        seat.reopen(monitor, over[0], own)  # a tap whose device is gone: it writes no more, so no hole is needed
    remove()
    if not where:
        for node in (own, *edges.get(own, {}).values()):
            with contextlib.suppress(MonitorError):
                monitor.execute("blockdev-del", node_name=node)


def forget(monitor: Monitor, source: Source, prefix: str) -> None:
    """After the point is safe: remove the union and every bitmap of ours that is older than the recording one.

    Those on images that have become backing files cannot be removed; their old generation makes them harmless.
    """
    graph = base.nodes.read(monitor)
    for node in graph.nodes.values():
        for name in node.bitmaps:
            old = name.startswith(prefix) and _generation(name) < _generation(source.recording)
            mine = node.name in {n.name for n in graph.chain(_current(graph, source))}
            if name == node_of(source, "todo") or (old and mine and not node.read_only):
                _remove_bitmap(monitor, node.name, name)


def _current(graph: base.Graph, source: Source) -> str:
    return graph.below_ours(graph.devices.get(source.disk.device, "")) or source.disk.storage


def give_back(monitor: Monitor, source: Source) -> None:
    """After a failed epoch: one bitmap again instead of the frozen and the recording one, where that is possible.

    Where it is not (a snapshot was made meanwhile, QEMU is gone) both stay, and the next epoch takes their union.
    """
    storage = source.disk.storage
    with contextlib.suppress(MonitorError):
        _remove_bitmap(monitor, storage, node_of(source, "todo"))
        if source.take is None or not source.before:
            _remove_bitmap(monitor, storage, source.recording)
            return
        keep = source.before[-1]
        actions = [
            _action("enable", node=storage, name=keep),
            _action("merge", node=storage, target=keep, bitmaps=[source.recording]),
            _action("remove", node=storage, name=source.recording),
        ]
        monitor.execute("transaction", actions=actions)


def _remove_bitmap(monitor: Monitor, node: str, name: str) -> None:
    with contextlib.suppress(MonitorError):
        monitor.execute("block-dirty-bitmap-remove", node=node, name=name)


def _generation(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else -1
