"""revert, undo, resume: the same domain at another instant of its history, by moving only what differs.

    plan      look only
    revert    safety point ─► patch ─► fence ─► switch ─► retrieval in the background ─► the guest's own disk again
    undo      revert to the safety point of the last revert
    resume    end a revert that was interrupted

While the guest still runs everything is made ready: an ordinary point, the patch against it, the keeper with the view.
In the pause only the last increment is taken (the safety point), the patch is corrected for the chunks in it, and the
devices are switched. The caller holds the domain's lock.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.capture import epoch, heal, protection
from appliance.capture.recorded import BEFORE_REVERT
from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import DomainBusy, NoSpace, NoSuchPoint, NothingToUndo, NotSupported, RevertUnderWay
from appliance.hypervisor.base import Disk, Domain, DomainState, Monitor
from appliance.hypervisor.graph import base, tap
from appliance.hypervisor.graph import revert as graph
from appliance.hypervisor.graph.dataplane import NotDriven
from appliance.model import DiskKind, Point, Timeline
from appliance.restore import fence, keeper, sidecar
from appliance.restore import intent as intents
from appliance.restore.chain import chains_of, make_overlay
from appliance.restore.drive import Driver
from appliance.restore.intent import DiskIntent, Intent, Phase
from appliance.restore.masks import correct_patch, prepare_patch
from appliance.restore.plan import Part, Plan, make_plan, notes, pair
from appliance.restore.resume import go_on
from appliance.restore.retrieval import Progress
from appliance.units import MiB, format_size

if TYPE_CHECKING:
    from appliance.store import Repository, RepositorySpec

__all__ = ["Plan", "Result", "Reverter", "result_of"]

# Epochs before the pause, until what is left for the pause is small: a guest that writes faster than this is told of.
_SHRINKING = 4
# Free space in the home that a revert does not begin without.
_SPACE = 256 * MiB
# What an increment moves a second where nothing was measured, and how much must have moved for a measurement: a small
# one tells only what it costs to begin.
_RATE = 60 * MiB
_MEASURE = 4 * MiB
# Setting up, switching and resetting, on a slow machine.
_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """How a revert ended. `state`: `done`; `pending` (it goes on in the background); `rolled-back`; `given-up` (it had
    not begun). `moved_bytes` were read from the repository for the disks."""

    domain: str
    uuid: str
    verb: str
    point: str
    safety_point: str | None
    timeline: str | None
    mode: str
    state: str
    changed_bytes: int
    moved_bytes: int
    pause_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


def result_of(intent: Intent) -> Result:
    """What is to be told about a revert, ended or not."""
    given_up = not intent.safety_point
    if intent.ended:
        ending = "given-up" if given_up else "rolled-back" if intent.rolling_back else "done"
    else:
        ending = "pending"
    mode = "offline" if intent.was == "shutoff" else "instant" if intent.instant else "plain"
    end = float(intent.extra.get("ended") or time.time())
    return Result(
        domain=intent.domain, uuid=intent.uuid, verb=intent.verb, point=intent.point,
        safety_point=intent.safety_point or None,
        timeline=None if given_up or intent.rolling_back else intent.timeline, mode=mode, state=ending,
        changed_bytes=sum(disk.pending_bytes + disk.zero_bytes for disk in intent.disks),
        moved_bytes=intent.moved_bytes, pause_seconds=intent.pause_seconds, seconds=end - intent.started,
        notes=intent.notes,
    )  # fmt: skip


class Reverter:
    """The verbs for one domain. Used by one thread; the caller holds the domain's lock."""

    def __init__(
        self, home: Home, settings: Settings, spec: RepositorySpec, repo: Repository, domain: Domain,
        settings_file: Path = DEFAULT_SETTINGS, progress: Progress = lambda *_: None,
    ) -> None:  # fmt: skip
        self._home, self._settings, self._spec, self._repo = home, settings, spec, repo
        self._domain = domain
        self._settings_file = settings_file
        self._progress = progress
        self._rate = 0.0  # bytes a second that the last large epoch moved

    @property
    def domain(self) -> Domain:
        """The one that it works on."""
        return self._domain

    # --- verbs ---

    def plan(self, point: Point, disks: Sequence[str] = (), *, instant: bool = False, rate: int = 0) -> Plan:
        """See `plan.make_plan`. Also raises RevertUnderWay, NotProtected, DomainBusy for saved memory."""
        intents.refuse_if_under_way(self._home, self._domain.uuid, self._domain.name)
        self._refuse_saved_memory()
        limit = rate or self._settings.rate_limit
        made = make_plan(self._home, self._repo, self._domain, self._record(), point, disks, instant, limit)
        if made.mode == "offline":
            return made
        return replace(made, notes=(*made.notes, self._pause_note(made)))

    def _pause_note(self, plan: Plan) -> str:
        if plan.mode == "plain":
            return f"the guest stands still until its disks are back, about {plan.expected_seconds or 0:.0f} s"
        left = self._left(self._record())
        pause = self._pause(self._settings.pause_budget if left is None else min(left, self._settings.pause_budget))
        return (
            f"the guest stands still for about {pause:.0f} s; if it writes so fast that it would be more than"
            f" {self._settings.pause_limit:g} s, nothing is done"
        )

    def revert(
        self, point: Point, disks: Sequence[str] = (), *, instant: bool = False, background: bool = False,
        rate: int = 0, verb: str = "revert",
    ) -> Result:  # fmt: skip
        """Take the domain to `point`. With `background` (and `instant`) it returns as soon as the guest runs.

        Raises RevertUnderWay, NotProtected, DomainBusy, FenceError, DiskNotFound, NotSupported, NotRecoverable,
        PushFailed and others before anything was changed: the guest is then as it was. Raised after the switch, the
        guest is on its way and `resume` ends it (the keeper tries as well).
        """
        intents.refuse_if_under_way(self._home, self._domain.uuid, self._domain.name)
        self._refuse_saved_memory()
        parts = pair(self._domain, point, disks)
        self._need_protection(parts)
        self._need_space()
        self._raise_fence()
        if not keeper.wait_gone(self._home, self._domain.uuid):
            raise DomainBusy(domain=self._domain.name, reason="the keeper of the last revert is still ending")
        with intents.drive_lock(self._home, self._domain.uuid) as ours:
            if not ours:
                raise RevertUnderWay(domain=self._domain.name, point="another point")
            # What the revert is made of may not be collected before its view holds on to it.
            with self._repo.session(f"revert of {self._domain.name}"):
                driver = self._begin(point, parts, bool(disks), instant, rate, verb)
            if background and instant and driver.intent.phase is not Phase.PIVOTED:
                return result_of(driver.intent)
            try:
                return result_of(driver.finish())
            except NotDriven as error:
                # Pending: the keeper ends it when the guest comes to its disks.
                found = result_of(driver.intent)
                return replace(found, notes=(*found.notes, error.message))

    def undo(self, *, instant: bool = False, background: bool = False, rate: int = 0) -> Result:
        """Revert to the safety point of the last revert. Raises NothingToUndo, and as `revert`."""
        safety, names = self._undone()
        return self.revert(safety, names, instant=instant, background=background, rate=rate, verb="undo")

    def plan_undo(self, *, instant: bool = False, rate: int = 0) -> Plan:
        """What `undo` would do. Raises NothingToUndo, and as `plan`."""
        safety, names = self._undone()
        return self.plan(safety, names, instant=instant, rate=rate)

    def _undone(self) -> tuple[Point, tuple[str, ...]]:
        """Where the last revert came from, and the disks that it took along (none named: all). Raises NothingToUndo,
        NoSuchPoint when that was forgotten."""
        last = intents.load(self._home, self._domain.uuid)
        if last is None or (last.ended and (last.rolling_back or not last.safety_point)):
            raise NothingToUndo(domain=self._domain.name)
        if not last.ended:
            raise RevertUnderWay(domain=self._domain.name, point=last.point)
        names = () if last.whole else tuple(disk.target for disk in last.disks)
        try:
            return self._repo.point(last.safety_point), names
        except NoSuchPoint:
            name = self._domain.name
            raise NoSuchPoint(
                domain=name, when=last.safety_point,
                hint="it is the present that the last revert kept, and was forgotten: that revert cannot be undone;"
                f" `rewind points {name}` lists the points that a revert can go to",
            ) from None  # fmt: skip

    def resume(self, *, roll_back: bool = False, wait: float = 0.0) -> Result:
        """End the domain's revert. When the keeper is driving it already, its end is waited for (a roll-back waits at
        most `wait` seconds for the wheel). Raises NothingToResume, DomainBusy and what `drive.Driver` raises."""
        uuid = self._domain.uuid
        deadline = time.monotonic() + wait
        first = intents.load(self._home, uuid)
        while True:
            with intents.drive_lock(self._home, uuid) as ours:
                if ours:
                    if roll_back and (now := intents.load(self._home, uuid)) is not None and not now.rolling_back:
                        # Memory of after the switch goes with the disks forward only.
                        self._refuse_saved_memory()
                    self._renew_spec()
                    intent = go_on(
                        self._home, self._settings, uuid, domain=self._domain, roll_back=roll_back,
                        progress=self._progress, settings_file=self._settings_file,
                    )  # fmt: skip
                    return result_of(intent)
            found = intents.load(self._home, uuid)
            if found is None or found.ended:
                # One that was given up has left the place to the revert before it.
                if found is not None and first is not None and found.id == first.id and not roll_back:
                    return result_of(found)
            elif roll_back and time.monotonic() > deadline:
                raise RevertUnderWay(
                    domain=self._domain.name, point=found.point, hint="give --wait, or stop its keeper"
                )
            time.sleep(0.2)

    # --- before ---

    def _record(self) -> protection.Protection:
        return protection.require(self._home, self._domain.uuid, self._domain.name)

    def _renew_spec(self) -> None:
        """The key may have come to us through another descriptor than to whoever began."""
        intent = intents.load(self._home, self._domain.uuid)
        if intent is not None and not intent.ended:
            intents.save(self._home, replace(intent, repository=self._spec.to_json()))

    def _refuse_saved_memory(self) -> None:
        """The next start would go on from it, with caches of file systems that the disks do not hold any more. Raises
        DomainBusy. It cannot be kept with the disks: it belongs to the present."""
        name = self._domain.name
        if self._domain.managed_save():
            raise DomainBusy(
                domain=name, reason="libvirt would go on from its saved memory, which fits only the present disks",
                hint=f"`virsh start {name}` goes on from it now, `virsh managedsave-remove {name}` gives it up",
            )  # fmt: skip

    def _need_protection(self, parts: Sequence[Part]) -> None:
        """Of a disk that is not protected now the safety point would keep nothing. Raises NotSupported."""
        kept = {disk.target for disk in epoch.choose(self._domain, self._record(), [])}
        for part in parts:
            if part.disk.target not in kept:
                raise NotSupported(
                    object=f"disk {part.disk.target} of {self._domain.name}",
                    reason="it is not protected now, so its present state would not be kept",
                    hint=f"leave it out with --disk, or `rewind protect {self._domain.name} --disk` with all of them",
                )

    def _need_space(self) -> None:
        """The overlays lie in the home: without space a guest's write would fail. Raises NoSpace."""
        self._home.path.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._home.path).free < _SPACE:
            raise NoSpace(
                url=str(self._home.path), name="what the guest writes during the revert",
                hint=f"a revert wants {format_size(_SPACE)} free there",
            )  # fmt: skip

    def _raise_fence(self) -> None:
        """Only libvirt's system daemon runs hooks; elsewhere the image lock stands alone."""
        if self._domain.uri.startswith("qemu:///system") or self._domain.uri.startswith("qemu+unix:///system"):
            fence.install(self._home, Path(self._settings.hook_directory))

    def _begin(self, point: Point, parts: Sequence[Part], chosen: bool, instant: bool, rate: int, verb: str) -> Driver:
        """Everything up to the switch. On an error nothing has changed, and the intent of the last revert is back."""
        intents.tidy(self._home, self._domain.uuid)
        intents.set_aside(self._home, self._domain.uuid)
        state = self._domain.state()
        intent = self._first_intent(point, parts, chosen, instant, rate, verb, state)
        try:
            if state is DomainState.SHUTOFF:
                return self._switch_offline(intent, point, parts)
            return self._switch_online(intent, point, parts)
        except BaseException:  # also Ctrl-C: nobody but us knows that nothing has begun
            self._give_up()
            raise

    def _give_up(self) -> None:
        """After an error: take back what had not begun; what had begun belongs to `resume`."""
        intent = intents.load(self._home, self._domain.uuid)
        if intent is not None and intent.phase in (Phase.PLANNED, Phase.FENCED):
            Driver(self._home, self._settings, self._domain, intent).abandon()

    def _first_intent(
        self, point: Point, parts: Sequence[Part], chosen: bool, instant: bool, rate: int, verb: str,
        state: DomainState,
    ) -> Intent:  # fmt: skip
        offline = state is DomainState.SHUTOFF
        process = None if offline else self._domain.process()
        disks = tuple(_disk_intent(part) for part in parts)
        whole = not chosen or len(parts) == len([one for one in point.disks if one.kind is DiskKind.DISK])
        found = [*notes(self._domain, point, parts, chosen)]
        status = fence.status(self._home, Path(self._settings.hook_directory))
        if status.installed and not status.active:
            found.append(status.remedy)
        return Intent(
            id=secrets.token_hex(8), domain=self._domain.name, uuid=self._domain.uuid, uri=self._domain.uri, verb=verb,
            point=point.id, safety_point="", timeline=secrets.token_hex(8), instant=instant and not offline,
            was=state.value, rate=rate or self._settings.rate_limit, started=time.time(),
            repository=self._spec.to_json(), disks=disks, owner=(process.uid, process.gid) if process else None,
            whole=whole, notes=tuple(found), extra={"qemu": keeper.process_key(process.pid) if process else ""},
        )  # fmt: skip

    def _announce(self, intent: Intent) -> Intent:
        """From now on a revert is under way for everybody else."""
        fence.put_up(self._home, intent.uuid)
        intents.save(self._home, intent)
        for disk in intent.disks:
            make_overlay(self._home.revert(intent.uuid) / disk.overlay, disk.size)
        return intent

    # --- the domain runs, or is paused by its admin ---

    def _switch_online(self, intent: Intent, point: Point, parts: Sequence[Part]) -> Driver:
        intent = self._announce(intent)
        before = self._shrink()
        intent = self._patches(intent, before)
        keeper.ensure(self._home, intent, self._settings, self._settings_file)
        increment = epoch.Increment(
            self._domain, self._spec, self._home, self._settings, self._record(), self._repo,
            label=f"kept as {intent.verb} to {point.id} began",
        )  # fmt: skip
        self._progress(0, 0, "the safety point")
        with increment, self._held_shortly(intent, increment.monitor) as (held, pause):
            safety = increment.take()
            final = self._final(held, before, safety)
            if final.extra["place"] is None:
                # Another home's tap would record on as if nothing had happened below it, and be believed.
                tap.take_off(increment.monitor)
            driver = Driver(self._home, self._settings, self._domain, final, self._progress, self._settings_file)
            self._switch(driver, increment.monitor)
            pause.found_running = False  # the driver lets the guest go on, when it may
            driver.switched(increment.monitor)
        driver.recount()
        return driver

    def _shrink(self) -> Point:
        """Ordinary epochs until little is left for the pause; the last point is what the patch is made against. Where
        the last point is young enough none is taken."""
        for round_ in range(_SHRINKING):
            record = self._record()
            left = self._left(record)
            if left is not None and left <= self._settings.pause_budget:
                return self._repo.point(str(record.last_point))
            self._progress(round_, 0, "taking the present")
            epoch.take(
                self._domain, self._spec, self._home, self._settings, record, self._repo,
                reason=BEFORE_REVERT, quiesce="never", progress=self._measure,
            )  # fmt: skip
        return self._repo.point(str(self._record().last_point))

    def _measure(self, done: int, _total: int, rate: float, _left: float | None) -> None:
        if done >= _MEASURE:
            self._rate = rate

    def _pause(self, left: int) -> float:
        """Seconds that an increment of so many bytes stops the guest for. What was measured under a rate limit says
        nothing: an increment has none."""
        return _PAUSE + left / (self._rate if self._rate and not self._settings.rate_limit else _RATE)

    def _must_be_short(self) -> None:
        """Raises DomainBusy when the guest has written more since than can be taken within `pause_limit`."""
        left = self._left(self._record())
        if left is not None and (pause := self._pause(left)) > self._settings.pause_limit:
            raise DomainBusy(
                domain=self._domain.name,
                reason=f"it writes faster than it can be saved: the last {format_size(left)} would stop it for about"
                f" {pause:.0f} s, and `pause_limit` is {self._settings.pause_limit:g} s",
                hint="nothing has changed: try again when the guest writes less, shut it off first, or raise"
                " `pause_limit` in the settings",
            )

    def _left(self, record: protection.Protection) -> int | None:
        """Bytes of the next increment, as the bitmaps of all disks say; None when they are not all good."""
        if record.last_point is None or record.pending is not None:
            return None
        try:
            last = {one.disk: one for one in self._repo.point(record.last_point).disks}
        except NoSuchPoint:
            return None
        found = base.nodes.read(self._domain.monitor())
        left = 0
        for disk in epoch.choose(self._domain, record, []):
            known = disk.target in last and last[disk.target].size <= disk.size
            plan = heal.decide(found, disk, record.prefix, record.state.get(disk.target), known, False)
            if plan.mode is not heal.Mode.INCREMENTAL or not known:
                return None
            left += sum(found.nodes[node].bitmaps[name].dirty for node, name in plan.take)
        return left

    @contextmanager
    def _held_shortly(self, intent: Intent, monitor: Monitor) -> Iterator[tuple[Intent, base.Pause]]:
        """As `_held`; looks first whether it will be short. Patches were made since the last epoch, and that takes a
        while."""
        self._must_be_short()
        with self._held(intent, monitor) as held:
            yield held

    @contextmanager
    def _held(self, intent: Intent, monitor: Monitor) -> Iterator[tuple[Intent, base.Pause]]:
        """The guest stopped, and on record whether it has to go on: a keeper that finds us dead lets it."""
        noted = [intent]

        def note(running: bool) -> None:
            extra = {**intent.extra, "go_on": running, "stopped": time.time()}
            noted[0] = intents.save(self._home, replace(intent, extra=extra))

        with base.paused(monitor, before=note) as pause:
            yield noted[0], pause

    def _switch(self, driver: Driver, monitor: Monitor) -> None:
        chains = chains_of(self._home, self._settings, driver.intent, offline=False)
        graph.switch(monitor, chains)
        try:
            graph.power_cycle(monitor)
        except BaseException:  # also Ctrl-C: the guest must not go on with chains that nobody drives
            graph.unswitch(monitor, chains)
            raise

    # --- the domain is shut off ---

    def _switch_offline(self, intent: Intent, point: Point, parts: Sequence[Part]) -> Driver:
        """Under one write lock from the safety point to the last commit, so that nobody gets in between."""
        intent = self._announce(intent)
        images = [part.disk for part in parts] + self._others(parts)
        with keeper.image_lock_released(self._home, intent), self._domain.offline(images) as monitor:
            # Again: while we hold the images nobody can start it, so from here on none can come.
            self._refuse_saved_memory()
            increment = epoch.Increment(
                self._domain, self._spec, self._home, self._settings, self._record(), self._repo, monitor=monitor,
                label=f"kept as {intent.verb} to {point.id} began",
            )  # fmt: skip
            with increment:
                safety = increment.take()
            intent = self._patches(intent, safety)
            keeper.ensure(self._home, intent, self._settings, self._settings_file)
            intent = sidecar.keep(self._home, self._repo, self._domain, intent, point, safety)
            final = self._final(intent, safety, safety)
            driver = Driver(self._home, self._settings, self._domain, final, self._progress, self._settings_file)
            driver.switched(None)
            driver.through_daemon(monitor)
        driver.closed()
        return driver

    def _others(self, parts: Sequence[Part]) -> list[Disk]:
        """Disks that are not reverted but belong to the safety point."""
        mine = {part.disk.target for part in parts}
        return [disk for disk in epoch.choose(self._domain, self._record(), []) if disk.target not in mine]

    # --- patches ---

    def _patches(self, intent: Intent, present: Point) -> Intent:
        """A patch for each disk against `present`, and what the view should know of it."""
        disks = []
        for disk in intent.disks:
            self._progress(0, 0, f"comparing {disk.target}")
            safety = present.disk(disk.target).map
            info = prepare_patch(self._home, self._repo, intent.uuid, disk, safety)
            disks.append(
                replace(
                    disk, safety=safety, pending_bytes=info.pending_bytes, zero_bytes=info.zero_bytes,
                    chunks=info.chunks,
                )
            )  # fmt: skip
        # Not in the pause: a repository may be far away. When nothing comes of it nobody shows it: timeline/story.py.
        self._repo.put_timeline(
            Timeline(intent.timeline, intent.uuid, datetime.now(UTC), parent=present.timeline, origin=intent.point)
        )
        return intents.save(self._home, replace(intent, disks=tuple(disks)))

    def _final(self, intent: Intent, before: Point, safety: Point) -> Intent:
        """The patches made right for the safety point; durable as FENCED."""
        disks = []
        for disk in intent.disks:
            now = safety.disk(disk.target).map
            if before.id != safety.id:
                correct_patch(self._home, self._repo, intent.uuid, disk, before.disk(disk.target).map, now)
            disks.append(replace(disk, safety=now))
        # Where in the journal the history branches; None while nothing is recorded.
        place = None if safety.sequence is None else [safety.journal, safety.sequence]
        final = intent.at(
            Phase.FENCED, disks=tuple(disks), safety_point=safety.id, extra={**intent.extra, "place": place}
        )
        return intents.save(self._home, final)


def _disk_intent(part: Part) -> DiskIntent:
    disk, target = part.disk, part.disk.target
    return DiskIntent(
        target=target, source=disk.source, format=disk.format, size=disk.size, wanted=part.point.map,
        safety=part.point.map, patch=f"patch-{target}", overlay=f"overlay-{target}", node=disk.node, device=disk.device,
    )  # fmt: skip
