"""The daemon: a thin loop that takes what is due. All it knows is in the protection records and the repository.

    every round: reverts that nobody drives any more (the host was started anew)         → resuming.Reverts
                 domains and machines that were brought up and that nobody works for     → resuming.BroughtUp
                 domains captured continuously whose tap process is gone                 → service.tap.ensure
                 the newest point of a domain with `verify_every`, one at a time         → verifying.Verifying
                 records → tasks → schedule.due → one worker thread for each due domain  → service.point

Killed at any instant it loses nothing: the next start reads the same records. One daemon for each home, kept by a lock;
people at the command line are kept apart by the domain's own lock, for which the daemon waits.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.daemon.resuming import BroughtUp, Reverts
from appliance.daemon.shared import Event, Shared, Tries, why
from appliance.daemon.verifying import Verifying
from appliance.errors import Locked, NoSuchPoint, StoreError
from appliance.process import alone
from appliance.schedule import Task, due, next_time
from appliance.service import Session
from appliance.service.locks import GLANCE, daemon_lock
from appliance.service.protection import point
from appliance.service.tap import ensure, missing, paused_until

__all__ = ["Daemon"]

log = logging.getLogger(__name__)

# Epochs wait on QEMU and on the store far more than they compute.
_WORKERS = 4
# A new record or a changed interval is noticed within this many seconds without a signal.
_ROUND = 5.0


class Daemon:
    """`session` is the loop's own; each point is taken with one of its own. `tell` is called from the workers' threads,
    one call at a time."""

    def __init__(self, session: Session, tell: Callable[[Event], None]) -> None:
        self._shared = Shared(session, tell)
        self._home = session.home
        self._reverts, self._brought_up = Reverts(self._shared), BroughtUp(self._shared)
        self._verifying = Verifying(self._shared)
        self._tried: dict[str, tuple[float, int]] = {}  # uuid → (when its last point began, failures in a row)
        self._tapped = Tries()  # by the uuid of a domain without a tap process
        self._times: dict[str, float] = {}  # point → its time; touched by the loop's thread only
        self._gone: set[str] = set()  # points that were forgotten, and told; touched by the loop's thread only

    def run(self) -> None:
        """Until SIGTERM or SIGINT; what is being taken is finished first. Raises Locked if another one runs."""
        with self._alone(), self._signals():
            self._shared.say("started", None, f"process {os.getpid()}, home {self._home.path}")
            _notify("READY=1")
            with ThreadPoolExecutor(_WORKERS, "epoch") as pool:
                while not self._shared.stopped.is_set():
                    self._start_due(pool)
                    self._shared.wake.wait(self._until_next())
                    self._shared.wake.clear()
                _notify("STOPPING=1")
            self._reap()
            self._shared.say("stopped", None, "asked to")

    def round(self) -> None:
        """Take what is due now and end reverts that nobody drives, then return."""
        with self._alone(), ThreadPoolExecutor(_WORKERS, "epoch") as pool:
            self._start_due(pool)
        self._reap()

    def stop(self) -> None:
        """End `run` after what is being taken."""
        self._shared.stopped.set()
        self._shared.wake.set()

    def _start_due(self, pool: ThreadPoolExecutor) -> None:
        self._reap()
        held = self._reverts.start(pool)
        self._brought_up.start(pool)
        self._start_taps(pool)
        self._verifying.start(pool)
        for task in due(self._tasks(), time.time()):
            if task.uuid not in self._shared.running and task.uuid not in held:
                self._shared.running[task.uuid] = pool.submit(self._take, task)

    def _reap(self) -> None:
        """What has ended makes room. A worker says itself what it fails of; where that failed too (nobody reads our
        standard output any more), or at a place where nothing was to fail, the log is the only one to know."""
        for key, one in [*self._shared.running.items()]:
            if one.done():
                del self._shared.running[key]
                if (error := one.exception()) is not None:
                    log.error("%s: a worker has ended: %r", key, error, exc_info=error)

    def _start_taps(self, pool: ThreadPoolExecutor) -> None:
        """Of domains that nobody works on now; the process itself waits for them to run."""
        for record in protection.all_records(self._home):
            tried = self._tapped[record.uuid]
            if record.uuid not in self._shared.running and missing(self._home, record) and tried.may_again:
                self._shared.running[record.uuid] = pool.submit(self._start_tap, record, tried.failures)

    def _start_tap(self, record: Protection, failures: int) -> None:
        try:
            with self._shared.session() as session:
                ensure(session, record)
        except Exception as error:  # noqa: BLE001  see `why`
            self._tapped.note(record.uuid, failures + 1)
            self._shared.say("failed", record.domain, why(f"tap of {record.domain}", error))
        else:
            self._tapped.note(record.uuid, 0)
            self._shared.say("tap", record.domain, "the process that captures continuously was started")
        finally:
            self._shared.wake.set()

    def _until_next(self) -> float:
        now = time.time()
        waiting = [next_time(task, now) - now for task in self._tasks() if task.uuid not in self._shared.running]
        return max(min([_ROUND, *waiting]), 0.05)

    def _tasks(self) -> list[Task]:
        found = []
        for record in protection.all_records(self._home):
            if record.every and paused_until(self._home, record.uuid) is None:
                tried, failures = self._tried.get(record.uuid, (None, 0))
                found.append(Task(record.uuid, record.domain, record.every, self._last(record), tried, failures))
        return found

    def _last(self, record: Protection) -> float | None:
        """When its newest point was, asked of the repository once for each point."""
        if record.last_point is None:
            return None
        if record.last_point not in self._times:
            try:
                moment = self._shared.own.repository.point(record.last_point).time.timestamp()
            except NoSuchPoint:
                if record.last_point not in self._gone:
                    self._gone.add(record.last_point)
                    log.warning(
                        "%s: point %s was forgotten, so the next one is due now and reads the whole disks",
                        record.domain, record.last_point,
                    )  # fmt: skip
                return None
            except StoreError as error:
                log.warning("newest point of %s: %s", record.domain, error)
                return None
            self._times = {**self._times, record.last_point: moment}
        return self._times[record.last_point]

    def _take(self, task: Task) -> None:
        began = time.time()
        try:
            with self._shared.session() as session:
                taken = point(session, task.uuid, reason="schedule", wait=task.every)
        except Exception as error:  # noqa: BLE001  see `why`
            self._failed(task, began, why(f"point of {task.domain}", error))
        else:
            changed = sum(one.changed_bytes for one in taken.disks)
            self._tried[task.uuid] = (began, 0)
            # Among the notes: a disk that is not in the point, and why.
            notes = "".join(f"; {note}" for note in taken.notes)
            detail = f"{taken.id}, {changed} bytes changed, {taken.consistency.value}{notes}"
            self._shared.say("point", task.domain, detail)
        finally:
            self._shared.wake.set()

    def _failed(self, task: Task, began: float, detail: str) -> None:
        self._tried[task.uuid] = (began, task.failures + 1)
        self._shared.say("failed", task.domain, detail)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        path = daemon_lock(self._home)
        with alone(path, GLANCE) as first:  # it may only be looked at
            if not first:
                holder = f"the daemon with process {path.read_text()}"
                raise Locked(url=str(self._home.path), holder=holder, hint="one daemon serves a home")
            path.write_text(str(os.getpid()))
            yield

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def end(_number: int, _frame: Any) -> None:
            self.stop()

        def wake(_number: int, _frame: Any) -> None:
            self._shared.wake.set()

        wanted = {signal.SIGTERM: end, signal.SIGINT: end, signal.SIGHUP: wake}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _notify(state: str) -> None:
    """Tell systemd, when it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
