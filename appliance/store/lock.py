"""Locks as objects in the repository, so that they hold between hosts that share nothing but the repository.

    locks/MODE.ID.NUMBER        the number grows each time the holder shows that it lives; objects never change

    held against    shared   maintenance   exclusive
    shared            -           -            x         captures, exports
    maintenance       -           x            x         gc and merge, which are safe beside captures
    exclusive         x           x            x

Take: put ours, list, and give way if there is one that conflicts. Whoever put later is sure to see the earlier one.

A lock is stale when its holder was a process of this very host and is dead; or, of a holder elsewhere, when the same
object has been seen for STALE seconds. That is judged by change and by our own monotonic clock, remembered in the cache
folder; no two clocks are ever compared, so a stepped or wrong clock cannot make anybody lose a lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from appliance.errors import Locked, ObjectNotFound, StoreError
from appliance.store.backend.base import Backend
from appliance.units import format_duration

__all__ = ["PREFIX", "REFRESH", "STALE", "Holder", "Lock", "Locks"]

PREFIX: Final = "locks/"
REFRESH: Final = 20.0
# Six refreshes: a holder that cannot reach the repository for so long cannot work in it either.
STALE: Final = 120.0
_CONFLICTS: Final = {
    "shared": {"exclusive"},
    "maintenance": {"maintenance", "exclusive"},
    "exclusive": {"shared", "maintenance", "exclusive"},
}
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Holder:
    """A lock that somebody holds; `name` is of its present object."""

    id: str
    mode: str
    name: str
    text: str


class Locks:
    """The locks of one repository as this process sees them. Thread-safe: its state is the file of sightings."""

    def __init__(self, backend: Backend, cache: Path, stale: float = STALE, refresh: float = REFRESH) -> None:
        self._backend = backend
        self._seen_file = cache / "locks-seen.json"
        self._stale = stale
        self._refresh = refresh

    def acquire(self, mode: str, purpose: str, wait: float = 0.0) -> Lock:
        """Raises Locked, naming the holder, when a lock in the way does not go within `wait` seconds."""
        deadline = time.monotonic() + wait
        tries = _TRIES
        while True:
            lock = Lock(self._backend, mode, purpose, self._refresh)
            others = [holder for holder in self.holders() if holder.id != lock.id and holder.mode in _CONFLICTS[mode]]
            if not others:
                lock.start()
                return lock
            # Two that came at the same moment both give way and come back at different ones.
            lock.release()
            tries -= 1
            if time.monotonic() >= deadline and (wait or tries <= 0 or not _fresh_race(others, self._seen())):
                raise Locked(url=self._backend.url, holder=others[0].text, stale=format_duration(self._stale))
            time.sleep(random.uniform(0.02, 0.2))

    def holders(self) -> list[Holder]:
        """Who holds a lock now. Stale ones are removed on the way."""
        seen, now = self._seen(), time.clock_gettime(time.CLOCK_BOOTTIME)
        found: list[Holder] = []
        sightings: dict[str, float] = {}
        for info in list(self._backend.list(PREFIX)):
            mode, _, rest = info.name.removeprefix(PREFIX).partition(".")
            facts = self._facts(info.name)
            if facts is None or mode not in _CONFLICTS:
                continue
            if (alive := _alive(facts)) is None:
                # Elsewhere: judged by whether it changes.
                sightings[info.name] = min(seen.get(info.name, now), now)
                alive = now - sightings[info.name] < self._stale
            if alive:
                text = f"{facts.get('purpose', '?')} (process {facts.get('pid', '?')} on {facts.get('host', '?')})"
                found.append(Holder(rest.partition(".")[0], mode, info.name, text))
            else:
                self._backend.delete(info.name)
        if sightings.keys() != seen.keys():
            self._remember(sightings)
        return found

    def _facts(self, name: str) -> dict[str, Any] | None:
        """None when it is gone; nothing known when it cannot be read as ours."""
        try:
            loaded = json.loads(self._backend.get(name))
        except ObjectNotFound:
            return None
        except ValueError:
            return {}
        return loaded if isinstance(loaded, dict) else {}

    def _seen(self) -> dict[str, float]:
        try:
            loaded = json.loads(self._seen_file.read_text())
            return dict(loaded["seen"]) if loaded["boot"] == _boot() else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _remember(self, seen: dict[str, float]) -> None:
        """Losing it, or losing a race for it, only makes a takeover later."""
        temporary = self._seen_file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps({"boot": _boot(), "seen": seen}))
            os.replace(temporary, self._seen_file)


class Lock:
    """A lock that is held from the moment it is made. A thread renews it; `lost` tells that somebody took it over,
    which happens only when it could not be renewed for long. Context manager.
    """

    def __init__(self, backend: Backend, mode: str, purpose: str, refresh: float) -> None:
        self.id = secrets.token_hex(8)
        self.mode = mode
        self.lost = False
        self._backend = backend
        self._refresh = refresh
        self._number = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._facts = {"format": 1, "mode": mode, "purpose": purpose, **_ourselves()}
        self._put()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._keep, name=f"lock-{self.id}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Idempotent. A lock that cannot be removed now goes stale."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with contextlib.suppress(StoreError):
            self._backend.delete(self._name())

    def held(self) -> bool:
        """Asks the repository. False once it was taken over."""
        if not self.lost:
            try:
                self._backend.stat(self._name())
            except ObjectNotFound:
                # The thread may just have gone to the next number.
                self.lost = not any(f".{self.id}." in info.name for info in self._backend.list(PREFIX))
        return not self.lost

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._stop.wait(self._refresh) and not self.lost:
            # A store that does not answer is asked again next time; if that lasts, the lock is lost and found so.
            with contextlib.suppress(StoreError):
                if self.held():
                    old = self._name()
                    self._number += 1
                    self._put()
                    self._backend.delete(old)

    def _put(self) -> None:
        self._backend.put(self._name(), json.dumps(self._facts).encode())

    def _name(self) -> str:
        return f"{PREFIX}{self.mode}.{self.id}.{self._number:08d}"


def _fresh_race(others: list[Holder], seen: dict[str, float]) -> bool:
    """Whether all of them came while we were looking, so that they may be giving way as well."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return all(now - seen.get(holder.name, now) < 0.5 for holder in others)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _ourselves() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
        "boot": _boot(),
        "pids": _pid_namespace(),
    }


def _alive(facts: dict[str, Any]) -> bool | None:
    """Of a process whose number means the same here: same boot of the same host, same namespace. None: of another."""
    if not facts.get("boot") or facts["boot"] != _boot() or facts.get("pids") != _pid_namespace():
        return None
    pid = facts.get("pid")
    return isinstance(pid, int) and _started(pid) == facts.get("started")


def _started(pid: int) -> str:
    """When the process began, in ticks since boot: tells it from a later one with its number. Empty: not there, or dead
    and only not waited for by its parent yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[19] if fields[0] != "Z" else ""
    except (OSError, IndexError):
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
