"""The steps of one point: everything planned, the intake connected, the instant, the push, the end in order.

`epoch` is the way in; this is what its three ways (live, straight under a pause, shut off) share. Longer than other
modules here: the order of the steps, and what each error undoes, can only be seen in one place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.capture import commit, heal, protection, watch
from appliance.capture.choice import choose
from appliance.capture.contents import Contents
from appliance.capture.intake import Intake
from appliance.capture.pauses import Pauses
from appliance.capture.protection import Pending, Protection
from appliance.capture.quiesce import frozen
from appliance.capture.recorded import Recorded
from appliance.capture.scratch import Scratches
from appliance.config import Home, Settings
from appliance.errors import (
    CaptureError,
    DomainBusy,
    DomainLost,
    HypervisorError,
    MonitorError,
    NoSpace,
    NoSuchPoint,
    PushFailed,
    RevertUnderWay,
)
from appliance.hypervisor import hostlock
from appliance.hypervisor.base import Domain, Monitor
from appliance.hypervisor.graph import base, epoch, pulse
from appliance.hypervisor.guard import guarding, paused_mark
from appliance.model import Consistency, Point, PointStats
from appliance.nbdkit import last_words

if TYPE_CHECKING:
    from appliance.capture.commit import Sidecar
    from appliance.store import Repository, RepositorySpec

__all__ = ["Taken", "Work"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """A point that exists, and the record that belongs to it (saved)."""

    point: Point
    record: Protection


class Work:
    """What one point needs, and its steps. Lives for one point."""

    def __init__(
        self, domain: Domain, spec: RepositorySpec, home: Home, settings: Settings, record: Protection,
        repo: Repository, label: str, reason: str, progress: watch.Progress,
    ) -> None:  # fmt: skip
        self.domain = domain
        self.spec = spec
        self.home = home
        self.settings = settings
        self.repo = repo
        self.record = protection.settled(home, record, repo)
        self.label = label
        self.reason = reason
        self.progress = progress
        self.run = home.run(domain.uuid)
        self.run.mkdir(parents=True, exist_ok=True)
        self.run.chmod(0o711)
        self.begun = time.monotonic()
        self.contents = Contents(domain, self.record, repo, self.run)
        self.frozen = False  # whether the bitmaps were exchanged: before that there is nothing to take back
        self.pauses: Pauses | None = None  # of a guest that runs
        self.recorded = Recorded(home, domain)

    def _parent(self, point_id: str) -> Point | None:
        """The point that a revert went to, if it still is there: what changed is counted from it, nothing more."""
        try:
            return self.repo.point(point_id)
        except NoSuchPoint:
            return None

    # The three ways

    def live(self, quiesce: str) -> Taken:
        lock = self.home.domains / f"{self.domain.uuid}.lock"
        monitor = self.domain.monitor()
        host = hostlock.of_domain(self.domain)
        with guarding(self.domain.uri, self.domain.uuid, lock, self.home.log / "guard.log", host) as guard:
            self.guard, self.pauses = guard, Pauses(guard)
            return self._live(monitor, quiesce)

    def _live(self, monitor: Monitor, quiesce: str) -> Taken:
        with (
            self.connected(monitor, live=True) as watched,
            self._telling_resize(watched),
            self._scratches(watched) as scratches,
        ):
            self.guard.await_ready()
            self.contents.skip_holes(watched, self.intake.socket, lambda: self._paused(watched))
            try:
                # In here: thawing can fail when the epoch is in the graph already.
                with frozen(self.domain, quiesce, self.settings.freeze_timeout, self.guard) as level:
                    sidecars, moment = self._freeze_live(watched)
                self.contents.notes += level.notes
                for part in self.contents.pushed():
                    epoch.push(watched, part.source, speed=self.settings.rate_limit)
                self._wait(watched, scratches)
                self._let_go(watched)
                self._take_out(watched)
                beats = pulse.feel(watched, self.contents.disks())
                taken = self._commit(sidecars, moment, level.consistency)
            except BaseException:  # also Ctrl-C: nothing of ours stays below the device
                if self.frozen:
                    self._abandon(watched)
                raise
            self._forget(watched)
            if ill := pulse.revive(watched, self.contents.disks(), beats):
                _log.error("%s: disks %s have stopped to answer the guest", self.domain.name, ", ".join(ill))
        return taken

    def straight(self, watched: watch.Watched, consistency: Consistency) -> Taken:
        """Nobody writes: pushed from the disks themselves, under the caller's pause or without a guest."""
        with self._telling_resize(watched):
            return self._straight(watched, consistency)

    def _straight(self, watched: watch.Watched, consistency: Consistency) -> Taken:
        sidecars, moment = commit.read_sidecars(self.domain), datetime.now(UTC)
        self._freeze(watched, todo_on_node=True)
        self.recorded.mark(watched, self.contents.disks())
        try:
            for part in self.contents.pushed():
                epoch.push(watched, part.source, speed=0, inserted=False)
            self._wait(watched)
            self._let_go(watched)
            taken = self._commit(sidecars, moment, consistency)
        except BaseException:  # also Ctrl-C: the bitmaps must go on from where they were
            self._abandon(watched)
            raise
        self._forget(watched)
        return taken

    def offline(self) -> Taken:
        chosen = choose(self.domain, self.record, self.contents.notes)
        with self.domain.offline(chosen) as monitor, self.connected(monitor) as watched:
            taken = self.straight(watched, self._shut_off())
            # While nobody else can have written to them. Those that closing writes to are not taken for untouched.
            marks = {disk.target: heal.offline_mark(disk) for disk in chosen}
        return self._mark_offline(taken, marks)

    def _shut_off(self) -> Consistency:
        """The file systems of a guest whose memory was saved were not unmounted."""
        if not self.domain.managed_save():
            return Consistency.OFFLINE
        self.contents.notes.append("its disks without its saved memory: as after a power cut")
        return Consistency.CRASH

    def _mark_offline(self, taken: Taken, marks: Mapping[str, str]) -> Taken:
        """What the images look like now is what untouched ones look like."""
        state = {
            **taken.record.state,
            **{target: replace(taken.record.state[target], offline=mark) for target, mark in marks.items()},
        }
        record = replace(taken.record, state=state)
        protection.save(self.home, record)
        return replace(taken, record=record)

    def _pauses(self) -> Pauses:
        assert self.pauses is not None, "only a guest that runs is paused"
        return self.pauses

    def _paused(self, watched: watch.Watched) -> AbstractContextManager[None]:
        return self._pauses().pause(watched, self.contents.disks())

    # Setting up

    @contextmanager
    def connected(self, monitor: Monitor, *, live: bool = False) -> Iterator[watch.Watched]:
        """Leftovers removed, everything planned, the intake running and QEMU connected to it. `live`: the caller skips
        holes itself, as soon as it may pause."""
        untouched = self.contents.untouched() if monitor.storage_daemon else frozenset()
        self._clean(monitor)
        self.contents.plan(monitor, untouched)
        sizes = {part.disk.target: (part.disk.size, self.contents.over(part)) for part in self.contents.parts}
        process = None if monitor.storage_daemon else self.domain.process()
        owner = (process.uid, process.gid) if process else None
        intake = Intake(self.run, self.spec, sizes, owner=owner, log=self.home.log / f"intake-{self.domain.uuid}.log")
        self.intake = intake
        try:
            intake.start()
            with watch.Watched(monitor, intake) as watched:
                watched.targets = {part.source.job: part.disk.target for part in self.contents.parts}
                try:
                    for part in self.contents.pushed():
                        epoch.add_intake(watched, part.source, intake.socket)
                    if not live:
                        self.contents.skip_holes(watched, intake.socket, None)
                    self.recorded.look(watched, self.contents.disks())
                    yield watched
                finally:
                    with suppress(DomainLost):
                        base.remove_nodes(watched, base.EPOCH)
                        for part in self.contents.whole():
                            epoch.unwatch_holes(watched, part.source)
        finally:
            intake.stop()

    def _clean(self, monitor: Monitor) -> None:
        if base.leftovers(monitor, base.REVERT):
            raise RevertUnderWay(
                domain=self.domain.name, point="another point", hint="`rewind resume` in the home that began it ends it"
            )
        # A guest that a dead process of ours paused is not one that its admin paused.
        mark = paused_mark(self.home.domains / f"{self.domain.uuid}.lock")
        base.clean(monitor, prefix=base.EPOCH, resume=mark.exists() and not monitor.storage_daemon)
        mark.unlink(missing_ok=True)

    @contextmanager
    def _scratches(self, watched: watch.Watched) -> Iterator[Scratches]:
        scratches = Scratches(self.run, self.settings.scratch_limit)
        try:
            scratches.add(watched, [part.source for part in self.contents.parts])
            yield scratches
        finally:
            scratches.close()

    # The pauses

    def _freeze_live(self, watched: watch.Watched) -> tuple[list[Sidecar], datetime]:
        with self._paused(watched):
            moment = datetime.now(UTC)
            sidecars = commit.read_sidecars(self.domain)
            self._freeze(watched)
            self.frozen = True
            try:
                self.recorded.mark(watched, self.contents.disks())
                for part in self.contents.parts:
                    epoch.insert(watched, part.source, self.settings.cbw_timeout)
            except BaseException:  # also Ctrl-C: the guest goes on after this pause
                self._undo_insert(watched)
                raise
        return sidecars, moment

    def _freeze(self, watched: watch.Watched, *, todo_on_node: bool = False) -> None:
        """Also makes sure that the plan is still true: a snapshot or a detach in between would make it wrong."""
        for part in self.contents.parts:
            if part.disk.device and base.attached(watched, part.disk.device) != part.disk.node:
                raise DomainBusy(domain=self.domain.name, reason=f"someone works on {part.disk.target}")
        epoch.freeze(watched, [part.source for part in self.contents.parts], todo_on_node=todo_on_node)

    @contextmanager
    def _telling_resize(self, watched: watch.Watched) -> Iterator[None]:
        """QEMU refuses what we planned for a disk of another size in words about nodes. Looked at only then: in the
        pause that would be time for which the guest stands still."""
        try:
            yield
        except MonitorError as error:
            found = base.nodes.read(watched).nodes
            for disk in self.contents.disks():
                if disk.storage in found and found[disk.storage].size != disk.size:
                    reason = f"{disk.target} was resized when the point had just begun"
                    hint = "take it again: the next point has the disk at its new size"
                    raise DomainBusy(domain=self.domain.name, reason=reason, hint=hint) from error
            raise

    def _undo_insert(self, watched: watch.Watched) -> None:
        for part in self.contents.parts:
            with suppress(MonitorError):
                epoch.take_out(watched, part.source)
            epoch.give_back(watched, part.source)

    def _let_go(self, watched: watch.Watched) -> None:
        """Every byte is durable in the repository afterwards, and QEMU has let go of the intake."""
        targets = [part.disk.target for part in self.contents.pushed()]
        try:
            watch.flush(watched, self.intake.socket, targets, self.settings.epoch_timeout)
            epoch.drop(watched, [part.source for part in self.contents.pushed()])
            for target in targets:
                self.intake.counters(target)
        except CaptureError as error:
            # In the intake's own words: an NBD error is a number, and QEMU does not tell even that.
            said = self.intake.tail()
            if "no space left" in said.lower():
                raise self._full() from error
            reason = watched.killed or last_words(said) or error.message
            raise PushFailed(domain=self.domain.name, disk=", ".join(targets), reason=reason) from error

    def _wait(self, watched: watch.Watched, scratches: Scratches | None = None) -> None:
        """For the jobs. QEMU hardly tells why one broke off: it may be the repository, the intake or the scratch."""
        try:
            watch.wait(watched, self.contents.jobs(), self.settings.epoch_timeout, self.progress)
        except PushFailed as error:
            if watched.killed or (error.fields["reason"] != watch.BROKEN and "no space" not in error.message):
                raise
            if "no space left" in (error.message + self.intake.tail()).lower():
                raise self._full() from error
            raise PushFailed(**{**error.fields, "reason": self._why_broken(scratches, error)}) from error

    def _why_broken(self, scratches: Scratches | None, error: PushFailed) -> str:
        if scratches is not None and (full := scratches.why_full()):
            return full
        said = last_words(self.intake.tail())
        if not self.intake.alive():
            return f"the intake has ended: {said}" if said else "the intake has ended"
        if said or scratches is None:
            return said or str(error.fields["reason"])
        return scratches.why_broken()

    def _full(self) -> NoSpace:
        return NoSpace(url=self.repo.url, name="the rest of the epoch")

    def _take_out(self, watched: watch.Watched) -> None:
        with self._paused(watched):
            edges = base.nodes.edges(watched)
            for part in self.contents.parts:
                epoch.take_out(watched, part.source, edges)

    def _abandon(self, watched: watch.Watched) -> None:
        """The epoch failed: nothing of ours stays in the graph, and the bitmaps hold everything.

        A point that was committed all the same (we know no better than that committing failed) is found by `settled`;
        then the bitmap that is given back holds too much, never too little.
        """
        watched.kill("the epoch was given up")
        with suppress(DomainLost):
            base.clean(watched, prefix=base.EPOCH, resume=self.pauses is not None and self.pauses.stopped)
            for part in self.contents.parts:
                epoch.give_back(watched, part.source)

    # The end

    def _commit(self, sidecars: Sequence[Sidecar], moment: datetime, consistency: Consistency) -> Taken:
        parent_id = self.record.parent or self.record.last_point
        parent = self.contents.last if parent_id == self.record.last_point else self._parent(str(parent_id))
        with self.repo.writer() as writer:
            maps = {}
            for part in self.contents.parts:
                changes = self.intake.changes(part.disk.target) if part in self.contents.pushed() else iter(())
                maps[part.disk.target] = self.repo.write_map(self.contents.over(part), part.disk.size, changes, writer)
            small = [commit.store_sidecar(self.repo, writer, one, parent) for one in sidecars]
            writer.flush()
            own = writer.stats
        disks = [
            commit.disk_point(self.repo, part.disk, maps[part.disk.target], parent, part.source.recording)
            for part in self.contents.parts
        ]
        point = Point(
            id=commit.new_id(moment),
            domain=self.domain.name,
            domain_uuid=self.domain.uuid,
            uri=self.domain.uri,
            time=moment,
            timeline=self.record.timeline,
            parent=parent.id if parent is not None else None,
            disks=(*disks, *small),
            consistency=consistency,
            reason=self.reason,
            label=self.label,
            xml=self.domain.definition(),
            stats=self._stats(own.stored_bytes, own.new_chunks),
            notes=tuple(self.contents.notes),
            journal=self.recorded.journal,
            sequence=self.recorded.sequence,
        )
        return Taken(point, self._seal(point))

    def _seal(self, point: Point) -> Protection:
        # Of the point's disks alone: for another one there would be nothing to build upon, and it is told gone once.
        record = replace(self.record, pending=Pending(point.id, self.contents.states))
        protection.save(self.home, record)
        self.repo.commit(point)
        self.recorded.tell(point)
        record = replace(record, last_point=point.id, parent=None, state=self.contents.states, pending=None)
        protection.save(self.home, record)
        self.record = record
        return record

    def _stats(self, stored: int, new_chunks: int) -> PointStats:
        counters = [self.intake.counters(part.disk.target) for part in self.contents.pushed()]
        # The disks share one writer: what it says at the last flush is the sum.
        stored += max((one.get("stored", 0) for one in counters), default=0)
        new_chunks += max((one.get("new_chunks", 0) for one in counters), default=0)
        moved = sum(one.get("moved", 0) for one in counters)
        paused = self.pauses.seconds if self.pauses is not None else 0.0
        return PointStats(moved, stored, new_chunks, paused, time.monotonic() - self.begun)

    def _forget(self, watched: watch.Watched) -> None:
        for part in self.contents.parts:
            try:
                epoch.forget(watched, part.source, self.record.prefix)
            except HypervisorError as error:
                # Older generations are harmless and go with the next epoch.
                _log.warning("%s: old bitmaps of %s stay: %s", self.domain.name, part.disk.target, error)
