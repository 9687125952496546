"""From a revert's intent to its switch: the present is kept as the safety point, and the devices go on their chains.

    online      points while the guest runs (precopy.py), patches against the last ─► the pause: what is left since,
                the patches made right for it, the switch
    offline     the safety point, the patches and all that follows through one storage daemon

Whatever fails before the switch leaves the guest as it was; what was made for it is taken back by `Driver.abandon`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from appliance.capture import epoch
from appliance.hypervisor.base import Disk, Monitor
from appliance.hypervisor.graph import base, tap
from appliance.hypervisor.graph import switching as graph
from appliance.model import Point, Timeline
from appliance.restore import fence, keeper, neighbours, sidecar
from appliance.restore import intent as intents
from appliance.restore.chain import chains_of, make_overlay
from appliance.restore.drive import Driver
from appliance.restore.intent import Intent, Phase
from appliance.restore.masks import correct_patch, prepare_patch
from appliance.restore.plan import Part
from appliance.restore.precopy import Precopy
from appliance.restore.site import Site

__all__ = ["Switching"]


class Switching:
    """Of one domain, by the thread that reverts it."""

    def __init__(self, site: Site, precopy: Precopy) -> None:
        self._site, self._precopy = site, precopy
        self._home, self._settings, self._spec, self._repo = site.home, site.settings, site.spec, site.repo
        self._domain, self._settings_file, self._progress = site.domain, site.settings_file, site.progress

    # --- the domain runs, or is paused by its admin ---

    def online(self, intent: Intent, point: Point, parts: Sequence[Part]) -> Driver:
        """In one pause, from the last increment to the switch, once it will be short."""
        intent = self._announce(intent)
        before = self._precopy.rounds()
        intent = self._patches(intent, before)
        keeper.ensure(self._home, intent, self._settings, self._settings_file)
        increment = epoch.Increment(
            self._domain, self._spec, self._home, self._settings, self._site.record(), self._repo,
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

    @contextmanager
    def _held_shortly(self, intent: Intent, monitor: Monitor) -> Iterator[tuple[Intent, base.Pause]]:
        """As `_held`; looks first whether it will be short. Patches were made since the last epoch, and that takes a
        while."""
        self._precopy.must_be_short()
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

    def offline(self, intent: Intent, point: Point, parts: Sequence[Part]) -> Driver:
        """Under one write lock from the safety point to the last commit, so that nobody gets in between."""
        intent = self._announce(intent)
        images = [part.disk for part in parts] + self._others(parts)
        with keeper.image_lock_released(self._home, intent), self._domain.offline(images) as monitor:
            # Again: while we hold the images nobody can start it, so from here on none can come.
            self._site.refuse_saved_memory()
            increment = epoch.Increment(
                self._domain, self._spec, self._home, self._settings, self._site.record(), self._repo, monitor=monitor,
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
        return [disk for disk in epoch.choose(self._domain, self._site.record(), []) if disk.target not in mine]

    # --- both ---

    def _announce(self, intent: Intent) -> Intent:
        """From now on a revert is under way for everybody else."""
        neighbours.announce(self._home)
        # Before the fence: one of which no intent knows would stand for ever, with nothing for `resume` to end.
        intents.save(self._home, intent)
        fence.put_up(self._home, intent.uuid)
        for disk in intent.disks:
            make_overlay(self._home.revert(intent.uuid) / disk.overlay, disk.size)
        return intent

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
