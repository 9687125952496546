"""What a point is made of: which disks, what is sent of each and why, and over which map it is written.

Planned once the graph is clean; `skip_holes` then takes out of what would be read whole the areas that nobody has ever
allocated. Lives for one point; used by one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from appliance import nbd
from appliance.capture import allocation, heal
from appliance.capture.choice import Part, choose, resized, source_of
from appliance.capture.heal import Mode
from appliance.errors import MonitorError, NoSuchPoint, ToolFailed
from appliance.hypervisor.base import Disk, Domain, Monitor, offline_node
from appliance.hypervisor.graph import base, epoch
from appliance.model import MapRef, Point

if TYPE_CHECKING:
    from appliance.capture.protection import DiskState, Protection
    from appliance.capture.watch import Watched
    from appliance.store import Repository

__all__ = ["Contents"]

_log = logging.getLogger(__name__)


class Contents:
    """`parts` are the disks of the point, `states` what the record is to say of each, `notes` what a reader of the
    point should know of it. `last` is the point that it builds upon."""

    def __init__(self, domain: Domain, record: Protection, repo: Repository, run: Path) -> None:
        self._domain, self._record, self._run = domain, record, run
        self.notes: list[str] = []
        self.parts: list[Part] = []
        self.states: dict[str, DiskState] = {}
        self.last = self._last_point(repo)

    def _last_point(self, repo: Repository) -> Point | None:
        if self._record.last_point is None:
            return None
        try:
            return repo.point(self._record.last_point)
        except NoSuchPoint:
            self.notes.append("the last point was deleted: compared with nothing")
            return None

    def untouched(self) -> frozenset[str]:
        """Disks whose images are as the last point, taken of a domain that was shut off, left them. To be asked before
        anything opens them."""
        return frozenset(
            disk.target
            for disk in self._domain.disks()
            if (state := self._record.state.get(disk.target)) and state.offline
            and state.offline == heal.offline_mark(disk)
        )  # fmt: skip

    def plan(self, monitor: Monitor, untouched: frozenset[str]) -> None:
        """Fill `parts` and `states`. Raises DiskNotFound, NotSupported, and what the monitor raises."""
        disks = choose(self._domain, self._record, self.notes)
        if monitor.storage_daemon:
            disks = [replace(d, node=offline_node(d.target), storage=offline_node(d.target)) for d in disks]
        graph = base.nodes.read(monitor)
        self.states = {}
        for number, disk in enumerate(disks):
            state = self._record.state.get(disk.target)
            known = self._known(disk)
            plan = heal.decide(graph, disk, self._record.prefix, state, known, disk.target in untouched)
            if self.last is not None and known and (reason := resized(disk, self.last.disk(disk.target).size)):
                plan = replace(plan, mode=Mode.COMPARE, take=(), reason=f"{disk.target}: {reason}")
            if plan.reason:
                self.notes.append(f"{plan.mode.value} of {plan.reason}")
            self.states[disk.target] = heal.state_of(graph, disk, plan.generation)
            self.parts.append(Part(disk, plan, source_of(graph, self._record.prefix, disk, plan, number)))

    def _known(self, disk: Disk) -> bool:
        return self.last is not None and any(one.disk == disk.target for one in self.last.disks)

    def over(self, part: Part) -> MapRef | None:
        """The map that the part's own is written over. None for a full: what it leaves out because it is not allocated
        must not come from anywhere else."""
        if self.last is None or not self._known(part.disk) or part.plan.mode is Mode.FULL:
            return None
        return self.last.disk(part.disk.target).map

    def pushed(self) -> list[Part]:
        return [part for part in self.parts if part.plan.mode is not Mode.UNCHANGED]

    def whole(self) -> list[Part]:
        return [part for part in self.parts if part.plan.mode in (Mode.FULL, Mode.COMPARE)]

    def disks(self) -> list[Disk]:
        return [part.disk for part in self.parts]

    def jobs(self) -> list[str]:
        return [part.source.job for part in self.pushed()]

    # Holes

    def skip_holes(
        self, watched: Watched, socket: Path, pause: Callable[[], AbstractContextManager[None]] | None
    ) -> None:  # fmt: skip
        """Of disks that would be read whole: what is not allocated is zero, which nobody has to send.
        `pause` stands the guest still; None where there is no guest that runs."""
        whole = self.whole()
        if not whole:
            return
        with suppress(MonitorError):
            for part in whole:
                epoch.watch_holes(watched, part.source)
            if pause is not None:
                with pause():
                    pass  # stopping a guest makes QEMU write the metadata of its images
            graph = base.nodes.read(watched)
            images = pause is not None or watched.storage_daemon
            self.parts = [self._without_holes(watched, graph, p, images) if p in whole else p for p in self.parts]
        for part in self.pushed():
            if part.source.sparse and self.over(part) is not None:
                with nbd.connect(socket, part.disk.target, ()) as connection:
                    connection.zero(part.disk.size, 0)

    def _without_holes(self, watched: Watched, graph: base.Graph, part: Part, images: bool) -> Part:
        image = self._run / f"allocated-{part.source.number}.qcow2"
        try:
            runs = self._allocated(graph, part.disk, images)
            if runs is None:
                return part
            allocation.write_bitmap(image, part.disk.size, runs)
            return replace(part, source=epoch.take_allocated(watched, part.source, image, allocation.BITMAP))
        except (OSError, ValueError, MonitorError, ToolFailed) as error:
            _log.info("%s: the holes of %s are pushed as zeroes: %s", self._domain.name, part.disk.target, error)
            return part
        finally:
            image.unlink(missing_ok=True)

    def _allocated(self, graph: base.Graph, disk: Disk, images: bool) -> Iterator[tuple[int, int]] | None:
        """None when nobody can tell: of a block device, or of a chain that its headers do not name."""
        if file := allocation.raw_file(graph, disk):
            return allocation.allocated(file)
        if images and (file := allocation.image_file(graph, disk)):
            return allocation.allocated_in_image(file, disk.size)
        return None
