"""The keeper's process: beside each revert, it outlives whoever began it.

    view       keeps one there (kept.py): a read waits for `view_timeout` at most
    QEMU       watches its process; when it dies, holds the image lock of the half-way disks
    revert     when nobody drives it any more (the verb was killed, or returned with --background), drives it

It ends when the intent says that the revert has ended. What it knows is in the state file that keeper.py describes.
The view is not killed by the keeper's death: it goes on serving, and the next keeper replaces it.

    python -m appliance.restore.keeping HOME UUID [SETTINGS]
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.process import alone, lives, process_key
from appliance.restore import intent as intents
from appliance.restore.fence import ImageLock
from appliance.restore.intent import Intent, Phase
from appliance.restore.keeper import shows, socket_path, state, view_files
from appliance.restore.kept import KeptView
from appliance.restore.resume import go_on

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer

__all__ = ["Keeper"]

_TICK = 0.1
# Tries to take over a revert that nobody drives; a failed drive is not repeated sooner than this.
_TAKE_OVER = 0.5
_AGAIN = 10.0

_log = logging.getLogger(__name__)


class Keeper:
    """One revert's keeper. `run` is its main thread; another may drive the revert."""

    def __init__(self, home: Home, uuid: str, settings: Settings, settings_file: Path = DEFAULT_SETTINGS) -> None:
        self._home, self._uuid, self._settings = home, uuid, settings
        self._settings_file = settings_file
        self._folder = home.revert(uuid)
        self._view = KeptView(uuid, self._make_view, socket_path(home, uuid), settings.view_timeout)
        self._intent: Intent | None = None
        self._lock: ImageLock | None = None
        self._qemu: int | None = None
        self._qemu_key = ""
        self._driver: threading.Thread | None = None
        self._next_try = time.monotonic() + _TAKE_OVER
        self._written: dict[str, Any] = {}

    def run(self) -> None:
        """Until the revert has ended. Returns at once if there is another keeper."""
        with alone(self._folder / "keeper.lock") as first:
            if not first:
                return
            before = state(self._home, self._uuid)
            self._view.inherit(int(before.get("slot", 0)), int(before.get("served", 0)))
            self._note()
            while (intent := intents.load(self._home, self._uuid)) is not None and not intent.ended:
                self._intent = intent
                self._view.tend(shows(intent))
                self._guard(intent)
                self._take_over()
                self._note()
                time.sleep(_TICK)
            if self._driver is not None:
                self._driver.join()
            # First: the domain may be started from now on, and ending the view takes a moment.
            self._let_go_of_images()
            self._view.stop()

    def _note(self) -> None:
        now = {
            "key": process_key(os.getpid()), "shows": self._view.shows, "view": self._view.key,
            "holds": self._lock is not None, "served": self._view.served, "error": self._view.error,
            "slot": self._view.slot,
        }  # fmt: skip
        if now == self._written:
            return
        temporary = self._folder / ".keeper.json"
        try:
            temporary.write_text(json.dumps(now))
            temporary.replace(self._folder / "keeper.json")
            self._written = now
        except OSError as error:  # a full disk must not take the view and the image lock with it
            _log.warning("cannot write down what is kept for %s: %s", self._uuid, error)

    # --- the view ---

    def _make_view(self, socket: Path) -> ViewServer:
        from appliance.restore.export import ViewServer
        from appliance.store import RepositorySpec

        assert self._intent is not None, "views are made for the intent that was read last"
        intent = self._intent
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
            {disk.target: disk.safety if intent.rolling_back else disk.wanted for disk in intent.disks},
            pending={target: path for target, path in pending.items() if path.exists()},
            socket=socket,
            owner=intent.owner,
            cache=self._settings.view_cache,
            log=self._home.log / "view.log",
            die_with_parent=False,
        )

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
        with intents.drive_lock(self._home, self._uuid) as ours:
            if not ours:
                return
            try:
                go_on(self._home, self._settings, self._uuid, settings_file=self._settings_file)
            except Exception as error:  # noqa: BLE001 -- a keeper that ends takes the view with it
                self._next_try = time.monotonic() + _AGAIN
                _log.warning("cannot end the revert now: %s", error)


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
