"""What the tap process does beside capturing: ship sealed segments, make points of the journal, let go of what is old.

    spool ── ship ──► repository          seconds behind; a repository that is away makes it late and nothing else
      └──── tiers ──► points              each minute; then the records that they stand for may go, here and there

Threads of their own, with a low priority: whatever takes long here must not delay the one that sees whether the guest's
writes are recorded. Shipping does not wait for points either: under the worst load a single one takes longer than it
takes to fill the spool, and what was shipped may go meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.capture import protection, tap
from appliance.capture.ship import Shipper, retire
from appliance.capture.tiers import FULL
from appliance.config import Home
from appliance.errors import JournalError, RewindError
from appliance.service import tiers
from appliance.service.session import Session

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.capture.tap import Running
    from appliance.store import Key

__all__ = ["Tending"]

_SHIP, _TIERS = 1.0, 15.0
# Of one go: what is left is done in the next one.
_BUDGET = 10.0
_LONGEST = 60.0
_LAST = 20.0
_NICE = 10

_log = logging.getLogger(__name__)


class Tending:
    """Started and ended by the tap process's main thread. `damaged` is called, from another thread, when a new point is
    needed to count from."""

    def __init__(
        self, home: Home, uuid: str, settings_file: Path, key: Key | None, damaged: Callable[[], None] = lambda: None
    ) -> None:
        self._damaged = damaged
        self._home, self._uuid, self._settings_file, self._key = home, uuid, settings_file, key
        self._stop, self._abort = threading.Event(), threading.Event()
        self._after = ("", 0)  # the journal that is being written, and up to where nobody wants its records
        self._shipped = ("", 0)  # the same journal, and up to where the repository has it
        self._relieved = False  # whether the spool had to forget since points were last made
        self._tiers_at = 0.0
        works = {"shipping": self._shipping, "tiers": self._tiering}
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True) for name, work in works.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ship what is sealed and end; what takes longer than 20 seconds is left for another time."""
        self._stop.set()
        self._join(_LAST)
        self._abort.set()
        self._join(5)

    def _join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, work: Callable[[Session, bool], None]) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        pause = _SHIP
        while not self._abort.is_set():
            last = self._stop.is_set()
            try:
                with Session(self._home, settings_file=self._settings_file, key=self._key) as session:
                    work(session, last)
                    pause = _SHIP
            except Exception as error:  # noqa: BLE001 -- a repository may fail in any way, and comes back
                known = isinstance(error, RewindError | OSError)
                _log.warning("%s: not now: %s", threading.current_thread().name, error, exc_info=not known)
                self._stop.wait(pause)
                pause = min(pause * 2, _LONGEST)
            if last:
                return

    def _shipping(self, session: Session, last: bool) -> None:
        """Until it is to end. Raises what the store raises."""
        spool = self._home.spool(self._uuid)
        shipper = Shipper(
            session.repository, self._uuid, spool, ledger=tap.ledger_of(self._home, self._uuid),
            rate=session.settings.rate_limit, stop=self._abort,
        )  # fmt: skip
        while True:
            if spool.is_dir():
                self._ship(shipper)
            if last:
                return
            last = self._stop.wait(_SHIP)

    def _ship(self, shipper: Shipper) -> None:
        running = tap.current(self._home, self._uuid)
        shipper.once(self._unwanted())
        if running is not None and running.journal:
            self._shipped = running.journal, shipper.shipped(self._unwanted())
            self._relieve(running)

    def _relieve(self, running: Running) -> None:
        """A spool that is nearly full forgets what was shipped now, and the ledger is told."""
        used, number = self._used(), self._there()
        if used < FULL:
            return
        if number:
            with contextlib.suppress(JournalError):
                running.control(1.0).forget(number)
                self._relieved = True
        try:
            tiers.press(self._home, self._uuid, used)
        except (RewindError, OSError) as error:
            # The same disk may be full: then nothing can be written down, and shipping is what makes room.
            _log.warning("the ledger is not told that the spool is %.0f %% full: %s", used * 100, error)

    def _there(self) -> int:
        """Up to where the repository has what the spool has, of the journal that is being written."""
        running = tap.current(self._home, self._uuid)
        journal, number = self._shipped
        return number if running is not None and running.journal == journal else 0

    def _tiering(self, session: Session, last: bool) -> None:
        """Until it is to end. Raises what the store raises."""
        spool = self._home.spool(self._uuid)
        while True:
            if spool.is_dir():
                self._tend(session)
            if last:
                return
            last = self._stop.wait(_SHIP)

    def _tend(self, session: Session) -> None:
        if time.monotonic() < self._tiers_at and not self._pressed():
            return
        self._tiers_at = time.monotonic() + _TIERS
        record = protection.load(self._home, self._uuid)
        if record is None or not self._home.ledger(self._uuid).exists():
            return
        full, self._relieved = self._relieved, False
        outcome = tiers.run(session, record, _BUDGET, shipped=self._there(), full=full)
        if outcome.left:
            self._tiers_at = 0.0
        if outcome.damaged:
            self._damaged()
        self._retire(session, record, outcome.expired)

    def _retire(self, session: Session, record: Protection, expired: dict[str, int]) -> None:
        running = tap.current(self._home, record.uuid)
        for journal, number in expired.items():
            if running is not None and running.journal == journal:
                self._after = journal, max(self._unwanted(), number)
            retire(session.repository, record.uuid, journal, number)

    def _unwanted(self) -> int:
        """Of the journal that is being written: one that another journal has taken the place of begins at 1 again."""
        running = tap.current(self._home, self._uuid)
        journal, number = self._after
        return 0 if running is not None and running.journal not in ("", journal) else number

    def _pressed(self) -> bool:
        """Whether the spool is so full that it cannot wait."""
        return self._used() >= FULL

    def _used(self) -> float:
        """Share of the spool's limit; 0 when nobody can tell."""
        running = tap.current(self._home, self._uuid)
        return tiers.share(running.control(1.0) if running is not None and running.control_socket else None)
