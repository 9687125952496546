"""The background retrieval of a revert: what differs moves into the disks, in the domain's QEMU or in a storage daemon.

    hydrate     the patches: exactly the differing blocks, disk by disk, from the keeper's view
    merge       the overlays: what the guest wrote meanwhile, until all disks have caught up

A view that is lost is waited for, and the job repeated. When which of them is due is known by drive.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from appliance.config import Home, Settings
from appliance.errors import NotRecoverable
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import dataplane
from appliance.hypervisor.graph import retrieval as graph
from appliance.hypervisor.graph.chain import Chain
from appliance.hypervisor.graph.dataplane import NotDriven
from appliance.hypervisor.graph.retrieval import ViewLost
from appliance.restore import keeper
from appliance.restore.intent import Course, Intent

__all__ = ["Progress", "Retrieval"]

Progress = Callable[[int, int, str], None]

# The view may come back slowly on a busy host; the jobs are repeated, the guest's reads wait on their own.
_VIEW_TRIES = 5

_log = logging.getLogger(__name__)


class Retrieval:
    """Of one revert, by the thread that drives it."""

    def __init__(self, home: Home, settings: Settings, settings_file: Path, course: Course, progress: Progress) -> None:
        self._home, self._settings, self._settings_file = home, settings, settings_file
        self._course, self._progress = course, progress

    @property
    def _intent(self) -> Intent:
        return self._course.intent

    def pins(self, monitor: Monitor, chains: Sequence[Chain]) -> bool:
        """Whether hydrating would endanger the guest. Merging alone then moves what is pending together with what the
        guest wrote; the only loss is that from its beginning on there is no rolling back."""
        return any(dataplane.pins(monitor, chain.device) for chain in chains)

    def await_drivers(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """All that merging at once waits for: until then the revert may still be rolled back."""
        self.need_view()
        if self._intent.instant:
            for chain in chains:
                dataplane.await_driver(monitor, chain.device)

    def hydrate(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """Until the disks hold all that differs. Raises NotRecoverable when the view does not come back, NotDriven."""
        self._with_view(lambda: self._hydrate_each(monitor, chains))
        self._count()

    def _hydrate_each(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """A disk that the guest does not drive yet holds the others up for as long as is waited for it, no longer."""
        waiting: NotDriven | None = None
        for number, chain in enumerate(chains):
            # Somebody may have let a guest go on that a plain revert holds, also while the disk before was at it.
            held = monitor.storage_daemon or not (
                self._intent.instant or bool(monitor.execute("query-status")["running"])
            )
            told = self.told(f"hydrating {chain.target}", number)
            try:
                graph.hydrate(monitor, chain, self._speed(monitor), told, held=held)
            except NotDriven as error:
                waiting = error
        if waiting is not None:
            raise waiting

    def _speed(self, monitor: Monitor) -> int:
        """The limit spares a running guest; when its QEMU has died, all that it waits for is the end of this."""
        return 0 if monitor.storage_daemon and self._intent.was != "shutoff" else self._intent.rate

    def merge(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """Until all disks have caught up; with the view where nothing was hydrated."""

        def catch_up() -> None:
            graph.wait_ready(monitor, chains, self._intent.rate, self.told("merging"), note=self._note_hold)

        if not graph.reads_view(monitor, chains):
            catch_up()
            return
        self._with_view(catch_up)
        self._count()
        self.need_view()  # a `stop` waits for reads that wait for a view

    def _note_hold(self, stopped: bool) -> None:
        """Whoever finds us dead in such a moment lets the guest go on."""
        self._course.save(self._intent.phase, go_on=stopped)

    def need_view(self) -> None:
        """Return when it can be read. Raises NotRecoverable."""
        key = keeper.state(self._home, self._intent.uuid).get("key", "")
        if key and not keeper.lives(key):
            self._course.note("the process that kept the view has died: what it had moved is not counted")
        keeper.ensure(self._home, self._intent, self._settings, self._settings_file)

    def _with_view(self, work: Callable[[], None]) -> None:
        for tries in range(_VIEW_TRIES):
            self.need_view()
            try:
                work()
                return
            except ViewLost as error:
                _log.warning("%s: %s", self._intent.domain, error)
                reason = str(error.fields["reason"])
                time.sleep(min(0.2 * 2**tries, 2.0))
        wanted = self._intent.safety_point if self._intent.rolling_back else self._intent.point
        hint = f"`rewind resume {quote(self._intent.domain)}` tries again"
        if self._intent.may_roll_back:
            hint += "; with --roll-back it gives the revert up"
        raise NotRecoverable(point=wanted, reason=reason, hint=hint)

    def _count(self) -> None:
        """Note what the view has served, while it can still be asked."""
        self._course.intent = replace(self._intent, moved_bytes=keeper.served(self._home, self._intent.uuid))

    def told(self, what: str, number: int = 0) -> graph.Progress:
        """How far a job is, as the caller's own progress; `number` is the disk's that is hydrated."""
        before = sum(disk.pending_bytes for disk in self._intent.disks[:number])
        total = sum(disk.pending_bytes for disk in self._intent.disks)

        def tell(done: int, of: int) -> None:
            if what == "merging":
                self._progress(done, of, what)
                return
            # QEMU counts the disk's length, most of which it skips; a person wants the bytes that move.
            share = done / of if of else 1.0
            self._progress(before + int(share * self._intent.disks[number].pending_bytes), total, what)

        return tell
