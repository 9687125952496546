"""One recovery point by dirty bitmaps: of a running domain, of a paused one, of one that is shut off.

    take(...)                        a point of a domain in whatever state it is
    with Increment(...) as inc:      for a revert: everything is set up while the guest runs …
        with paused(inc.monitor):        … the caller pauses …
            point = inc.take()           … and what is dirty goes to the intake inside the pause; committed on return

`Increment.take` freezes the bitmaps, pushes their union straight from the disks and commits the point; the caller's
pause lasts as long as that takes, so the caller shrinks it first by an ordinary `take`. When it has returned, the new
bitmaps record from exactly the point's instant on, the devices sit on their own nodes, and `inc.record` is saved. When
it raises, no point exists, the bitmaps hold everything, and the caller's pause is still the caller's to end.

The order at the end of every way: map, point, record, and only then is the frozen bitmap removed. Died in between, the
next epoch takes a union that is too large, never too small. Nobody else may work on the domain meanwhile: the caller
holds its lock.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from appliance.capture import watch
from appliance.capture.choice import choose
from appliance.capture.protection import Protection
from appliance.capture.work import Taken, Work
from appliance.config import Home, Settings
from appliance.hypervisor.base import Domain, DomainState, Monitor
from appliance.model import Consistency, Point

if TYPE_CHECKING:
    from appliance.store import Repository, RepositorySpec

__all__ = ["Increment", "Taken", "choose", "take"]


def take(
    domain: Domain,
    spec: RepositorySpec,
    home: Home,
    settings: Settings,
    record: Protection,
    repo: Repository,
    *,
    label: str = "",
    reason: str = "manual",
    quiesce: str | None = None,
    progress: watch.Progress = watch.silent,
) -> Taken:
    """Take a recovery point. The guest's pause is 10-40 ms; what it writes during the push is copied before.

    Raises PushFailed when the changes did not reach the repository (they are kept for the next point, the guest saw
    nothing), AgentUnavailable for quiesce `require`, DomainBusy, NotSupported, RevertUnderWay, and what the store
    raises. After any of them nothing of ours is in the block graph, but for LeftPaused and DomainLost.
    """
    # From before the last point is read: what is built on it may not be collected meanwhile, deleted or not.
    with repo.session(f"point of {domain.name}"):
        work = Work(domain, spec, home, settings, record, repo, label, reason, progress)
        if domain.state() is DomainState.SHUTOFF:
            return work.offline()
        return work.live(quiesce or record.quiesce)


class Increment:
    """The last increment before a revert; see the head of this module. Not thread-safe, used once."""

    def __init__(
        self, domain: Domain, spec: RepositorySpec, home: Home, settings: Settings, record: Protection,
        repo: Repository, *, label: str = "", reason: str = "safety", monitor: Monitor | None = None,
    ) -> None:  # fmt: skip
        """`monitor`: of the storage daemon that the caller holds for a domain that is shut off (with its disks under
        `offline_node(target)`); else the running domain's."""
        self._work = Work(domain, spec, home, settings, record, repo, label, reason, watch.silent)
        self._given = monitor
        self._stack = ExitStack()
        self.record = record

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.monitor = self._given or self._work.domain.monitor()
            self._watched = stack.enter_context(self._work.connected(self.monitor))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self) -> Point:
        """Inside the caller's pause. Raises as `take` of the module, with the guest still paused."""
        taken = self._work.straight(self._watched, Consistency.CRASH)
        self.record = taken.record
        return taken.point
