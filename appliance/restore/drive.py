"""Driving a revert to its end, from wherever its intent and the block graph say that it is.

    the domain runs     hydrate, merge, pivot in its QEMU
    it is shut off      the same chain and the same jobs in a storage daemon; QEMU may have been killed at any instant

Whoever holds the drive lock runs this: the verb that began the revert, the keeper when that verb has died, or
`resume`. Every step is announced in the intent first and may be repeated.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from appliance.capture import protection
from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import DomainBusy, DomainLost, NotRecoverable, RestoreError
from appliance.hypervisor.base import Disk, Domain, DomainState, Monitor, offline_node
from appliance.hypervisor.graph import dataplane
from appliance.hypervisor.graph import revert as graph
from appliance.hypervisor.graph.dataplane import NotDriven
from appliance.hypervisor.graph.revert import Chain, Place, ViewLost
from appliance.restore import branch, fence, keeper, sidecar
from appliance.restore import intent as intents
from appliance.restore.intent import DiskIntent, Intent, Phase
from appliance.restore.patch import all_from_view, patch_info

__all__ = ["Driver", "Progress", "chain_of", "make_overlay", "reconnect_delay"]

Progress = Callable[[int, int, str], None]

# The view may come back slowly on a busy host; the jobs are repeated, the guest's reads wait on their own.
_VIEW_TRIES = 5
# QEMU may die under our hands, its monitor or its images may be in somebody's hands for a moment.
_LOST_TRIES = 20

_log = logging.getLogger(__name__)


def reconnect_delay(settings: Settings) -> int:
    """Seconds for which QEMU lets a read wait for a view that is gone. The keeper brings a view back within
    `view_timeout`; the rest is for a keeper that was killed as well, until somebody resumes. The guest sees an I/O
    error only after that, and the longer it is, the longer a `stop` may hang in QEMU when nobody brings it back."""
    return max(60, int(settings.view_timeout * 12))


def chain_of(home: Home, settings: Settings, intent: Intent, disk: DiskIntent, number: int, *, offline: bool) -> Chain:
    """The disk's part in the graph, in the domain's QEMU or in a storage daemon."""
    folder = home.revert(intent.uuid)
    return Chain(
        target=disk.target,
        node=offline_node(disk.target) if offline else disk.node,
        device="" if offline else disk.device,
        source=disk.source,
        patch=folder / disk.patch,
        overlay=folder / disk.overlay,
        view=keeper.socket_path(home, intent.uuid),
        export=disk.target,
        reconnect=reconnect_delay(settings),
        number=number,
    )


def make_overlay(path: Path, size: int) -> None:
    """A new empty overlay, durable, replacing what was there. Extended L2 lets a small guest write stay small."""
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", os.fspath(path), str(size)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    path.chmod(0o600)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Driver:
    """One revert, driven by one thread that holds the drive lock."""

    def __init__(
        self, home: Home, settings: Settings, domain: Domain, intent: Intent, progress: Progress = lambda *_: None,
        settings_file: Path = DEFAULT_SETTINGS,
    ) -> None:  # fmt: skip
        self._home, self._settings, self._domain = home, settings, domain
        self._settings_file = settings_file
        self.intent = intent
        self._progress = progress

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
                graph.unswitch(monitor, self._chains(offline=False))
                self._go_on(monitor)
        except DomainLost:
            # While its QEMU is there the guest may be stopped, or on our chain: the intent has to stay.
            if keeper.lives(str(intent.extra.get("qemu", ""))):
                raise
        fence.take_down(self._home, intent.uuid)
        note = "the guest's disks had not been switched: the revert was given up"
        self.intent = replace(intent, phase=Phase.DONE, safety_point="", notes=(*intent.notes, note))
        intents.discard(self._home, intent.uuid)
        return self.intent

    def switched(self, monitor: Monitor | None) -> None:
        """The devices are on their chains and the machine is reset (or the domain is shut off): from here on there is
        a revert. Lets the guest go on if it may."""
        self._save(Phase.SWITCHED)
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
        self.intent = intents.save(self._home, replace(self.intent, disks=tuple(disks)))

    def roll_back(self) -> None:
        """Turn round: the safety point becomes the wanted instant, and what the guest wrote since is dropped. Raises
        NotRecoverable when the guest's own blocks are in its disk already. `finish` then ends it."""
        if not self.intent.may_roll_back:
            raise NotRecoverable(
                point=self.intent.safety_point, reason="the guest's new blocks are being written to its disk already",
                hint="let it end with `rewind resume`, then `rewind undo`",
            )  # fmt: skip
        self._save(Phase.ROLLING_BACK, turned=False)

    # --- steps ---

    def _save(self, phase: Phase, **facts: object) -> None:
        extra = {**self.intent.extra, **facts}
        self.intent = intents.save(self._home, self.intent.at(phase, extra=extra))

    def _chains(self, *, offline: bool) -> list[Chain]:
        return [
            chain_of(self._home, self._settings, self.intent, disk, number, offline=offline)
            for number, disk in enumerate(self.intent.disks)
        ]

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
            if self._pinning(monitor, chains):
                self._await_all(monitor, chains)
            else:
                self._hydrate(monitor, chains)
            self._save(Phase.MERGING)
        self._merge(monitor, chains)
        running = bool(monitor.execute("query-status")["running"])
        self._save(Phase.PIVOTING, go_on=running or self.intent.extra.get("go_on", False))
        if running:
            monitor.execute("stop")
        graph.complete(monitor, chains)
        self._save(Phase.PIVOTED)

    def _pinning(self, monitor: Monitor, chains: Sequence[Chain]) -> bool:
        """Whether hydrating would endanger the guest. Merging alone then moves what is pending together with what the
        guest wrote; the only loss is that from its beginning on there is no rolling back."""
        return any(dataplane.pins(monitor, chain.device) for chain in chains)

    def _await_all(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """All that merging at once waits for: until then the revert may still be rolled back."""
        self._need_view()
        if self.intent.instant:
            for chain in chains:
                dataplane.await_driver(monitor, chain.device)

    def _merge(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """Until all disks have caught up; with the view where nothing was hydrated."""

        def merge() -> None:
            graph.wait_ready(monitor, chains, self.intent.rate, self._told("merging"), note=self._note_hold)

        if not graph.reads_view(monitor, chains):
            merge()
            return
        self._with_view(merge)
        self._count()
        self._need_view()  # a `stop` waits for reads that wait for a view

    def _branch(self) -> None:
        """Once, and before the guest goes on: what it writes from now on belongs to another history."""
        if not self.intent.extra.get("branched"):
            branch.forth(self._home, self.intent)
            self._save(self.intent.phase, branched=True)

    def _note_hold(self, stopped: bool) -> None:
        """Whoever finds us dead in such a moment lets the guest go on."""
        self._save(self.intent.phase, go_on=stopped)

    def _still_ours(self, monitor: Monitor, chains: Sequence[Chain]) -> bool:
        """Whether the devices are on our chains; after a pivot that was not yet on record it is put there."""
        places = {graph.place(monitor, chain) for chain in chains}
        if Place.OWN not in places:
            return True
        if self.intent.phase is Phase.PIVOTING and self._same_qemu():
            graph.complete(monitor, chains)
            self._save(Phase.PIVOTED)
            return False
        raise RestoreError(
            reason=f"domain {self.intent.domain!r} was started on half-way disks by somebody else",
            hint=f"stop it (`virsh destroy {self.intent.domain}`), then `rewind resume {self.intent.domain}`",
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
            self.intent = replace(self.intent, pause_seconds=time.time() - since)
        self._save(self.intent.phase, go_on=False, stopped=None)

    def _hydrate(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        self._with_view(lambda: self._hydrate_each(monitor, chains))
        self._count()

    def _with_view(self, work: Callable[[], None]) -> None:
        for tries in range(_VIEW_TRIES):
            self._need_view()
            try:
                work()
                return
            except ViewLost as error:
                _log.warning("%s: %s", self.intent.domain, error)
                reason = str(error.fields["reason"])
                time.sleep(min(0.2 * 2**tries, 2.0))
        wanted = self.intent.safety_point if self.intent.rolling_back else self.intent.point
        hint = f"`rewind resume {self.intent.domain}` tries again"
        if self.intent.may_roll_back:
            hint += "; with --roll-back it gives the revert up"
        raise NotRecoverable(point=wanted, reason=reason, hint=hint)

    def _hydrate_each(self, monitor: Monitor, chains: Sequence[Chain]) -> None:
        """A disk that the guest does not drive yet holds the others up for as long as is waited for it, no longer."""
        waiting: NotDriven | None = None
        for number, chain in enumerate(chains):
            # Somebody may have let a guest go on that a plain revert holds, also while the disk before was at it.
            held = monitor.storage_daemon or not (
                self.intent.instant or bool(monitor.execute("query-status")["running"])
            )
            told = self._told(f"hydrating {chain.target}", number)
            try:
                graph.hydrate(monitor, chain, self._speed(monitor), told, held=held)
            except NotDriven as error:
                waiting = error
        if waiting is not None:
            raise waiting

    def _speed(self, monitor: Monitor) -> int:
        """The limit spares a running guest; when its QEMU has died, all that it waits for is the end of this."""
        return 0 if monitor.storage_daemon and self.intent.was != "shutoff" else self.intent.rate

    def _count(self) -> None:
        """Note what the view has served, while it can still be asked."""
        self.intent = replace(self.intent, moved_bytes=keeper.served(self._home, self.intent.uuid))

    def _need_view(self) -> None:
        keeper.ensure(self._home, self.intent, self._settings, self._settings_file)

    def _told(self, what: str, number: int = 0) -> graph.Progress:
        before = sum(disk.pending_bytes for disk in self.intent.disks[:number])
        total = sum(disk.pending_bytes for disk in self.intent.disks)

        def tell(done: int, of: int) -> None:
            if what == "merging":
                self._progress(done, of, what)
                return
            # QEMU counts the disk's length, most of which it skips; a person wants the bytes that move.
            share = done / of if of else 1.0
            self._progress(before + int(share * self.intent.disks[number].pending_bytes), total, what)

        return tell

    def _end(self) -> None:
        if self._domain.state() is not DomainState.SHUTOFF:
            self._go_on(self._domain.monitor())
        sidecar.put_back(self._home, self.intent)
        self._begin_timeline()
        fence.take_down(self._home, self.intent.uuid)
        self._save(Phase.DONE, ended=time.time())
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
            self._save(Phase.ROLLING_BACK, turned=True)
        self._need_view()
        with keeper.image_lock_released(self._home, self.intent), self._domain.offline(self._disks()) as monitor:
            self.through_daemon(monitor)
        self.closed()

    def through_daemon(self, monitor: Monitor) -> None:
        """All jobs in a storage daemon that has the domain's images open. They are durable when it has ended:
        `closed` has to be called then."""
        chains = self._chains(offline=True)
        for chain in chains:
            graph.add_nodes(monitor, chain)
        self._hydrate(monitor, chains)
        if self.intent.phase in (Phase.SWITCHED, Phase.ROLLING_BACK):
            self._save(Phase.MERGING)
        graph.wait_ready(monitor, chains, 0, self._told("merging"))
        graph.complete(monitor, chains)

    def closed(self) -> None:
        """The storage daemon has ended: only now all of it is on disk."""
        self._save(Phase.PIVOTED)

    def _disks(self) -> list[Disk]:
        return [Disk(one.target, one.source, one.format, one.size) for one in self.intent.disks]

    # --- rolling back ---

    def _turn(self, monitor: Monitor) -> None:
        """From the wanted instant to the safety point in the running QEMU: the same patch, another view, a new O."""
        self._need_view()  # first: a `stop` waits for reads that wait for a view
        chains = self._chains(offline=False)
        status = monitor.execute("query-status")
        self._save(Phase.ROLLING_BACK, go_on=status["running"] or self.intent.extra.get("go_on", False))
        if status["running"]:
            monitor.execute("stop")
        graph.cancel(monitor, chains)
        for chain, disk in zip(chains, self.intent.disks, strict=True):
            graph.enter_hole(monitor, chain, disk.size)
        self._begin_anew()
        for chain in chains:
            graph.add_nodes(monitor, chain)
            graph.leave_hole(monitor, chain, chain.o)
        graph.power_cycle(monitor)
        branch.back(self._home, self.intent)
        self._save(Phase.ROLLING_BACK, turned=True)

    def _begin_anew(self) -> None:
        """Empty overlays, and patches that ask the view for everything: what is zero in the wanted instant need not
        be in the safety point."""
        folder = self._home.revert(self.intent.uuid)
        for disk in self.intent.disks:
            make_overlay(folder / disk.overlay, disk.size)
            all_from_view(folder / disk.patch)
