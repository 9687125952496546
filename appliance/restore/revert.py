"""revert, undo, resume: the same domain at another instant of its history, by moving only what differs.

    plan      look only
    revert    safety point ─► patch ─► fence ─► switch ─► retrieval in the background ─► the guest's own disk again
    undo      revert to the safety point of the last revert
    resume    end a revert that was interrupted

While the guest still runs everything is made ready: an ordinary point, the patch against it, the keeper with the view.
In the pause only the last increment is taken (the safety point), the patch is corrected for the chunks in it, and the
devices are switched: precopy.py, switching.py. From there drive.py has it. The caller holds the domain's lock.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from appliance.capture import epoch
from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import DomainBusy, NoSpace, NoSuchPoint, NothingToUndo, NotSupported, RevertUnderWay
from appliance.hypervisor.base import Domain, DomainState
from appliance.hypervisor.graph.dataplane import NotDriven
from appliance.model import DiskKind, Point
from appliance.restore import fence, keeper
from appliance.restore import intent as intents
from appliance.restore.drive import Driver
from appliance.restore.intent import DiskIntent, Intent, Phase
from appliance.restore.plan import Part, Plan, make_plan, notes, pair
from appliance.restore.precopy import Precopy
from appliance.restore.result import Result, come_of, result_of
from appliance.restore.resume import go_on
from appliance.restore.retrieval import Progress
from appliance.restore.site import Site
from appliance.restore.switching import Switching
from appliance.units import MiB, format_size

if TYPE_CHECKING:
    from appliance.store import Repository, RepositorySpec

__all__ = ["Plan", "Result", "Reverter", "result_of"]

# Free space in the home that a revert does not begin without.
_SPACE = 256 * MiB


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
        self._site = Site(home, settings, spec, repo, domain, settings_file, progress)
        self._precopy = Precopy(self._site)

    @property
    def domain(self) -> Domain:
        """The one that it works on."""
        return self._domain

    # --- verbs ---

    def plan(self, point: Point, disks: Sequence[str] = (), *, instant: bool = False, rate: int = 0) -> Plan:
        """See `plan.make_plan`. Also raises RevertUnderWay, NotProtected, DomainBusy for saved memory."""
        intents.refuse_if_under_way(self._home, self._domain.uuid, self._domain.name)
        self._site.refuse_saved_memory()
        limit = rate or self._settings.rate_limit
        made = make_plan(self._home, self._repo, self._domain, self._site.record(), point, disks, instant, limit)
        if made.mode == "offline":
            return made
        return replace(made, notes=(*made.notes, self._pause_note(made)))

    def _pause_note(self, plan: Plan) -> str:
        if plan.mode == "plain":
            return f"the guest stands still until its disks are back, about {plan.expected_seconds or 0:.0f} s"
        return self._precopy.note()

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
        self._site.refuse_saved_memory()
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
                f" `rewind points {quote(name)}` lists the points that a revert can go to",
            ) from None  # fmt: skip

    def resume(self, *, roll_back: bool = False, wait: float = 0.0, meant: Intent | None = None) -> Result:
        """End the domain's revert. When the keeper is driving it already, its end is waited for (a roll-back waits at
        most `wait` seconds for the wheel). `meant` is the revert that was found under way, which may have ended since.
        Raises NothingToResume, RevertUnderWay and what `drive.Driver` raises."""
        uuid = self._domain.uuid
        deadline = time.monotonic() + wait
        meant = meant or intents.load(self._home, uuid)
        while True:
            with intents.drive_lock(self._home, uuid) as ours:
                found = intents.load(self._home, uuid)
                if (ended := come_of(meant, found, roll_back)) is not None:
                    return ended
                if ours:
                    return self._go_on(roll_back)
            if found is not None and not found.ended and roll_back and time.monotonic() > deadline:
                raise RevertUnderWay(domain=self._domain.name, point=found.point, hint=self._how_to_stop())
            time.sleep(0.2)

    def _go_on(self, roll_back: bool) -> Result:
        """With the drive lock."""
        now = intents.load(self._home, self._domain.uuid)
        if roll_back and now is not None and not now.rolling_back:
            # Memory of after the switch goes with the disks forward only.
            self._site.refuse_saved_memory()
        self._renew_spec()
        intent = go_on(
            self._home, self._settings, self._domain.uuid, domain=self._domain, roll_back=roll_back,
            progress=self._progress, settings_file=self._settings_file,
        )  # fmt: skip
        return result_of(intent)

    def _how_to_stop(self) -> str:
        """A keeper that ends leaves everything as its intent says, as one that is killed does."""
        key = keeper.state(self._home, self._domain.uuid).get("key", "")
        if not keeper.lives(key):
            return "give --wait: whoever drives it is about to end"
        return f"`kill {key.partition(':')[0]}` stops its keeper, then type this again; or let it end, and undo it"

    # --- before ---

    def _renew_spec(self) -> None:
        """The key may have come to us through another descriptor than to whoever began."""
        intent = intents.load(self._home, self._domain.uuid)
        if intent is not None and not intent.ended:
            intents.save(self._home, replace(intent, repository=self._spec.to_json()))

    def _need_protection(self, parts: Sequence[Part]) -> None:
        """Of a disk that is not protected now the safety point would keep nothing. Raises NotSupported."""
        kept = {disk.target for disk in epoch.choose(self._domain, self._site.record(), [])}
        for part in parts:
            if part.disk.target not in kept:
                raise NotSupported(
                    object=f"disk {part.disk.target} of {self._domain.name}",
                    reason="it is not protected now, so its present state would not be kept",
                    hint=f"leave it out with --disk, or `rewind protect {quote(self._domain.name)} --disk` with all of"
                    " them",
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
            switching = Switching(self._site, self._precopy)
            begin = switching.offline if state is DomainState.SHUTOFF else switching.online
            return begin(intent, point, parts)
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


def _disk_intent(part: Part) -> DiskIntent:
    disk, target = part.disk, part.disk.target
    return DiskIntent(
        target=target, source=disk.source, format=disk.format, size=disk.size, wanted=part.point.map,
        safety=part.point.map, patch=f"patch-{target}", overlay=f"overlay-{target}", node=disk.node, device=disk.device,
    )  # fmt: skip
