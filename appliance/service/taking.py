"""Points that the tap process takes, in a thread beside: the first one may take an hour, and what is recorded has to be
seen meanwhile. At most one at a time, and none sooner after the last try than it is told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.config import Home
from appliance.errors import RewindError
from appliance.service.protection import point
from appliance.service.session import Session

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.model import Point
    from appliance.store import Key

__all__ = ["Taking"]

_WAIT = 30.0  # for whoever works on the domain

_log = logging.getLogger(__name__)


class Taking:
    """Used by one thread."""

    def __init__(self, home: Home, settings_file: Path, key: Key | None) -> None:
        self._home, self._settings_file, self._key = home, settings_file, key
        self._thread: threading.Thread | None = None
        self._tried = float("-inf")

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def since(self) -> float:
        """Seconds since the last try began; infinite before the first."""
        return time.monotonic() - self._tried

    def anew(self) -> None:
        """The next point need not wait for anything."""
        self._tried = float("-inf")

    def begin(self, record: Protection, reason: str, pause: float, done: Callable[[Point | None], None]) -> None:
        """Begin one, unless one is being taken or the last try began less than `pause` seconds ago. `done` is called
        in the other thread at the end: with the point, or with None when there is none."""
        if self.busy() or self.since() < pause:
            return
        self._tried = time.monotonic()
        self._thread = threading.Thread(target=self._take, args=(record, reason, done), name="point", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for one that is being taken."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _take(self, record: Protection, reason: str, done: Callable[[Point | None], None]) -> None:
        made = None
        try:
            with Session(self._home, settings_file=self._settings_file, key=self._key) as session:
                made = point(session, record.uuid, reason=reason, wait=_WAIT)
            _log.info("point %s: %d bytes moved", made.id, made.stats.moved_bytes)
        except RewindError as error:
            _log.warning("no point: %s", error)
        except Exception:  # noqa: BLE001 -- the thread ends here, and the next try is by the clock
            _log.exception("no point")
        finally:
            done(made)
