"""The tap while it is in a running domain: it is seen, once a second, that writes are recorded, and only what was seen
is confirmed in the ledger.

    look       the journal answers and has refused nothing, every mirror runs, the domain and its disks are the same
    confirm    a place in the journal at which every write that had ended by the look is durable
    arrived    the same for the last look, between two of them: what it saw has become durable meanwhile

Used by the tap process's main thread alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.capture import epoch, tap
from appliance.capture.latency import Latency
from appliance.errors import DomainNotFound, JournalError, RewindError
from appliance.hypervisor.base import Disk, Domain, DomainState
from appliance.hypervisor.graph import tap as graph
from appliance.hypervisor.graph.tap import TapState
from appliance.process import process_key
from appliance.service.underway import under_way

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.capture.tap import Recorder
    from appliance.journal import State
    from appliance.service.session import Session
    from appliance.timeline.ledger import Ledger

__all__ = ["Attached", "Lost", "chosen", "find_domain", "reverting"]

# A point that was just taken counts when its span is confirmed once more.
_COUNTED = 10.0
# Whether the disks are still the same is asked less often: it is the most work, for libvirt as well.
_DISKS = 5.0


class Lost(Exception):
    """Writes are not recorded any more; its text is the reason."""


class Attached:
    """From the pause in which the tap was put in to the end of that span. `qemu` is the process key of the domain's
    QEMU."""

    def __init__(
        self, session: Session, ledger: Ledger, recorder: Recorder, disks: Sequence[Disk], qemu: str
    ) -> None:  # fmt: skip
        self._session, self._ledger, self._qemu = session, ledger, qemu
        self.recorder, self.disks = recorder, tuple(disks)
        self.since = self._looked = time.monotonic()
        self.latency = Latency(None)
        self._based = False  # whether there is a point of this span to count from
        self._taken: tuple[str, float] | None = None  # one that may be it, and when it was taken
        self._seen: tuple[int, datetime] | None = None  # the last number given out, at the look before

    def held(self) -> float:
        """Seconds since it was attached."""
        return time.monotonic() - self.since

    def taken(self, point: str) -> None:
        """There is a point that should be one to count from. From any thread."""
        self._taken = (point, time.monotonic())

    def rebase(self) -> None:
        """There has to be a new point to count from. From any thread."""
        self._based, self._taken = False, None

    def based(self) -> bool:
        """Whether the ledger counts from a point of this span, or may be about to: what it says decides, not that a
        point was taken."""
        taken = self._taken
        if self._based or taken is None:
            return self._based
        if any(base.point == taken[0] for base in self._ledger.spans()[-1].bases):
            # Not when a new one was asked for while the ledger was read.
            self._based = self._taken is taken
            return self._based
        return time.monotonic() - taken[1] <= _COUNTED

    def look(self, record: Protection) -> None:
        """See that it records, and only then say so. Raises Lost."""
        seen = datetime.now(UTC)
        try:
            if not self.recorder.alive():
                raise Lost(self.recorder.why())
            status = self.recorder.control().status()
        except JournalError:
            # The watchdog is at it as well; what is to be told is its verdict.
            if self.recorder.alive():
                return
            raise Lost(self.recorder.why()) from None
        busy = self._session.busy(record.uuid)
        if busy and record.uri.startswith("qmp:"):
            return
        if status.state != "ok":
            # It has refused a write; QEMU's job for that disk says that it runs for another moment.
            raise Lost(status.reason or f"the journal is {status.state}")
        domain = self._see_jobs(record)
        self._confirm(status, seen)
        self.latency.measure(self.recorder.control().stats())
        if not busy and time.monotonic() - self._looked > _DISKS and not reverting(self._session, record):
            self._looked = time.monotonic()
            if changed := _changed(self.disks, chosen(domain, record)):
                raise Lost(changed)
            if not tap.ours(domain.monitor(), self.recorder.socket.parent, self.disks):
                raise Lost("another home has put its own tap in")

    def _see_jobs(self, record: Protection) -> Domain:
        domain = find_domain(self._session, record)
        if domain is None or domain.state() is DomainState.SHUTOFF:
            raise Lost("the domain was shut off")
        if process_key(domain.process().pid) != self._qemu:
            raise Lost("the domain was started anew")
        if wrong := self.ended(domain):
            raise Lost(self._why_lost(domain, wrong))
        return domain

    def ended(self, domain: Domain) -> list[str]:
        """The disks whose mirror does not run any more."""
        states = graph.state(domain.monitor(), self.disks)
        return [target for target, state in states.items() if state is not TapState.RUNNING]

    def _why_lost(self, domain: Domain, wrong: Sequence[str]) -> str:
        if not self.recorder.alive():
            return self.recorder.why()
        there = {disk.target for disk in domain.disks()}
        if gone := [target for target in wrong if target not in there]:
            return f"{', '.join(gone)} was detached"
        with contextlib.suppress(JournalError):
            status = self.recorder.control().status()
            if status.state != "ok":
                return status.reason or f"the journal is {status.state}"
        return f"the mirror of {', '.join(wrong)} has ended"

    # --- what is confirmed ---

    def _confirm(self, status: State, seen: datetime) -> None:
        """A place at which every write that had ended by then is durable: now when nothing is on its way to the disk,
        else that of the look before as soon as all of it has arrived."""
        place, self._seen = self._seen, (status.last, seen)
        if status.durable >= status.last:
            place = self._seen
        if place is not None and status.durable >= place[0]:
            self._claim(place)

    def arrived(self) -> None:
        """Confirm what the last look saw, if it is durable by now: the mirrors were seen after it was given out."""
        place = self._seen
        if place is None:
            return
        # Whatever is wrong is for the next look to tell.
        with contextlib.suppress(RewindError):
            if self.recorder.control().status().durable >= place[0]:
                self._claim(place)

    def _claim(self, place: tuple[int, datetime]) -> None:
        journal = self.recorder.journal
        try:
            self._ledger.confirmed(journal, *place)
        except JournalError:
            # A revert of some disks alone: what follows counts from the next point. The status may be of before it.
            self._ledger.began(journal, self.recorder.control().status().written, datetime.now(UTC))
            self.rebase()
            self._seen = None


def find_domain(session: Session, record: Protection) -> Domain | None:
    """None when the hypervisor does not know it (any more)."""
    try:
        return session.hypervisor(record.uri).domain(record.uuid)
    except DomainNotFound:
        return None


def reverting(session: Session, record: Protection) -> bool:
    """Whether a revert of the domain is under way."""
    return any(one.uuid == record.uuid for one in under_way(session))


def chosen(domain: Domain, record: Protection) -> list[Disk]:
    """The disks that are to be recorded, as they are now."""
    return list(epoch.choose(domain, record, []))


def _changed(before: Sequence[Disk], now: Sequence[Disk]) -> str:
    """What is different in the disks, in words; empty when nothing is."""
    old, new = {disk.target: disk for disk in before}, {disk.target: disk for disk in now}
    if added := new.keys() - old.keys():
        return f"{', '.join(sorted(added))} was attached"
    if gone := old.keys() - new.keys():
        return f"{', '.join(sorted(gone))} was detached"
    resized = [target for target in old if old[target].size != new[target].size]
    return f"{', '.join(sorted(resized))} was resized" if resized else ""
