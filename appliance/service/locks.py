"""One verb at a time on each domain of a home: the daemon and a person at the keyboard must not collide.

The lock is `flock` on HOME/domains/UUID.lock, so that it is gone the moment its holder is, however it died. The file's
text names the holder for those who wait; nothing decides by that text.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from appliance.config import Home
from appliance.errors import Locked

__all__ = ["GLANCE", "daemon_lock", "hold", "holder", "taken"]

_POLL = 0.05
# `taken` takes the lock for an instant to see whether it is free; nobody shall be refused because of that.
GLANCE = 0.3


@contextmanager
def hold(home: Home, uuid: str, domain: str, purpose: str, wait: float, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the domain. Waits up to `wait` seconds and tells through `say` whom for; then raises Locked with the
    holder's name. Threads of one process exclude each other as well."""
    path = _path(home, uuid)
    with _open(path) as handle:
        with _open(path.with_suffix(".turn")) as turn:
            _await(turn, handle, path, domain, wait, say)
        # Local, as every other time that people are shown.
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        text = {"pid": os.getpid(), "purpose": purpose, "since": since}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(text).encode(), 0)
        try:
            yield
        finally:
            # Emptied before it is let go: a name without a lock would mislead. The file stays, or two could hold it.
            os.ftruncate(handle, 0)


@contextmanager
def _open(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)


def holder(home: Home, uuid: str) -> str | None:
    """Who holds the domain now, in words, or None."""
    return _name(_path(home, uuid)) if taken(_path(home, uuid)) else None


def taken(path: Path) -> bool:
    """Whether somebody holds the lock now. It is shared for an instant: others who look do not meet us."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def daemon_lock(home: Home) -> Path:
    """Held by the daemon of this home."""
    return home.path / "daemon.lock"


def _path(home: Home, uuid: str) -> Path:
    return home.domains / f"{uuid}.lock"


def _take(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return False
        raise
    return True


def _await(turn: int, handle: int, path: Path, domain: str, wait: float, say: Callable[[str], None]) -> None:
    """First the turn, then the lock: whoever waits has the turn, so that a daemon that lets go for a moment only, with
    the next point due, comes after a person who waits."""
    end = time.monotonic() + max(wait, GLANCE)
    if _take(turn) and _take(handle):
        return
    if wait > 0:
        say(f"waiting for {_name(path)}")
    while not (_take(turn) and _take(handle)):
        if time.monotonic() >= end:
            hint = "try again when it has ended, or give --wait"
            raise Locked(url=f"domain {domain!r}", holder=_name(path), hint=hint)
        time.sleep(_POLL)


def _name(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"`rewind {held['purpose']}` (process {held['pid']}, since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and writing the name.
        return "another rewind"
