"""The tap process: one beside each domain that is captured continuously. It owns the journal and says what is covered.

    waiting    not attached, and why: the domain is shut off, somebody works on it, the last try has failed
    attached   the guest's writes are recorded; once a second this is seen, and only what was seen is confirmed
    epochs     recording made writes wait for longer than allowed: points by dirty bitmaps for a while
    paused     `rewind pause`: the admin has the block graph to himself

Every loss ends the span in the ledger where it was last confirmed, takes what is left out of the graph and attaches
again, on whatever node is the top then, with a point right after it as the new baseline. That point reads what the
dirty bitmaps name, which have never stopped. Between tries it waits longer and longer.

The domain's locks are held for attaching and detaching alone. Killed at any instant this process takes the journal with
it: the guest does not notice, and the next process finds the rest and a span that was left open.

Longer than other modules here: its states and what leads from one to another stand in one place.

    python -m appliance.service.tapper HOME UUID SETTINGS [KEY DESCRIPTOR]
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.capture import protection, tap
from appliance.capture.latency import Latency
from appliance.capture.protection import Protection
from appliance.capture.tap import Recorder, Running
from appliance.config import Home
from appliance.errors import DomainBusy, JournalError, Locked, NoSpace, NotSupported, RevertUnderWay, RewindError
from appliance.hypervisor.base import Disk, Domain, DomainState
from appliance.process import alone, process_key
from appliance.service.attached import Attached, Lost, chosen, find_domain, reverting
from appliance.service.doctor import known
from appliance.service.session import Session
from appliance.service.taking import Taking
from appliance.service.tap import paused_until
from appliance.service.tending import Tending

if TYPE_CHECKING:
    from appliance.model import Point
    from appliance.store import Key

__all__ = ["Tapper"]

_TICK = 0.5
# By then what was seen is durable as a rule. Who waits for the next look claims less, should everything die before.
_COMMITTED = 0.25
_FIRST, _LONGEST = 1.0, 60.0
# A tap that has held for so long was no failed try.
_HELD = 60.0
_LOCK = 5.0
# Of the spool's limit: what is fuller would be full again at once.
_FULL = 0.9
_LEAVE = 30.0
# While latency keeps the tap out: first for so long, then twice as long, and a point this often.
_SPARE, _SPARE_LONGEST, _SPARE_EVERY = 60.0, 3600.0, 60.0

_log = logging.getLogger(__name__)


class Tapper:
    """`run` is the main thread; points are taken in another one."""

    def __init__(self, home: Home, uuid: str, settings_file: Path, key: Key | None = None) -> None:
        self._home, self._uuid, self._settings_file, self._key = home, uuid, settings_file, key
        self._stop, self._wake = threading.Event(), threading.Event()
        self._recorder: Recorder | None = None
        self._tap: Attached | None = None
        self._last_record: Protection | None = None
        self._said = Running(process_key(os.getpid()), "waiting", "it has just begun")
        self._next, self._pause = 0.0, _FIRST
        self._spared, self._spare = 0.0, _SPARE
        self._limit: float | None = None  # the allowed latency when the tap was given up for it
        self._complained = ""  # the last error of a round: one that lasts is told once
        self._failed = False  # whether it could not attach to a domain that runs
        self._ledger = tap.ledger_of(home, uuid)

    def run(self) -> None:
        """Until it is asked to end, or the domain is not to be captured continuously any more. Returns at once if there
        is another one."""
        run = self._home.run(self._uuid)
        run.mkdir(parents=True, exist_ok=True)
        with alone(run / "tap.lock") as first:
            if not first:
                return
            with Session(self._home, settings_file=self._settings_file, key=self._key) as session:
                self._session = session
                self._tell("waiting", "it has just begun")
                self._tending = Tending(self._home, self._uuid, self._settings_file, session.key, self._rebase)
                self._tending.start()
                self._points = Taking(self._home, self._settings_file, session.key)
                while (record := protection.load(self._home, self._uuid)) and record.continuous:
                    self._round(record)
                    if self._stop.is_set():
                        break
                    if not self._wake.wait(_COMMITTED):
                        if self._tap is not None:
                            self._tap.arrived()
                        self._wake.wait(_TICK - _COMMITTED)
                    self._wake.clear()
                self._leave(record)

    def end(self) -> None:
        """Ask it to end; for a signal handler."""
        self._stop.set()
        self._wake.set()

    def wake(self) -> None:
        """Ask it to look now."""
        self._next = 0.0
        self._wake.set()

    def _rebase(self) -> None:
        """Ask for a new point to count from, without an end of the span."""
        if (attached := self._tap) is not None:  # the main thread may let go of it meanwhile
            attached.rebase()

    def _tell(self, state: str, reason: str = "", until: float = 0.0) -> None:
        made = Running(process_key(os.getpid()), state, reason, until)
        if self._recorder is not None and self._recorder.alive():
            made = self._recorder.described(made)
        if made != self._said or not tap.state_path(self._home, self._uuid).exists():
            if (made.state, made.reason) != (self._said.state, self._said.reason):
                _log.info("%s%s", state, f": {reason}" if reason else "")
            tap.tell(self._home, self._uuid, made)
            self._said = made

    # --- one round ---

    def _round(self, record: Protection) -> None:
        """Whatever goes wrong in it costs this round alone."""
        self._last_record = record
        try:
            if self._tap is not None:
                self._attended(record, self._tap)
            else:
                self._unattended(record)
        except Lost as lost:
            self._lose(record, str(lost))
        except RewindError as error:
            if error.message != self._complained:
                _log.warning("%s", error)
            self._complained = error.message
            self._later(error.message)
        except Exception as error:  # noqa: BLE001
            # A mistake of ours must not end what protects the guest: the watchdog is this process's child.
            _log.exception("unexpected")
            self._later(f"unexpected {type(error).__name__}: {error}")
        finally:
            if record.uri.startswith("qmp:"):
                # A bare QEMU's monitor serves one client, and others need it as well.
                self._session.hypervisor(record.uri).close()

    def _later(self, reason: str) -> None:
        if self._tap is None:
            self._failed = True
            self._next = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, _LONGEST)
            self._tell("waiting", reason)

    # --- attached ---

    def _attended(self, record: Protection, attached: Attached) -> None:
        attached.look(record)
        until = paused_until(self._home, self._uuid)
        if until is not None:
            self._take_out(record, attached, "stepped aside for its admin")
            self._tell("paused", "asked to step aside", _finite(until))
            return
        if attached.held() > _HELD:
            self._pause = _FIRST
        if attached.held() > _SPARE_LONGEST:
            self._spare = _SPARE
        if self._too_slow(record, attached):
            return
        if not self._points.busy() and not attached.based():
            self._take_baseline(record, attached)

    def _take_baseline(self, record: Protection, attached: Attached) -> None:
        def done(made: Point | None) -> None:
            if made is not None and made.sequence is not None:
                attached.taken(made.id)
            self._wake.set()

        self._points.begin(record, "baseline", self._pause, done)

    def _too_slow(self, record: Protection, attached: Attached) -> bool:
        attached.latency.limit = record.max_added_latency
        slow = attached.latency.verdict()
        if not slow:
            return False
        self._take_out(record, attached, slow)
        self._spared, self._spare = time.monotonic() + self._spare, min(self._spare * 2, _SPARE_LONGEST)
        self._limit = record.max_added_latency
        left = self._spared - time.monotonic()
        self._ledger.event("latency", datetime.now(UTC), f"{slow}; points by dirty bitmaps for {left:.0f} s")
        self._tell("epochs", slow, time.time() + left)
        return True

    # --- not attached ---

    def _unattended(self, record: Protection) -> None:
        until = paused_until(self._home, self._uuid)
        if until is not None:
            self._settle(record)
            self._tell("paused", "asked to step aside", _finite(until))
            return
        if time.monotonic() < self._spared and record.max_added_latency == self._limit:
            self._tell("epochs", self._said.reason, self._said.until)
            self._point_by_clock(record)
            return
        if time.monotonic() < self._next:
            if self._failed:
                self._point_by_clock(record)
            return
        domain = find_domain(self._session, record)
        if domain is None or domain.state() is DomainState.SHUTOFF:
            self._pause, self._failed = _FIRST, False
            self._tell("waiting", "the domain is shut off")
            return
        if reverting(self._session, record):
            self._tell("waiting", "a revert is under way")
            return
        self._attach(record, domain)

    def _settle(self, record: Protection) -> None:
        """What a process before us has left must not be there in a pause."""
        if self._said.state != "paused":
            domain = find_domain(self._session, record)
            if domain is not None and domain.state() is not DomainState.SHUTOFF:
                with self._working(record, domain, "step aside"):
                    if not tap.elsewhere(self._home, domain):
                        tap.remove(self._home, domain, ())

    def _attach(self, record: Protection, domain: Domain) -> None:
        try:
            _refuse_defects(domain)
            with self._working(record, domain, "begin the tap"):
                if paused_until(self._home, self._uuid) is not None:
                    return  # somebody has asked us to step aside, and does not wait for one who has
                disks = self._ready(record, domain)
                recorder = self._recording(disks)
                before = recorder.control().status()
                if before.limit and before.bytes > _FULL * before.limit:
                    raise NoSpace(url=str(recorder.spool), name="what the guest would write")
                tap.insert(self._home, domain, disks, recorder)
                qemu = process_key(domain.process().pid)
        except (Locked, RevertUnderWay) as error:
            self._tell("waiting", error.message)
            return
        except NotSupported as error:
            # Not for as long as this QEMU runs; a disk may be exchanged, though.
            self._spared, self._limit = time.monotonic() + _SPARE_LONGEST, record.max_added_latency
            self._tell("epochs", error.message)
            return
        self._ledger.ended(recorder.journal, None, None, "the process that captured has died")
        self._ledger.began(recorder.journal, before.written, datetime.now(UTC))
        self._tap = Attached(self._session, self._ledger, recorder, disks, qemu)
        self._tap.latency = Latency(record.max_added_latency)
        self._failed, self._complained = False, ""
        self._tell("attached")
        self._points.anew()
        self._take_baseline(record, self._tap)

    def _ready(self, record: Protection, domain: Domain) -> list[Disk]:
        """The disks to record, with nobody's tap under them. Raises DomainBusy when another home's is there."""
        if other := tap.elsewhere(self._home, domain):
            reason, hint = f"another home captures it continuously, at {other}", "end that there, or here"
            raise DomainBusy(domain=record.domain, reason=reason, hint=hint)
        tap.remove(self._home, domain, ())  # of a process that has died
        return chosen(domain, record)

    def _recording(self, disks: Sequence[Disk]) -> Recorder:
        """A journal that records these disks, the one that runs or a new one."""
        sizes = tuple((disk.target, disk.size) for disk in disks)
        recorder = self._recorder
        if (
            recorder is not None and recorder.sizes == sizes and recorder.alive()
            and recorder.control().status().state == "ok"
        ):  # fmt: skip
            return recorder
        self._stop_recorder()
        recorder = Recorder(self._home, self._uuid, self._session.settings, sizes)
        recorder.start()
        self._recorder = recorder
        return recorder

    def _stop_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    # --- the end of a span ---

    def _lose(self, record: Protection, reason: str) -> None:
        """What was confirmed counts; the rest is taken out of the graph, and it begins anew."""
        _log.warning("writes are not recorded any more: %s", reason)
        assert self._tap is not None
        self._ledger.ended(self._tap.recorder.journal, None, None, reason)
        self._next = time.monotonic() + (self._pause if self._tap.held() < _HELD else 0)
        self._pause = min(self._pause * 2, _LONGEST)
        self._tap = None
        self._tell("waiting", reason)

    def _take_out(self, record: Protection, attached: Attached, reason: str) -> datetime:
        """In order: up to the pause in which it is taken out everything is recorded. Returns the end of the span.
        Raises Lost, Locked and others; it is still attached then."""
        recorder = attached.recorder
        domain = self._session.hypervisor(record.uri).domain(record.uuid)
        with self._working(record, domain, "take the tap out"):
            if attached.ended(domain):
                raise Lost("a mirror has ended")
            seen = datetime.now(UTC)
            tap.remove(self._home, domain, attached.disks)
            self._ledger.ended(recorder.journal, recorder.control().status().written, seen, reason)
        self._tap = None
        with contextlib.suppress(JournalError):
            recorder.control().seal()  # so that all of it can be shipped
        return seen

    def _leave(self, record: Protection | None) -> None:
        """The process ends: nothing of it stays."""
        found, now = record or self._last_record, protection.load(self._home, self._uuid)
        reason = "the tap process was asked to end" if now and now.continuous else "continuous capture was ended"
        limit = time.monotonic() + _LEAVE
        while self._tap is not None and found is not None and time.monotonic() < limit:
            try:
                ended = self._take_out(found, self._tap, reason)
                if now is None or not now.continuous:
                    self._ledger.stopped(ended)  # from here on nobody promises anything
            except Lost as lost:
                self._lose(found, str(lost))
            except RewindError as error:
                _log.warning("cannot take the tap out yet: %s", error)
                time.sleep(0.5)
        self._points.join(_LEAVE)
        self._tending.stop()
        self._stop_recorder()
        tap.state_path(self._home, self._uuid).unlink(missing_ok=True)
        _log.info("ended")

    # --- helpers ---

    def _point_by_clock(self, record: Protection) -> None:
        """While there is no tap; with an interval of its own the daemon takes them."""
        if record.every is None:
            self._points.begin(record, "schedule", _SPARE_EVERY, lambda _made: self._wake.set())

    @contextlib.contextmanager
    def _working(self, record: Protection, domain: Domain, purpose: str) -> Iterator[None]:
        words = f"{purpose} of {record.domain}"
        with (
            self._session.hold(record.uuid, record.domain, words, _LOCK),
            self._session.claim(domain, words, _LOCK),
        ):
            yield


def _refuse_defects(domain: Domain) -> None:
    """Raises NotSupported on a QEMU on which a mirror may harm the guest."""
    version = domain.process().version
    iothread = any(disk.iothread for disk in domain.disks())
    for one in known.defects(version, iothread):
        if one.mirror:
            text = ".".join(map(str, version))
            raise NotSupported(object=f"continuous capture with QEMU {text}", reason=one.what, hint=one.remedy)


def _finite(until: float) -> float:
    return 0.0 if until == float("inf") else until


def main(argv: list[str]) -> int:
    """The command of the process; its log is its standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s tap %(levelname)s %(message)s")
    key = None
    if len(argv) > 4:
        from appliance.store import Key

        key = Key.from_fd(int(argv[4]))
    tapper = Tapper(Home(Path(argv[1])), argv[2], Path(argv[3]), key)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: tapper.end())
    signal.signal(signal.SIGUSR1, lambda *_: tapper.wake())
    tapper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
