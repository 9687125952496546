"""A view that a guest reads and that is always there: pinged, replaced when it dies or hangs, found at one path.

    start    the next view begins at a path of its own …
    place    … and takes the place of the one before by rename, so that nobody who connects meets neither …
    kill     … which only then is killed. Killed and not asked to end: that would answer QEMU with errors

QEMU tries again at once when its connection breaks, and then only after 1, 2, 4 seconds: hence this order. Views do not
die with their owner, who may be killed at any moment; the next one finds them by the sockets they were started with.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.errors import RewindError
from appliance.process import lives, process_key

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer

__all__ = ["KeptView", "holders", "kill", "served_bytes", "socket_of", "views_of"]

_AGAIN = 1.0

_log = logging.getLogger(__name__)


class KeptView:
    """`make(socket)` gives a view that was not started, which answers at `socket`. `place` is where QEMU finds it.

    `tend` and `stop` belong to one thread; any may read `key` and `error`. A second one of ours pings.
    """

    def __init__(self, name: str, make: Callable[[Path], ViewServer], place: Path, timeout: float) -> None:
        """`timeout`: seconds for which a read may wait; a view that is silent for half of it is replaced."""
        self._name, self._make, self._place, self._timeout = name, make, place, timeout
        self._view: ViewServer | None = None
        self._shows = ""
        self._seen = 0.0  # when the view last answered
        self._next_start = 0.0
        self._inherited: list[str] = []
        self._pinging: threading.Thread | None = None
        self.slot = 0  # names the next view's files, so that two can be there at once
        self.served = 0  # bytes, by views that have ended
        self.error = ""

    def inherit(self, slot: int, served: int) -> None:
        """Begin with what the owner before had noted, and with the views that it left."""
        self.slot, self.served = slot, served
        self._inherited = views_of(self._place)

    def _socket(self, slot: int) -> Path:
        return socket_of(self._place, slot)

    @property
    def key(self) -> str:
        """Of its process; empty when there is none."""
        view = self._view  # its own thread may be ending it
        return process_key(view.pid) if view is not None and view.alive() else ""

    @property
    def shows(self) -> str:
        """What the view that is there was last told to show; empty when there is none."""
        return self._shows if self.key else ""

    def tend(self, wanted: str) -> None:
        """Make sure that there is a view which shows `wanted` (a word of the caller). To be called again and again; a
        view that cannot be started is tried again after a second, and `error` tells why."""
        if self._pinging is None:
            self._pinging = threading.Thread(target=self._ping, name="ping", daemon=True)
            self._pinging.start()
        if self._view is not None and self._shows == wanted and self._view.alive():
            if time.monotonic() - self._seen < self._timeout / 2:
                self.error = ""
                return
            _log.warning("the view of %s does not answer: another takes its place", self._name)
        if time.monotonic() >= self._next_start:
            self._start(wanted)

    def _start(self, wanted: str) -> None:
        view, self.error = None, ""
        try:
            view = self._make(self._socket(self.slot))
            view.start()
            view.take_place(self._place)
        except (RewindError, OSError) as error:  # its files are in the home, which may be full
            if view is not None:
                view.kill()
            self.error = str(error)
            self._next_start = time.monotonic() + _AGAIN
            _log.warning("the view of %s does not start: %s", self._name, error)
            return  # the one before may be slow and not dead
        self._end(at_once=True, succeeded=True)
        self._drop_inherited()
        self._seen = time.monotonic()
        self._view, self._shows, self.slot = view, wanted, 1 - self.slot

    def stop(self) -> None:
        """Nobody reads any more: end it, and what was inherited."""
        self._end()
        self._drop_inherited()

    def _end(self, at_once: bool = False, succeeded: bool = False) -> None:
        view, self._view = self._view, None
        if view is None:
            return
        if at_once or not view.alive():
            view.kill(succeeded=succeeded)
            stats = _last_stats(view)
        else:
            stats = view.stats()
            view.stop()
        self.served += served_bytes(stats)

    def _drop_inherited(self) -> None:
        while self._inherited:
            kill(self._inherited.pop())

    def _ping(self) -> None:
        # Reading the statistics goes through the plugin's interpreter but not to the repository: a slow repository is
        # no reason to kill a view that works on the guest's reads.
        while True:
            view = self._view
            if view is not None:
                with contextlib.suppress(RewindError, OSError, ValueError):
                    if view.answers(self._timeout / 2) and view.stats():
                        self._seen = time.monotonic()
            time.sleep(self._timeout / 10)


def served_bytes(stats: dict[str, Any]) -> int:
    """Of all exports, from a view's statistics."""
    return sum(int(one.get("bytes", 0)) for one in stats.get("exports", {}).values())


def kill(key: str) -> None:
    """Kill the process of that key, if it is still the same one."""
    with contextlib.suppress(OSError, ValueError):
        pidfd = os.pidfd_open(int(key.partition(":")[0]))
        try:
            if lives(key):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], 5)
        finally:
            os.close(pidfd)


def socket_of(place: Path, slot: int) -> Path:
    """Where the view of that slot begins, before it takes its place. Named for the place: others share the folder."""
    return place.with_name(f"{place.stem}-{slot}.sock")


def views_of(place: Path) -> list[str]:
    """Keys of the nbdkit processes that were started to be found at `place`."""
    wanted = {b"--unix=" + os.fsencode(socket_of(place, slot)) for slot in (0, 1)}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if wanted & set((entry / "cmdline").read_bytes().split(b"\0")):
                    found.append(process_key(int(entry.name)))
    return found


def holders(path: Path) -> list[str]:
    """Keys of the processes, but for ours, that hold a lock on that file (`process.alone`), and not of those that only
    read it, as a backup does."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
                if any(_locks(handle, path) for handle in (entry / "fd").iterdir()):
                    found.append(process_key(int(entry.name)))
    return found


def _locks(handle: Path, path: Path) -> bool:
    """The kernel tells of each open file which locks it has: /proc/locks would have to be matched by numbers, which are
    not everywhere the ones that stat tells."""
    try:
        if os.readlink(handle) != os.path.realpath(path):
            return False
        return "FLOCK" in (handle.parents[1] / "fdinfo" / handle.name).read_text()
    except OSError:  # it was closed meanwhile
        return False


def _last_stats(view: ViewServer) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(view.stats_file.read_text())
    except (OSError, ValueError):
        return {}
    return found
