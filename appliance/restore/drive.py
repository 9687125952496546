"""Driving a revert to its end, from wherever its intent and the block graph say that it is.

    the domain runs     hydrate, merge, pivot in its QEMU
    it is shut off      the same chain and the same jobs in a storage daemon; QEMU may have been killed at any instant
    rolling back        the devices go to the safety point first, and then the same way

What moves the bytes is retrieval.py; here is which step is next, and when the guest goes on.
Whoever holds the drive lock runs this: the verb that began the revert, the keeper when that verb has died, or
`resume`. Every step is announced in the intent first and may be repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from appliance.capture import protection
from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import DomainBusy, DomainLost, NotRecoverable, RestoreError
from appliance.hypervisor.base import Disk, Domain, DomainState, Monitor
from appliance.hypervisor.graph import retrieval, switching
from appliance.hypervisor.graph.chain import Chain, Place, place
from appliance.restore import branch, fence, keeper, sidecar
from appliance.restore import intent as intents
from appliance.restore.chain import chains_of, make_overlay
from appliance.restore.intent import Course, Intent, Phase
from appliance.restore.patch import all_from_view, patch_info
from appliance.restore.retrieval import Progress, Retrieval

__all__ = ["Driver"]

# QEMU may die under our hands, its monitor or its images may be in somebody's hands for a moment.
_LOST_TRIES = 20

_log = logging.getLogger(__name__)


class Driver:
    """One revert, driven by one thread that holds the drive lock."""

    def __init__(
        self, home: Home, settings: Settings, domain: Domain, intent: Intent, progress: Progress = lambda *_: None,
        settings_file: Path = DEFAULT_SETTINGS,
    ) -> None:  # fmt: skip
        self._home, self._settings, self._domain = home, settings, domain
        self._course = Course(home, intent)
        self._retrieval = Retrieval(home, settings, settings_file, self._course, progress)

    @property
    def intent(self) -> Intent:
        """As it stands now."""
        return self._course.intent

    # --- from the outside ---

    def finish(self) -> Intent:
        """Drive it to its end. Raises NotRecoverable when the wanted instant cannot be read (rolling back is still
        possible), RestoreError when somebody has started the domain on its half-way disk, NotDriven while the guest
        does not come to a disk (the keeper tries again), MonitorError. The intent stays, and `resume` can go on from
        it."""
        lost = 0
        while self.intent.phase is not Phase.DONE:
            try:
                self._step()
            except (DomainLost, DomainBusy) as error:
                # Busy: the storage daemon of a driver that was killed may take a moment to end.
                lost += 1
                if lost > _LOST_TRIES:
                    raise
                _log.warning("%s: %s; going on", self.intent.domain, error)
                time.sleep(0.2)
        return self.intent

    def abandon(self) -> Intent:
        """Take back a revert that had not begun: the guest is on its own disks and goes on as it was."""
        intent = self.intent
        try:
            if self._domain.state() is not DomainState.SHUTOFF:
                monitor = self._domain.monitor()
                switching.unswitch(monitor, self._chains(offline=False))
                self._go_on(monitor)
        except DomainLost:
            # While its QEMU is there the guest may be stopped, or on our chain: the intent has to stay.
            if keeper.lives(str(intent.extra.get("qemu", ""))):
                raise
        fence.take_down(self._home, intent.uuid)
        note = "the guest's disks had not been switched: the revert was given up"
        self._course.intent = replace(intent, phase=Phase.DONE, safety_point="", notes=(*intent.notes, note))
        intents.discard(self._home, intent.uuid)
        return self.intent

    def switched(self, monitor: Monitor | None) -> None:
        """The devices are on their chains and the machine is reset (or the domain is shut off): from here on there is
        a revert. Lets the guest go on if it may."""
        self._course.save(Phase.SWITCHED)
        self._branch()
        if self.intent.instant and monitor is not None:
            self._go_on(monitor)

    def recount(self) -> None:
        """Count what the corrected patches hold; it takes too long for the pause."""
        folder = self._home.revert(self.intent.uuid)
        disks = []
        for disk in self.intent.disks:
            info = patch_info(folder / disk.patch)
            disks.append(
                replace(disk, pending_bytes=info.pending_bytes, zero_bytes=info.zero_bytes, chunks=info.chunks)
            )
        self._course.intent = intents.save(self._home, replace(self.intent, disks=tuple(disks)))

    def roll_back(self) -> None:
        """Turn round: the safety point becomes the wanted instant, and what the guest wrote since is dropped. Raises
        NotRecoverable when the guest's own blocks are in its disk already. `finish` then ends it."""
        if not self.intent.may_roll_back:
            raise NotRecoverable(
                point=self.intent.safety_point, reason="the guest's new blocks are being written to its disk already",
                hint="let it end with `rewind resume`, then `rewind undo`",
            )  # fmt: skip
        self._course.save(Phase.ROLLING_BACK, turned=False)

    # --- steps ---

    def _chains(self, *, offline: bool) -> list[Chain]:
        return chains_of(self._home, self._settings, self.intent, offline=offline)

    def _step(self) -> None:
        phase = self.intent.phase
        if phase is Phase.PIVOTED:
            self._end()
        elif self._domain.state() is DomainState.SHUTOFF:
            self._offline()
        elif phase is Phase.ROLLING_BACK and not self.intent.extra.get("turned"):
            self._turn(self._domain.monitor())
        else:
            self._online(self._domain.monitor())

    def _online(self, monitor: Monitor) -> None:
        chains = self._chains(offline=False)
        if not self._still_ours(monitor, chains):
            return
        self._branch()
        if self.intent.instant:
            self._go_on(monitor)
        if self.intent.phase in (Phase.SWITCHED, Phase.ROLLING_BACK):
            if self._retrieval.pins(monitor, chains):
                self._retrieval.await_drivers(monitor, chains)
            else:
                self._retrieval.hydrate(monitor, chains)
            self._course.save(Phase.MERGING)
        self._retrieval.merge(monitor, chains)
        running = bool(monitor.execute("query-status")["running"])
        if running and not self.intent.instant:
            self._course.note("somebody let the guest go on before the revert had ended: it was paused for less")
        self._course.save(Phase.PIVOTING, go_on=running or self.intent.extra.get("go_on", False))
        if running:
            monitor.execute("stop")
        retrieval.complete(monitor, chains)
        self._course.save(Phase.PIVOTED)

    def _branch(self) -> None:
        """Once, and before the guest goes on: what it writes from now on belongs to another history."""
        if not self.intent.extra.get("branched"):
            branch.forth(self._home, self.intent)
            self._course.save(self.intent.phase, branched=True)

    def _still_ours(self, monitor: Monitor, chains: Sequence[Chain]) -> bool:
        """Whether the devices are on our chains; after a pivot that was not yet on record it is put there."""
        places = {place(monitor, chain) for chain in chains}
        if Place.OWN not in places:
            return True
        if self.intent.phase is Phase.PIVOTING and self._same_qemu():
            retrieval.complete(monitor, chains)
            self._course.save(Phase.PIVOTED)
            return False
        name = quote(self.intent.domain)
        raise RestoreError(
            reason=f"domain {self.intent.domain!r} was started on half-way disks by somebody else",
            hint=f"stop it (`virsh destroy {name}`), then `rewind resume {name}`",
        )

    def _same_qemu(self) -> bool:
        return keeper.process_key(self._domain.process().pid) == self.intent.extra.get("qemu")

    def _go_on(self, monitor: Monitor) -> None:
        """Let the guest run if it is we who hold it, once: whoever pauses it later does so with intent."""
        if not self.intent.extra.get("go_on"):
            return
        if not monitor.execute("query-status")["running"]:
            monitor.execute("cont")
        since = self.intent.extra.get("stopped")
        if since is not None:
            self._course.intent = replace(self.intent, pause_seconds=time.time() - since)
        self._course.save(self.intent.phase, go_on=False, stopped=None)

    def _end(self) -> None:
        if self._domain.state() is not DomainState.SHUTOFF:
            self._go_on(self._domain.monitor())
        sidecar.put_back(self._home, self.intent)
        self._begin_timeline()
        fence.take_down(self._home, self.intent.uuid)
        self._course.save(Phase.DONE, ended=time.time())
        intents.tidy(self._home, self.intent.uuid)

    def _begin_timeline(self) -> None:
        """Points taken from now on belong to the new history; after rolling back they go on with the old one."""
        record = protection.load(self._home, self.intent.uuid)
        if record is None or self.intent.rolling_back or record.timeline == self.intent.timeline:
            return
        parent = self.intent.point if self.intent.whole else self.intent.safety_point
        protection.save(self._home, record.moved_to(self.intent.timeline, parent))

    # --- the domain is shut off ---

    def _offline(self) -> None:
        if keeper.lives(str(self.intent.extra.get("qemu", ""))):
            # A monitor that does not answer is no proof that nobody uses the images.
            raise DomainLost(domain=self.intent.domain, reason="its monitor does not answer, but its QEMU is there")
        if self.intent.phase is Phase.ROLLING_BACK and not self.intent.extra.get("turned"):
            self._begin_anew()
            self._course.save(Phase.ROLLING_BACK, turned=True)
        self._retrieval.need_view()
        with keeper.image_lock_released(self._home, self.intent), self._domain.offline(self._disks()) as monitor:
            self.through_daemon(monitor)
        self.closed()

    def through_daemon(self, monitor: Monitor) -> None:
        """All jobs in a storage daemon that has the domain's images open. They are durable when it has ended:
        `closed` has to be called then."""
        chains = self._chains(offline=True)
        for chain in chains:
            switching.add_nodes(monitor, chain)
        self._retrieval.hydrate(monitor, chains)
        if self.intent.phase in (Phase.SWITCHED, Phase.ROLLING_BACK):
            self._course.save(Phase.MERGING)
        retrieval.wait_ready(monitor, chains, 0, self._retrieval.told("merging"))
        retrieval.complete(monitor, chains)

    def closed(self) -> None:
        """The storage daemon has ended: only now all of it is on disk."""
        self._course.save(Phase.PIVOTED)

    def _disks(self) -> list[Disk]:
        return [Disk(one.target, one.source, one.format, one.size) for one in self.intent.disks]

    # --- rolling back ---

    def _turn(self, monitor: Monitor) -> None:
        """From the wanted instant to the safety point in the running QEMU: the same patch, another view, a new O."""
        self._retrieval.need_view()  # first: a `stop` waits for reads that wait for a view
        chains = self._chains(offline=False)
        status = monitor.execute("query-status")
        self._course.save(Phase.ROLLING_BACK, go_on=status["running"] or self.intent.extra.get("go_on", False))
        if status["running"]:
            monitor.execute("stop")
        retrieval.cancel(monitor, chains)
        for chain, disk in zip(chains, self.intent.disks, strict=True):
            switching.enter_hole(monitor, chain, disk.size)
        self._begin_anew()
        for chain in chains:
            switching.add_nodes(monitor, chain)
            switching.leave_hole(monitor, chain, chain.o)
        switching.power_cycle(monitor)
        branch.back(self._home, self.intent)
        self._course.save(Phase.ROLLING_BACK, turned=True)

    def _begin_anew(self) -> None:
        """Empty overlays, and patches that ask the view for everything: what is zero in the wanted instant need not
        be in the safety point."""
        folder = self._home.revert(self.intent.uuid)
        for disk in self.intent.disks:
            make_overlay(folder / disk.overlay, disk.size)
            all_from_view(folder / disk.patch)
