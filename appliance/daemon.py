"""The daemon: a thin loop that takes what is due. All it knows is in the protection records and the repository.

    every round: records → tasks → schedule.due → one worker thread for each due domain → service.point
                 reverts that nobody drives any more (the host was started anew)      → service.resume
                 domains that were brought up and whose disks nobody fills any more   → service.image.starting.resume
                 machines that boot from here and that nobody serves any more         → service.image.streaming.resume
                 domains captured continuously whose tap process is gone              → service.tap.ensure
                 the newest point of a domain with `verify_every`, one at a time      → service.image.verifying

Killed at any instant it loses nothing: the next start reads the same records. One daemon for each home, kept by a lock;
people at the command line are kept apart by the domain's own lock, for which the daemon waits.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.errors import Interrupted, Locked, NoSuchPoint, NothingToResume, RewindError, StoreError
from appliance.process import lives
from appliance.restore import hydrate, serve
from appliance.schedule import Task, due, next_time
from appliance.service import Session
from appliance.service.locks import daemon_lock
from appliance.service.protection import point
from appliance.service.recovery import resume
from appliance.service.tap import ensure, missing, paused_until
from appliance.service.underway import Pending, abandoned, under_way

__all__ = ["Daemon", "Event"]

log = logging.getLogger(__name__)

# Epochs wait on QEMU and on the store far more than they compute.
_WORKERS = 4
# A new record or a changed interval is noticed within this many seconds without a signal.
_ROUND = 5.0
# A revert that could not be ended is tried again after this, then after twice as long, and so on up to an hour: a
# person may have to help first, and needs the domain's lock for that.
_AGAIN, _AGAIN_AT_MOST = 60.0, 3600.0
# One that starts and ends at once, or that somebody else holds, must not become a loop.
_SOON = 5.0
# The keys among what is running of a test, and of what was brought up: two at a time, since each may wait for a minute
# for a repository that is away, and points are due meanwhile.
_TEST, _IMAGES = "test", ("images 1", "images 2")


@dataclass(frozen=True, slots=True)
class Event:
    """`kind`: started, tap, point, verified, resumed, failed, stopped."""

    kind: str
    time: datetime
    domain: str | None
    detail: str


class Daemon:
    """`session` is the loop's own; each point is taken with one of its own. `tell` is called from the workers' threads,
    one call at a time."""

    def __init__(self, session: Session, tell: Callable[[Event], None]) -> None:
        self._session, self._tell = session, tell
        self._home = session.home
        self._times: dict[str, float] = {}  # point → its time; touched by the loop's thread only
        self._gone: set[str] = set()  # points that were forgotten, and told; touched by the loop's thread only
        self._telling = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._tried: dict[str, tuple[float, int]] = {}  # uuid → (when, failures in a row); guarded by _telling
        self._running: dict[str, Future[None]] = {}  # touched by the loop's thread only
        self._resumed: dict[str, tuple[float, int]] = {}  # revert's domain, or image → as _tried; guarded by _telling
        self._resuming: set[str] = set()  # images; guarded by _telling
        self._tested: dict[str, tuple[float, int]] = {}  # uuid → (when to look, failures in a row); as _tried
        self._tapped: dict[str, tuple[float, int]] = {}  # domain without a tap process → as _tried; guarded by _telling

    def run(self) -> None:
        """Until SIGTERM or SIGINT; what is being taken is finished first. Raises Locked if another one runs."""
        with self._alone(), self._signals():
            self._say("started", None, f"process {os.getpid()}, home {self._home.path}")
            _notify("READY=1")
            with ThreadPoolExecutor(_WORKERS, "epoch") as pool:
                while not self._stop.is_set():
                    self._start_due(pool)
                    self._wake.wait(self._until_next())
                    self._wake.clear()
                _notify("STOPPING=1")
            self._say("stopped", None, "asked to")

    def round(self) -> None:
        """Take what is due now and end reverts that nobody drives, then return."""
        with self._alone(), ThreadPoolExecutor(_WORKERS, "epoch") as pool:
            self._start_due(pool)

    def stop(self) -> None:
        """End `run` after what is being taken."""
        self._stop.set()
        self._wake.set()

    def _start_due(self, pool: ThreadPoolExecutor) -> None:
        self._running = {uuid: one for uuid, one in self._running.items() if not one.done()}
        held = self._resume_abandoned(pool)
        self._resume_images(pool)
        self._start_taps(pool)
        self._start_test(pool)
        for task in due(self._tasks(), time.time()):
            if task.uuid not in self._running and task.uuid not in held:
                self._running[task.uuid] = pool.submit(self._take, task)

    def _resume_abandoned(self, pool: ThreadPoolExecutor) -> set[str]:
        """Reverts that nobody drives go on. Returns the domains of all reverts: no point can be taken of them now."""
        try:
            held = {one.uuid for one in under_way(self._session)}
            waiting = abandoned(self._session) if held else []
        except RewindError as error:
            log.warning("reverts of %s: %s", self._home.path, error)
            return set()
        for one in waiting:
            when, failures = self._resumed.get(one.uuid, (0.0, 0))
            if one.uuid not in self._running and time.time() >= when + _pause(failures):
                self._running[one.uuid] = pool.submit(self._resume, one, failures)
        return held

    def _resume_images(self, pool: ThreadPoolExecutor) -> None:
        """Domains and machines that were brought up and whose disks nobody fills any more."""
        for key in _IMAGES:
            if key not in self._running and self._waiting(time.time()):
                self._running[key] = pool.submit(self._resume_each)

    def _waiting(self, before: float) -> list[tuple[int, bool, str]]:
        """(failures, a domain and no machine, name) of what nobody works for and was last tried before then. First what
        never failed: a machine that lives and has just lost its server must not wait for what does not come back."""
        found = []
        for kind in (hydrate, serve):
            for name in set(kind.unfinished(self._home)) - self._resuming:
                when, failures = self._resumed.get(f"image {name}", (0.0, 0))
                ready = when < before and time.time() >= when + _pause(failures)
                if ready and not lives(kind.state(self._home, name).get("key", "")):
                    found.append((failures, kind is hydrate, name))
        return sorted(found)

    def _resume_each(self) -> None:
        """One after the other, each once. Looks anew before each: it may have been forgotten, or have ended."""
        began = time.time()
        while not self._stop.is_set():
            with self._telling:
                waiting = self._waiting(began)[:1]
                self._resuming.update(name for *_, name in waiting)
            if not waiting:
                break
            [(failures, filled, name)] = waiting
            self._resume_image(not filled, name, f"image {name}", failures)
            with self._telling:
                self._resuming.discard(name)
        self._wake.set()

    def _resume_image(self, served: bool, name: str, key: str, failures: int) -> None:
        from appliance.service.image import starting, streaming

        try:
            with Session(self._home, self._session.connect, key=self._session.key) as session:
                if served:
                    streaming.resume(session, name)
                else:
                    starting.resume(session, name)
        except Locked as error:
            log.info("image %s: %s", name, error)  # whoever begins or forgets it has come first
            with self._telling:
                self._resumed[key] = (time.time(), failures)
        except RewindError as error:
            self._image_not_resumed(name, key, failures, error.message + (f" ({error.hint})" if error.hint else ""))
        except Exception as error:
            log.exception("image %s", name)
            self._image_not_resumed(name, key, failures, f"unexpected {type(error).__name__}: {error}")
        else:
            with self._telling:
                self._resumed[key] = (time.time(), 0)
            self._say("resumed", name, "it is served again" if served else "its disks are being filled again")

    def _image_not_resumed(self, name: str, key: str, failures: int, detail: str) -> None:
        with self._telling:
            self._resumed[key] = (time.time(), failures + 1)
        if name in hydrate.names(self._home) or name in serve.names(self._home):
            self._say("failed", name, detail)
        else:
            log.info("image %s was forgotten meanwhile: %s", name, detail)

    def _start_taps(self, pool: ThreadPoolExecutor) -> None:
        """Of domains that nobody works on now; the process itself waits for them to run."""
        for record in protection.all_records(self._home):
            when, failures = self._tapped.get(record.uuid, (0.0, 0))
            now = time.time()
            if record.uuid not in self._running and missing(self._home, record) and now >= when + _pause(failures):
                self._running[record.uuid] = pool.submit(self._start_tap, record, failures)

    def _start_tap(self, record: Protection, failures: int) -> None:
        try:
            with Session(self._home, self._session.connect, key=self._session.key) as session:
                ensure(session, record)
        except RewindError as error:
            with self._telling:
                self._tapped[record.uuid] = (time.time(), failures + 1)
            self._say("failed", record.domain, f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        except Exception as error:
            log.exception("tap of %s", record.domain)
            with self._telling:
                self._tapped[record.uuid] = (time.time(), failures + 1)
            self._say("failed", record.domain, f"unexpected {type(error).__name__}: {error}")
        else:
            with self._telling:
                self._tapped[record.uuid] = (time.time(), 0)
            self._say("tap", record.domain, "the process that captures continuously was started")
        finally:
            self._wake.set()

    def _start_test(self, pool: ThreadPoolExecutor) -> None:
        """At most one: a machine that is tested takes a gigabyte, and a processor for minutes."""
        from appliance.service.image import scheduled

        if _TEST in self._running:
            return
        for record in protection.all_records(self._home):
            when, failures = self._tested.get(record.uuid, (0.0, 0))
            if record.verify_every is None or time.time() < when:
                continue
            try:
                found = scheduled.due(self._session, record, time.time())
            except RewindError as error:
                log.warning("tests of %s: %s", record.domain, error)
                found = scheduled.Due("", time.time() + _AGAIN)
            with self._telling:
                self._tested[record.uuid] = (found.again, failures)
            if found.point:
                self._running[_TEST] = pool.submit(self._test, record, found.point, failures)
                return

    def _test(self, record: Protection, point: str, failures: int) -> None:
        from appliance.service.image import verifying

        try:
            with Session(self._home, self._session.connect, key=self._session.key) as session:
                found = verifying.verify(session, record.uuid, point, stopped=self._stop.is_set)
        except Interrupted:
            pass  # asked to stop: the next daemon begins anew
        except RewindError as error:
            self._not_tested(record, failures, f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        except Exception as error:
            log.exception("test of %s", record.domain)
            self._not_tested(record, failures, f"unexpected {type(error).__name__}: {error}")
        else:
            with self._telling:
                self._tested[record.uuid] = (self._tested[record.uuid][0], 0)
            if found.verdict.booted:
                self._say("verified", record.domain, f"{point} boots on {found.target}, in {found.seconds:.0f} s")
            else:
                self._say("failed", record.domain, f"{point} did not boot: {'; '.join(found.verdict.reasons)}")
        finally:
            self._wake.set()

    def _not_tested(self, record: Protection, failures: int, detail: str) -> None:
        pause = min(_AGAIN * 2**failures, _AGAIN_AT_MOST)
        with self._telling:
            self._tested[record.uuid] = (time.time() + pause, failures + 1)
        self._say("failed", record.domain, f"its newest point could not be tested: {detail}")

    def _until_next(self) -> float:
        now = time.time()
        waiting = [next_time(task, now) - now for task in self._tasks() if task.uuid not in self._running]
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
                moment = self._session.repository.point(record.last_point).time.timestamp()
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
            with Session(self._home, self._session.connect, key=self._session.key) as session:
                taken = point(session, task.uuid, reason="schedule", wait=task.every)
        except RewindError as error:
            self._failed(task, began, f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        except Exception as error:
            # A bug in one domain's epoch must not end the protection of the others.
            log.exception("point of %s", task.domain)
            self._failed(task, began, f"unexpected {type(error).__name__}: {error}")
        else:
            changed = sum(one.changed_bytes for one in taken.disks)
            with self._telling:
                self._tried[task.uuid] = (began, 0)
            # Among the notes: a disk that is not in the point, and why.
            notes = "".join(f"; {note}" for note in taken.notes)
            self._say("point", task.domain, f"{taken.id}, {changed} bytes changed, {taken.consistency.value}{notes}")
        finally:
            self._wake.set()

    def _resume(self, pending: Pending, failures: int) -> None:
        try:
            with Session(self._home, self._session.connect, key=self._session.key) as session:
                results = resume(session, pending.uuid)
        except Locked as error:
            log.info("revert of %s: %s", pending.domain, error)  # somebody else has come first
            with self._telling:
                self._resumed[pending.uuid] = (time.time(), failures)
        except NothingToResume:
            pass
        except RewindError as error:
            self._not_resumed(pending, failures, f"{error.message}" + (f" ({error.hint})" if error.hint else ""))
        except Exception as error:
            log.exception("revert of %s", pending.domain)
            self._not_resumed(pending, failures, f"unexpected {type(error).__name__}: {error}")
        else:
            with self._telling:
                self._resumed.pop(pending.uuid, None)
            for one in results:
                self._say("resumed", one.domain, f"the interrupted {one.verb} to {one.point}: {one.state}")
        finally:
            self._wake.set()

    def _not_resumed(self, pending: Pending, failures: int, detail: str) -> None:
        with self._telling:
            self._resumed[pending.uuid] = (time.time(), failures + 1)
        self._say("failed", pending.domain, f"the interrupted revert to {pending.target}: {detail}")

    def _failed(self, task: Task, began: float, detail: str) -> None:
        with self._telling:
            self._tried[task.uuid] = (began, task.failures + 1)
        self._say("failed", task.domain, detail)

    def _say(self, kind: str, domain: str | None, detail: str) -> None:
        with self._telling:
            self._tell(Event(kind, datetime.now(UTC), domain, detail))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        path = daemon_lock(self._home)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(handle, 32, 0).decode().strip()
                raise Locked(
                    url=str(self._home.path), holder=f"the daemon with process {pid}", hint="one daemon serves a home"
                ) from None
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def end(_number: int, _frame: Any) -> None:
            self.stop()

        def wake(_number: int, _frame: Any) -> None:
            self._wake.set()

        wanted = {signal.SIGTERM: end, signal.SIGINT: end, signal.SIGHUP: wake}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _pause(failures: int) -> float:
    """Seconds after which it is tried again."""
    return min(_AGAIN * 2 ** (failures - 1), _AGAIN_AT_MOST) if failures else _SOON


def _notify(state: str) -> None:
    """Tell systemd, when it started us with Type=notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
