"""The keeper: a small process beside each revert that outlives whoever began it.

    view       runs the view as its child, pings it, kills one that hangs, starts it again: within `view_timeout`
    QEMU       watches its process; when it dies, holds the image lock of the half-way disks
    revert     when nobody drives it any more (the verb was killed, or returned with --background), drives it

It ends when the intent says that the revert has ended. What it knows is in its state file, for whoever needs the view:

    keeper.json   {"key": its process, "shows": "wanted" | "safety" | "", "view": process of the view,
                   "holds": has the image lock, "served": bytes by earlier views, "error": why there is no view,
                   "slot": names the files of the next view}
    release       made by a driver that is about to open the images itself: its process

A *process key* is pid and start time, since a pid alone may belong to somebody else by now. The view is not killed by
the keeper's death: it goes on serving, and the next keeper replaces it.

    python -m appliance.restore.keeper HOME UUID [SETTINGS]
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.errors import NotRecoverable, RestoreError, RewindError
from appliance.process import Child, alone, lives, process_key
from appliance.restore import intent as intents
from appliance.restore.fence import ImageLock
from appliance.restore.intent import Intent, Phase

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer

__all__ = [
    "Keeper", "ensure", "image_lock_released", "lives", "process_key", "served", "socket_path", "state", "view_files",
    "wait_gone",
]  # fmt: skip

_TICK = 0.1
# Tries to take over a revert that nobody drives; a failed drive is not repeated sooner than this.
_TAKE_OVER = 0.5
_AGAIN = 10.0
# A view that cannot be started at all (no repository, no key) is not for the keeper to solve.
_NO_VIEW = 30.0

_log = logging.getLogger(__name__)


# --- for everybody --------------------------------------------------------------------------------------------------


def socket_path(home: Home, uuid: str) -> Path:
    """Where QEMU finds the view: its folder can be passed through by QEMU's user."""
    return home.run(uuid) / "revert.sock"


def view_files(home: Home, uuid: str, target: str) -> Path:
    """The pending chunks of a disk, for the view's look-ahead."""
    return home.revert(uuid) / f"pending-{target}"


def state(home: Home, uuid: str) -> dict[str, Any]:
    """The keeper's state file; empty if there is none."""
    try:
        found: dict[str, Any] = json.loads((home.revert(uuid) / "keeper.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def shows(intent: Intent) -> str:
    """Which instant the view has to show."""
    return "safety" if intent.rolling_back else "wanted"


def ensure(home: Home, intent: Intent, settings: Settings, settings_file: Path = DEFAULT_SETTINGS) -> None:
    """Return when a keeper lives and its view shows what the intent wants; start one if there is none.

    Raises NotRecoverable with the view's last words when there is no view after 30 seconds.
    """
    deadline = time.monotonic() + _NO_VIEW
    while True:
        found = state(home, intent.uuid)
        if not lives(found.get("key", "")):
            _launch(home, intent, settings_file)
        elif found.get("shows") == shows(intent) and lives(found.get("view", "")):
            return
        if time.monotonic() > deadline:
            wanted = intent.safety_point if intent.rolling_back else intent.point
            raise NotRecoverable(point=wanted, reason=found.get("error") or "its view does not start")
        time.sleep(_TICK)


def wait_gone(home: Home, uuid: str, timeout: float = 15.0) -> bool:
    """Whether the keeper of an ended revert has gone within the time: two would quarrel about one socket."""
    deadline = time.monotonic() + timeout
    while lives(state(home, uuid).get("key", "")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _launch(home: Home, intent: Intent, settings_file: Path) -> None:
    key_fd = json.loads(intent.repository).get("key_fd")
    child = Child(
        [sys.executable, "-m", "appliance.restore.keeper", home.path, intent.uuid, settings_file],
        name="keeper",
        log=home.log / "keeper.log",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in _places() if place)},
        pass_fds=() if key_fd is None else (key_fd,),
        die_with_parent=False,
    )
    deadline = time.monotonic() + 10
    while child.alive() and state(home, intent.uuid).get("key") != process_key(child.pid):
        if time.monotonic() > deadline:
            raise RestoreError(reason=f"the keeper of {intent.domain!r} does not start: {child.tail()}")
        time.sleep(0.02)
    child.leave()


def _places() -> list[str]:
    return [str(Path(__file__).resolve().parents[2]), *sys.path]


def served(home: Home, uuid: str) -> int:
    """Bytes that views of this revert have served so far."""
    from appliance import nbd
    from appliance.restore.export import STATS_EXPORT

    before = int(state(home, uuid).get("served", 0))
    try:
        with nbd.connect(socket_path(home, uuid), STATS_EXPORT, contexts=()) as connection:
            stats = json.loads(bytes(connection.pread(connection.size(), 0)))
    except RewindError:
        return before
    return before + _bytes(stats)


def _bytes(stats: dict[str, Any]) -> int:
    return sum(int(one.get("bytes", 0)) for one in stats.get("exports", {}).values())


@contextlib.contextmanager
def image_lock_released(home: Home, intent: Intent) -> Iterator[None]:
    """While we open the images ourselves, the keeper lets go of their lock. It takes it again afterwards, or when this
    process dies."""
    path = home.revert(intent.uuid) / "release"
    path.write_text(process_key(os.getpid()))
    try:
        deadline = time.monotonic() + 5
        while (found := state(home, intent.uuid)).get("holds") and lives(found.get("key", "")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        yield
    finally:
        path.unlink(missing_ok=True)


# --- the process ----------------------------------------------------------------------------------------------------


class Keeper:
    """One revert's keeper. `run` is its main thread; a second one pings the view, a third may drive the revert."""

    def __init__(self, home: Home, uuid: str, settings: Settings, settings_file: Path = DEFAULT_SETTINGS) -> None:
        self._home, self._uuid, self._settings = home, uuid, settings
        self._settings_file = settings_file
        self._folder = home.revert(uuid)
        self._view: ViewServer | None = None
        self._shows = ""
        self._seen = 0.0  # when the view last answered
        self._error = ""
        self._inherited = ""  # the view of a keeper that has died
        self._slot = 0  # names the next view's files, so that two can be there at once
        self._served = 0
        self._lock: ImageLock | None = None
        self._qemu: int | None = None
        self._qemu_key = ""
        self._driver: threading.Thread | None = None
        self._next_try = time.monotonic() + _TAKE_OVER
        self._written: dict[str, Any] = {}
        self._next_start = 0.0

    def run(self) -> None:
        """Until the revert has ended. Returns at once if there is another keeper."""
        with alone(self._folder / "keeper.lock") as first:
            if not first:
                return
            before = state(self._home, self._uuid)
            self._served = int(before.get("served", 0))
            self._inherited, self._slot = str(before.get("view", "")), int(before.get("slot", 0))
            self._note()
            threading.Thread(target=self._ping, name="ping", daemon=True).start()
            while (intent := intents.load(self._home, self._uuid)) is not None and not intent.ended:
                self._tend(intent)
                self._guard(intent)
                self._take_over()
                self._note()
                time.sleep(_TICK)
            if self._driver is not None:
                self._driver.join()
            # First: the domain may be started from now on, and ending the view takes a moment.
            self._let_go_of_images()
            self._stop_view()
            _kill(self._inherited)

    def _note(self) -> None:
        view = process_key(self._view.pid) if self._view is not None and self._view.alive() else ""
        now = {
            "key": process_key(os.getpid()), "shows": self._shows if view else "", "view": view,
            "holds": self._lock is not None, "served": self._served, "error": self._error, "slot": self._slot,
        }  # fmt: skip
        if now != self._written:
            temporary = self._folder / ".keeper.json"
            temporary.write_text(json.dumps(now))
            temporary.replace(self._folder / "keeper.json")
            self._written = now

    # --- the view ---

    def _tend(self, intent: Intent) -> None:
        wanted = shows(intent)
        if self._view is not None and self._shows == wanted and self._view.alive():
            if time.monotonic() - self._seen < self._settings.view_timeout / 2:
                return
            _log.warning("the view of %s does not answer: another takes its place", intent.domain)
        if time.monotonic() >= self._next_start:
            self._start_view(intent, wanted)

    def _start_view(self, intent: Intent, wanted: str) -> None:
        """The one before is killed when the new one can be found: QEMU tries again at once, and then only after 1, 2, 4
        seconds. Killed and not asked to end: that would answer QEMU with errors, which get to the guest."""
        view, self._error = None, ""
        try:
            view = self._make_view(intent, wanted)
            view.start()
            view.take_place(socket_path(self._home, self._uuid))
        except RewindError as error:
            if view is not None:
                view.kill()
            self._error = str(error)
            self._next_start = time.monotonic() + 1.0
            _log.warning("the view of %s does not start: %s", intent.domain, error)
            return  # the one before may be slow and not dead
        self._stop_view(at_once=True, succeeded=True)
        _kill(self._inherited)
        self._inherited = ""
        self._seen = time.monotonic()
        self._view, self._shows, self._slot = view, wanted, 1 - self._slot

    def _make_view(self, intent: Intent, wanted: str) -> ViewServer:
        from appliance.restore.export import ViewServer
        from appliance.store import RepositorySpec

        spec = RepositorySpec.from_json(intent.repository)
        if spec.key_fd is not None:
            os.lseek(spec.key_fd, 0, os.SEEK_SET)  # the view before this one has read it to its end
        run = self._home.run(self._uuid)
        run.mkdir(parents=True, exist_ok=True)
        run.chmod(0o711)
        pending = {disk.target: view_files(self._home, self._uuid, disk.target) for disk in intent.disks}
        return ViewServer(
            run,
            spec,
            {disk.target: disk.wanted if wanted == "wanted" else disk.safety for disk in intent.disks},
            pending={target: path for target, path in pending.items() if path.exists()},
            socket=run / f"view-{self._slot}.sock",
            owner=intent.owner,
            cache=self._settings.view_cache,
            log=self._home.log / "view.log",
            die_with_parent=False,
        )

    def _stop_view(self, at_once: bool = False, succeeded: bool = False) -> None:
        view, self._view = self._view, None
        if view is None:
            return
        if at_once or not view.alive():
            view.kill(succeeded=succeeded)
            stats = _last_stats(view)
        else:
            stats = view.stats()
            view.stop()
        self._served += _bytes(stats)

    def _ping(self) -> None:
        # Reading the statistics goes through the plugin's interpreter but not to the repository: a slow repository is
        # no reason to kill a view that works on the guest's reads.
        while True:
            view = self._view
            if view is not None:
                with contextlib.suppress(RewindError, OSError, ValueError):
                    if view.answers(self._settings.view_timeout / 2) and view.stats():
                        self._seen = time.monotonic()
            time.sleep(self._settings.view_timeout / 10)

    # --- QEMU ---

    def _guard(self, intent: Intent) -> None:
        """Hold the images' lock from QEMU's death on, except while a living driver wants them for itself."""
        if intent.phase in (Phase.PLANNED, Phase.FENCED, Phase.PIVOTED):
            self._let_go_of_images()
            return
        wanted = not self._qemu_lives(intent) and not self._wanted_by_driver()
        if wanted and self._lock is None:
            with contextlib.suppress(OSError):
                lock = ImageLock(Path(disk.source) for disk in intent.disks)
                # Whoever has them open now is not stopped by a lock, and his own restart would be.
                if lock.written_by_others():
                    lock.release()
                else:
                    self._lock = lock
        elif not wanted:
            self._let_go_of_images()

    def _let_go_of_images(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _qemu_lives(self, intent: Intent) -> bool:
        key = str(intent.extra.get("qemu", ""))
        if key != self._qemu_key:
            self._close_qemu()
            self._qemu_key = key
            with contextlib.suppress(OSError, ValueError):
                self._qemu = os.pidfd_open(int(key.partition(":")[0])) if lives(key) else None
        return self._qemu is not None and not select.select([self._qemu], [], [], 0)[0]

    def _close_qemu(self) -> None:
        if self._qemu is not None:
            os.close(self._qemu)
        self._qemu = None

    def _wanted_by_driver(self) -> bool:
        try:
            return lives((self._folder / "release").read_text())
        except OSError:
            return False

    # --- driving ---

    def _take_over(self) -> None:
        if self._driver is not None and self._driver.is_alive() or time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + _TAKE_OVER
        self._driver = threading.Thread(target=self._drive, name="driver")
        self._driver.start()

    def _drive(self) -> None:
        from appliance.restore.resume import go_on

        with intents.drive_lock(self._home, self._uuid) as ours:
            if not ours:
                return
            try:
                go_on(self._home, self._settings, self._uuid, settings_file=self._settings_file)
            except Exception as error:  # noqa: BLE001 -- a keeper that ends takes the view with it
                self._next_try = time.monotonic() + _AGAIN
                _log.warning("cannot end the revert now: %s", error)


def _kill(key: str) -> None:
    """Kill the process of that key, if it is still the same one."""
    with contextlib.suppress(OSError, ValueError):
        pidfd = os.pidfd_open(int(key.partition(":")[0]))
        try:
            if lives(key):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], 5)
        finally:
            os.close(pidfd)


def _last_stats(view: ViewServer) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(view.stats_file.read_text())
    except (OSError, ValueError):
        return {}
    return found


def main(argv: list[str]) -> int:
    """The command of the process; its log is its standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keeper %(levelname)s %(message)s")
    home = Home(Path(argv[1]))
    settings_file = Path(argv[3]) if len(argv) > 3 else DEFAULT_SETTINGS
    settings = load_settings(home, settings_file)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Keeper(home, argv[2], settings, settings_file).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
