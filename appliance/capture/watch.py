"""Waiting for the push of an epoch, and the hand that kills an intake which holds the guest up.

QEMU waits for requests in flight before anything that drains: a reset, a suspend, our own pause. An intake that hangs
would hold its main loop, and with it the guest, for as long as it hangs. So every command is timed by a thread beside,
and a late answer costs the intake its life, never the guest its time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance import nbd
from appliance.capture.intake import Intake
from appliance.errors import PushFailed
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import base, epoch

__all__ = ["BROKEN", "Progress", "Watched", "flush", "silent", "wait"]

# done bytes, total bytes, bytes a second, seconds left (None while unknown)
Progress = Callable[[int, int, float, float | None], None]

# A stopped intake is killed when an answer is this late; one that merely works is given a little longer.
_LATE_STOPPED = 0.15
_LATE = 1.5
_BEAT = 0.05
_OVERSLEPT = 0.5
# Stopped, or without any progress, for so long though nobody waits for it.
_STOPPED = 1.0
_STUCK = 120.0
# Paused at every look: QEMU answers only when it waits for nothing itself.
_STANDING = 2.0
# The reason of a PushFailed when a job could not read or write: QEMU does not tell more.
BROKEN = "I/O error"


def silent(done: int, total: int, rate: float, left: float | None) -> None:
    """Tells nobody."""


class Watched:
    """A Monitor that kills the intake when QEMU's answer is late. Enter it around everything that talks to QEMU while
    the intake is connected; `killed` tells why it did so, or is empty."""

    def __init__(self, monitor: Monitor, intake: Intake) -> None:
        self.domain = monitor.domain
        self.storage_daemon = monitor.storage_daemon
        self.killed = ""
        self.targets: dict[str, str] = {}  # names of jobs to names of disks, for messages
        self._monitor = monitor
        self._intake = intake
        self._since: float | None = None  # written by the talking thread, read by the watching one
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch-intake", daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def execute(self, command: str, /, **arguments: Any) -> Any:
        with self._timed():
            return self._monitor.execute(command, **arguments)

    def execute_with_fd(self, command: str, fd: int, /, **arguments: Any) -> Any:
        with self._timed():
            return self._monitor.execute_with_fd(command, fd, **arguments)

    def close(self) -> None:
        self._monitor.close()

    def kill(self, reason: str) -> None:
        """End the intake at once; its jobs break off and the guest goes on."""
        if not self.killed:
            self.killed = reason
            self._intake.kill()

    @property
    def stopped(self) -> bool:
        """Whether somebody has sent the intake SIGSTOP."""
        return _process_state(self._intake) in ("T", "t")

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        beat = rested = time.monotonic()
        while not self._over.wait(_BEAT):
            asleep, beat = time.monotonic() - beat, time.monotonic()
            if asleep > _OVERSLEPT:
                rested = beat  # we had no processor, and the intake may have had none either: it gets its time again
            since = self._since
            if since is None:
                continue
            late = time.monotonic() - max(since, rested)
            if late > _LATE or (late > _LATE_STOPPED and self.stopped):
                self.kill(f"QEMU waited {late:.2f} s for the intake")


def _process_state(intake: Intake) -> str:
    try:
        return Path(f"/proc/{intake.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def wait(monitor: Watched, names: Sequence[str], timeout: float, progress: Progress) -> None:
    """Until all these jobs have ended well; they stay there to be dismissed.

    Raises PushFailed when one broke off, has vanished, or took longer than `timeout` seconds: the caller has to cancel
    them all then. `killed` tells whether it was our hand.
    """
    begun = moved = stopped = working = time.monotonic()
    last, pause = -1, 0.005
    while True:
        mine = {job["id"]: job for job in base.jobs(monitor) if job["id"] in names}
        now = time.monotonic()
        done = sum(job["current-progress"] for job in mine.values())
        total = sum(job["total-progress"] for job in mine.values())
        if done != last:
            last, moved = done, now
        stopped = stopped if monitor.stopped else now
        working = working if any(job["status"] == "paused" for job in mine.values()) else now
        _tell(progress, done, total, now - begun)
        if all(name in mine and mine[name]["status"] == "pending" for name in names):
            epoch.finish(monitor, names)
            return
        _too_long(monitor, now, begun + timeout, stopped, moved)
        _raise_failure(monitor, names, mine, now - working > _STANDING)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _raise_failure(
    monitor: Watched, names: Sequence[str], jobs: Mapping[str, Mapping[str, Any]], standing: bool
) -> None:
    """If there is one. `standing`: some job has been paused at every look for longer than anything of QEMU's takes; a
    guest that is resumed makes QEMU forget the error."""
    paused = [name for name, job in jobs.items() if job["status"] == "paused"]
    broken = base.broken_off(monitor, paused) if paused else {}
    if standing:
        broken = dict.fromkeys(paused, "failed") | broken
    gone = [name for name in names if name not in jobs or jobs[name]["status"] == "concluded"]
    if not (monitor.killed or broken or gone):
        return
    disks = ", ".join(monitor.targets.get(name, name) for name in broken or gone) or "any disk"
    # The hand that killed the intake knows more than QEMU, for which that is an I/O error.
    reason = monitor.killed or (BROKEN if broken else "somebody else has ended its job")
    if not monitor.killed and "nospace" in broken.values():
        reason = "no space left"
    raise PushFailed(domain=monitor.domain, disk=disks, reason=reason)


def flush(monitor: Watched, socket: Path, exports: Sequence[str], timeout: float) -> None:
    """Have the intake make everything durable. Raises PushFailed; the intake is killed then.

    We ask for it ourselves: QEMU would hold its main loop, and with it the guest, for as long as a slow repository
    takes."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for export in exports:
                with nbd.connect(socket, export, ()) as connection:
                    connection.flush()
        except BaseException as error:  # noqa: BLE001 -- raised again by the waiting thread
            failed.append(error)

    thread = threading.Thread(target=work, name="flush-intake", daemon=True)
    thread.start()
    begun = stopped = time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        now = time.monotonic()
        stopped = stopped if monitor.stopped else now
        _too_long(monitor, now, begun + timeout, stopped, now)
    if failed or monitor.killed:
        reason = "; ".join(filter(None, [monitor.killed, *map(str, failed)]))
        raise PushFailed(domain=monitor.domain, disk=", ".join(exports), reason=reason)


def _too_long(monitor: Watched, now: float, deadline: float, stopped: float, moved: float) -> None:
    if now > deadline:
        monitor.kill("it took too long")
    elif now - stopped > _STOPPED:
        monitor.kill("the intake was stopped")
    elif now - moved > _STUCK:
        monitor.kill(f"nothing moved for {_STUCK:.0f} s")


def _tell(progress: Progress, done: int, total: int, seconds: float) -> None:
    rate = done / seconds if seconds > 0 else 0.0
    progress(done, total, rate, (total - done) / rate if rate > 0 else None)
