"""The two jobs of a revert, which move its blocks into the guest's own disk; chain.py has the picture.

    hydrate                   P's blocks: what differs, from the view
    wait_ready, complete      O's blocks: what the guest wrote meanwhile, and the device back on D
    cancel                    either, where it is
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence

from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import dataplane
from appliance.hypervisor.graph.chain import Chain, Place, drive, job_of, names, place, top
from appliance.hypervisor.graph.switching import drop, drop_patch, stopped

__all__ = ["Progress", "ViewLost", "cancel", "complete", "hydrate", "merge_ready", "reads_view", "wait_ready"]

# Polling and not events: the libvirt driver sees none of our jobs' events, and one query costs a millisecond.
_POLL = 0.05

Progress = Callable[[int, int], None]


class ViewLost(MonitorError):
    """A job of ours ended with an error: the view could not be read, or the disk not be written. D is half-way, the
    chain stands as it was, and the step can be repeated."""

    template = "job {command} of {domain!r} failed: {reason}"


# --- hydration ------------------------------------------------------------------------------------------------------


def hydrate(
    monitor: Monitor, chain: Chain, speed: int = 0, progress: Progress | None = None, held: bool = True
) -> None:
    """Move P's blocks into D, at most `speed` bytes a second (0: no limit), and take P out of the chain.

    Returns when it is done, at once if it was done before; a job that runs already is followed. `progress` is told
    bytes done and total. `held`: the guest stands still until we let it go on; else see `dataplane` for what is waited
    for. Raises ViewLost, NotDriven, MonitorError, DomainLost.
    """
    if job_of(monitor, chain.hydration) is None:
        _begin(monitor, chain, speed, held)
    _finish(monitor, chain.hydration, progress)
    drop_patch(monitor, chain)


def _begin(monitor: Monitor, chain: Chain, speed: int, held: bool) -> None:
    """Again when the driver let go of the device just then: the job is taken back before it takes it over again."""
    while place(monitor, chain) is Place.SWITCHED:
        if not held:
            dataplane.await_driver(monitor, chain.device)
        monitor.execute(
            "block-commit", job_id=chain.hydration, **top(monitor, chain), top_node=chain.p, base_node=chain.node,
            speed=speed, auto_dismiss=False, backing_file=chain.source,
        )  # fmt: skip
        if held or dataplane.driven(monitor, chain.device):
            return
        cancel(monitor, [chain])
        if job_of(monitor, chain.hydration) is not None:
            return  # it could not be taken back and has to be followed


def _finish(monitor: Monitor, name: str, progress: Progress | None) -> None:
    while (job := job_of(monitor, name)) is not None:
        if progress is not None:
            progress(int(job["current-progress"]), int(job["total-progress"]))
        if job["status"] == "concluded":
            monitor.execute("job-dismiss", id=name)
            if "error" in job:
                raise ViewLost(domain=monitor.domain, command=name, reason=str(job["error"]))
            return
        time.sleep(_POLL)


# --- what the guest wrote meanwhile ---------------------------------------------------------------------------------


def merge_ready(monitor: Monitor, chain: Chain, speed: int = 0) -> bool:
    """Start to move O's blocks into D, once P is hydrated; whether they have caught up with the guest.

    Call it again until it says so; then `complete`. Raises ViewLost, MonitorError, DomainLost.
    """
    job = job_of(monitor, chain.merge)
    if job is None:
        monitor.execute(
            "block-commit", job_id=chain.merge, **top(monitor, chain), top_node=chain.o, base_node=chain.node,
            speed=speed, auto_dismiss=False,
        )  # fmt: skip
        return False
    if job["status"] == "concluded":
        _finish(monitor, chain.merge, None)  # raises what it failed of
    return bool(job["status"] == "ready")


def wait_ready(
    monitor: Monitor, chains: Sequence[Chain], speed: int = 0, progress: Progress | None = None, patience: float = 5.0,
    note: Callable[[bool], None] = lambda _stopped: None,
) -> None:  # fmt: skip
    """Merge all disks until each has caught up. A guest that writes faster than the job copies is held for moments
    after `patience` seconds, at most 100 ms in each second; `note` as in `stopped`. Not while a view is read: a `stop`
    would wait for it, so such a guest ends the merge when it rests."""
    begun = time.monotonic()
    if reads_view(monitor, chains):
        patience = math.inf
    held = False
    while not _all_ready(monitor, chains, speed):
        if progress is not None:
            _tell(monitor, chains, progress)
        impatient = time.monotonic() - begun > patience
        if not impatient:
            time.sleep(_POLL)
            continue
        with stopped(monitor, note):
            deadline = time.monotonic() + 0.1
            while not (held := _all_ready(monitor, chains, speed)):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        if held:
            return
        time.sleep(1.0)


def _all_ready(monitor: Monitor, chains: Sequence[Chain], speed: int) -> bool:
    ready = [merge_ready(monitor, chain, speed) for chain in chains]  # every disk's job is started, not only the first
    return all(ready)


def _tell(monitor: Monitor, chains: Sequence[Chain], progress: Progress) -> None:
    jobs = [job for chain in chains if (job := job_of(monitor, chain.merge)) is not None]
    progress(sum(int(job["current-progress"]) for job in jobs), sum(int(job["total-progress"]) for job in jobs))


def reads_view(monitor: Monitor, chains: Sequence[Chain]) -> bool:
    """Whether any of these disks still needs its view."""
    return bool(names(monitor) & {chain.v for chain in chains})


def complete(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Pivot every device onto D and take O away. The guest must be stopped, so that what is on record about this step
    can be made true before the guest writes to D. Raises ViewLost, MonitorError; may be repeated."""
    for chain in chains:
        job = job_of(monitor, chain.merge)
        if job is not None and job["status"] == "ready":
            monitor.execute("job-complete", id=chain.merge)
    for chain in chains:
        _finish(monitor, chain.merge, None)
        if chain.device and drive(monitor, chain) != chain.node:
            raise DomainBusy(
                domain=monitor.domain, reason=f"disk {chain.target} is not on {chain.node!r} after the merge"
            )
        drop(monitor, chain)


def cancel(monitor: Monitor, chains: Sequence[Chain], timeout: float = 30.0) -> None:
    """End our jobs where they are; the chains stay as they stand. Safe when there are none."""
    deadline = time.monotonic() + timeout
    for chain in chains:
        for name in (chain.hydration, chain.merge):
            while (job := job_of(monitor, name)) is not None and time.monotonic() < deadline:
                with contextlib.suppress(MonitorError):  # it ended by itself meanwhile
                    monitor.execute("job-dismiss" if job["status"] == "concluded" else "job-cancel", id=name)
                time.sleep(_POLL)
