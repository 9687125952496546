"""Going on with a revert that was interrupted, from its intent and the block graph. The caller holds the drive lock."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import DomainNotFound, NothingToResume, RestoreError
from appliance.hypervisor import connect, hostlock, storage_daemon
from appliance.hypervisor.base import Disk, Domain, DomainState, Hypervisor, Monitor
from appliance.hypervisor.graph import base, switching
from appliance.hypervisor.graph.chain import Place, place
from appliance.restore import intent as intents
from appliance.restore.chain import chains_of
from appliance.restore.drive import Driver
from appliance.restore.intent import Intent, Phase
from appliance.restore.retrieval import Progress

__all__ = ["GoneDomain", "go_on"]

# Another home that works on the domain sees at once that a revert is under way, and lets it go.
_PATIENCE = 10.0


def go_on(
    home: Home, settings: Settings, uuid: str, *, domain: Domain | None = None, roll_back: bool = False,
    progress: Progress = lambda *_: None, settings_file: Path = DEFAULT_SETTINGS,
) -> Intent:  # fmt: skip
    """Drive the revert of that domain to its end: forward, or with `roll_back` to its safety point.

    One that had not switched the guest's disks is given up, since nothing had happened; it comes back in phase PLANNED
    or FENCED with a note. Raises NothingToResume, Locked when
    another home works on the domain, and what `Driver` raises.
    """
    intent = intents.load(home, uuid)
    if intent is None or intent.ended:
        raise NothingToResume(domain=uuid if intent is None else intent.domain)
    names = hostlock.names_of(uuid, [disk.source for disk in intent.disks])
    with hostlock.hold(names, intent.domain, home.path, f"resume {intent.domain}", _PATIENCE):
        return _go_on(home, settings, intent, domain, roll_back, progress, settings_file)


def _go_on(
    home: Home, settings: Settings, intent: Intent, domain: Domain | None, roll_back: bool, progress: Progress,
    settings_file: Path,
) -> Intent:  # fmt: skip
    if domain is not None:
        return _drive(
            Driver(home, settings, domain, intent, progress, settings_file), home, settings, domain, roll_back
        )
    hypervisor = connect(intent.uri)
    try:
        found = _find(hypervisor, intent)
        return _drive(Driver(home, settings, found, intent, progress, settings_file), home, settings, found, roll_back)
    finally:
        hypervisor.close()


def _find(hypervisor: Hypervisor, intent: Intent) -> Domain:
    """The domain; or, when the hypervisor does not know it any more (a transient one was destroyed), its images."""
    try:
        return hypervisor.domain(intent.uuid)
    except DomainNotFound:
        return cast(Domain, GoneDomain(intent))


class GoneDomain:
    """A domain of which only the images are left: as good as one that is shut off."""

    def __init__(self, intent: Intent) -> None:
        self.name, self.uuid, self.uri = intent.domain, intent.uuid, intent.uri

    def state(self) -> DomainState:
        return DomainState.SHUTOFF

    def offline(self, disks: Sequence[Disk]) -> AbstractContextManager[Monitor]:
        return storage_daemon.offline(self.name, disks)


def _drive(driver: Driver, home: Home, settings: Settings, domain: Domain, roll_back: bool) -> Intent:
    intent = driver.intent
    if intent.phase in (Phase.PLANNED, Phase.FENCED):
        if not _all_switched(home, settings, domain, intent):
            _clean_epoch(domain, intent)
            return driver.abandon()
        monitor = domain.monitor()
        if monitor.execute("query-status")["running"]:
            raise RestoreError(reason=f"{intent.domain!r} was resumed by somebody in the middle of the switch")
        switching.power_cycle(monitor)
        driver.switched(monitor)
    if roll_back and not driver.intent.rolling_back:
        driver.roll_back()
    return driver.finish()


def _all_switched(home: Home, settings: Settings, domain: Domain, intent: Intent) -> bool:
    """Whether every device had been switched before the interruption: the guest has not run since."""
    if intent.phase is not Phase.FENCED or domain.state() is DomainState.SHUTOFF:
        return False
    monitor = domain.monitor()
    chains = chains_of(home, settings, intent, offline=False)
    return all(place(monitor, chain) is Place.SWITCHED for chain in chains)


def _clean_epoch(domain: Domain, intent: Intent) -> None:
    """The last increment may have been under way."""
    if domain.state() is not DomainState.SHUTOFF:
        base.clean(domain.monitor(), prefix=base.EPOCH)
