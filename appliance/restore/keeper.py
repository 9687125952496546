"""The keeper of a revert, for whoever needs it: a small process that outlives whoever began the revert (keeping.py).

    ensure                  one lives, and its view shows what the intent wants
    socket_path, served     where the view is, and how much views have served so far
    image_lock_released     it lets go of the images while we open them ourselves
    wait_gone               it has ended

What it knows is in its state file:

    keeper.json   {"key": its process, "shows": "wanted" | "safety" | "", "view": process of the view,
                   "holds": has the image lock, "served": bytes by earlier views, "error": why there is no view,
                   "slot": names the files of the next view}
    release       made by a driver that is about to open the images itself: its process

A *process key* is pid and start time, since a pid alone may belong to somebody else by now.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings
from appliance.errors import NotRecoverable, RestoreError, RewindError
from appliance.process import Child, lives, process_key
from appliance.restore.intent import Intent
from appliance.restore.kept import served_bytes

__all__ = [
    "ensure", "image_lock_released", "lives", "process_key", "served", "shows", "socket_path", "state", "view_files",
    "wait_gone",
]  # fmt: skip

_TICK = 0.1
# A view that cannot be started at all (no repository, no key) is not for the keeper to solve.
_NO_VIEW = 30.0


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
        [sys.executable, "-m", "appliance.restore.keeping", home.path, intent.uuid, settings_file],
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
    return before + served_bytes(stats)


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
