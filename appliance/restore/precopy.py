"""Before the pause of a revert, as in a live migration: rounds while the guest runs, until little is left for it.

    rounds           ordinary points; the last one is what the patches are made against
    must_be_short    looks again, right before the guest is stopped

What is left is what QEMU's bitmaps name; how long that takes, by what the last large round moved a second.
"""

from __future__ import annotations

from appliance.capture import epoch, heal, protection
from appliance.capture.recorded import BEFORE_REVERT
from appliance.errors import DomainBusy, NoSuchPoint
from appliance.hypervisor.graph import base
from appliance.model import Point
from appliance.restore.site import Site
from appliance.units import MiB, format_size

__all__ = ["Precopy"]

# Epochs before the pause, until what is left for the pause is small: a guest that writes faster than this is told of.
_SHRINKING = 4
# What an increment moves a second where nothing was measured, and how much must have moved for a measurement: a small
# one tells only what it costs to begin.
_RATE = 60 * MiB
_MEASURE = 4 * MiB
# Setting up, switching and resetting, on a slow machine.
_PAUSE = 1.0


class Precopy:
    """Of one domain that runs."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._settings, self._repo, self._domain = site.settings, site.repo, site.domain
        self._rate = 0.0  # bytes a second that the last large epoch moved

    def note(self) -> str:
        """What is told beforehand of the pause."""
        left, budget = self._left(self._site.record()), self._settings.pause_budget
        pause = self._pause(budget if left is None else min(left, budget))
        return (
            f"the guest stands still for about {pause:.0f} s; if it writes so fast that it would be more than"
            f" {self._settings.pause_limit:g} s, nothing is done"
        )

    def rounds(self) -> Point:
        """Ordinary epochs until little is left for the pause; the last point is what the patch is made against. Where
        the last point is young enough none is taken."""
        for round_ in range(_SHRINKING):
            record = self._site.record()
            left = self._left(record)
            if left is not None and left <= self._settings.pause_budget:
                return self._repo.point(str(record.last_point))
            self._site.progress(round_, 0, "taking the present")
            epoch.take(
                self._domain, self._site.spec, self._site.home, self._settings, record, self._repo,
                reason=BEFORE_REVERT, quiesce="never", progress=self._measure,
            )  # fmt: skip
        return self._repo.point(str(self._site.record().last_point))

    def must_be_short(self) -> None:
        """Raises DomainBusy when the guest has written more since than can be taken within `pause_limit`."""
        left = self._left(self._site.record())
        if left is not None and (pause := self._pause(left)) > self._settings.pause_limit:
            raise DomainBusy(
                domain=self._domain.name,
                reason=f"it writes faster than it can be saved: the last {format_size(left)} would stop it for about"
                f" {pause:.0f} s, and `pause_limit` is {self._settings.pause_limit:g} s",
                hint="nothing has changed: try again when the guest writes less, shut it off first, or raise"
                " `pause_limit` in the settings",
            )

    def _measure(self, done: int, _total: int, rate: float, _left: float | None) -> None:
        if done >= _MEASURE:
            self._rate = rate

    def _pause(self, left: int) -> float:
        """Seconds that an increment of so many bytes stops the guest for. What was measured under a rate limit says
        nothing: an increment has none."""
        return _PAUSE + left / (self._rate if self._rate and not self._settings.rate_limit else _RATE)

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
