"""A tiny process beside us that puts a guest right if we are killed: resumed, thawed, nothing of ours in its graph.

    we     armed ── pausing ── resumed ── freezing ── thawed ── … ── disarmed
              └──────────── one byte each through a pipe ──────────────┘
    guard     end of file while armed  ⇒  take the domain's lock, clean, resume what we paused, thaw what we froze

An error that leaves the guest paused or frozen behind (libvirt was away too long, a second Ctrl-C) closes the pipe as
well. A file UUID.paused beside the lock stands for as long as the guest is paused by us: whoever works on the domain
next resumes it, should the guard be gone too.

It has connected to the hypervisor before anything is paused, so that a guest whose tamer was killed in the pause waits
some 100 ms and not for a Python to start. One guard serves all epochs of a domain in one process, and ends with it. It
takes the same locks as every verb does, of the home and of the host, so it never cleans under another process that has
gone on in the meantime.

It cannot help when it is killed together with us; then the next epoch cleans up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import ConnectError, DomainLost, RewindError
from appliance.process import Child

if TYPE_CHECKING:
    from appliance.hypervisor.base import Domain

__all__ = ["Guard", "guarding", "paused_mark"]

_READY_TIMEOUT = 10.0
_LOCK_TIMEOUT = 60.0
# A hypervisor that is away when it is needed: its daemon is being upgraded, say.
_AWAY_TIMEOUT = 600.0

_ARMED, _DISARMED, _PAUSING, _RESUMED, _FREEZING, _THAWED = b"A", b"D", b"P", b"R", b"F", b"T"

_lock = threading.Lock()  # guards the table
_guards: dict[tuple[str, str, tuple[str, ...]], Guard] = {}


def paused_mark(lock: Path) -> Path:
    """The file that says of a paused guest that it is we who paused it."""
    return lock.with_suffix(".paused")


class Guard:
    """Our end. Used by one thread at a time; a guard that has died is no error, only less safety."""

    def __init__(self, uri: str, uuid: str, lock: Path, log: Path | None = None, host: tuple[str, ...] = ()) -> None:
        """Start it; it gets ready beside."""
        self._mark = paused_mark(lock)
        self._owed: set[bytes] = set()  # what we have done to the guest and have not undone
        read, self._write = os.pipe2(os.O_CLOEXEC)
        ready, write_ready = os.pipe2(os.O_CLOEXEC)
        self._ready: int | None = ready
        try:
            root = str(Path(__file__).resolve().parent.parent.parent)
            words = [
                sys.executable,
                "-m",
                "appliance.hypervisor.guard",
                uri,
                uuid,
                str(lock),
                str(read),
                str(write_ready),
                *host,
            ]
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
            self._child = Child(
                words, name="guard", log=log, env=env, pass_fds=(read, write_ready), die_with_parent=False
            )
        finally:
            os.close(read)
            os.close(write_ready)

    def alive(self) -> bool:
        return self._child.alive()

    def await_ready(self) -> None:
        """Wait until it has connected, or has failed to: it is a helper, not a condition."""
        if self._ready is not None:
            import select

            ready = select.poll()  # unlike select, also for descriptors beyond 1023
            ready.register(self._ready, select.POLLIN)
            ready.poll(_READY_TIMEOUT * 1000)
            os.close(self._ready)
            self._ready = None

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._write, word)

    def armed(self) -> None:
        self._tell(_ARMED)

    def disarmed(self) -> None:
        self._tell(_DISARMED)

    def pausing(self, running: bool) -> None:
        """Just before `stop`; a guest that did not run is not ours to resume."""
        if running:
            self._owed.add(_PAUSING)
            with contextlib.suppress(OSError):
                self._mark.touch()
            self._tell(_PAUSING)

    def resumed(self) -> None:
        with contextlib.suppress(OSError):
            self._mark.unlink(missing_ok=True)
        self._owed.discard(_PAUSING)
        self._tell(_RESUMED)

    def freezing(self) -> None:
        self._owed.add(_FREEZING)
        self._tell(_FREEZING)

    def thawed(self) -> None:
        self._owed.discard(_FREEZING)
        self._tell(_THAWED)

    @property
    def owes(self) -> bool:
        """Whether the guest is still paused or frozen by us."""
        return bool(self._owed)

    def leave(self) -> None:
        """Let it act now, as if we had died: it does so when the domain's lock is free."""
        os.close(self._write)

    def close(self) -> None:
        """It ends by itself when the pipe closes."""
        os.close(self._write)
        self._child.stop(2)


@contextlib.contextmanager
def guarding(uri: str, uuid: str, lock: Path, log: Path | None = None, host: tuple[str, ...] = ()) -> Iterator[Guard]:
    """A guard that is armed for the block. `lock` is the file that every verb on this domain holds by flock, `host` the
    names of the locks that keep other homes away (see `hostlock`)."""
    key = (uri, uuid, host)
    with _lock:
        guard = _guards.get(key)
        if guard is None or not guard.alive():
            # The names of images are in the key: after a snapshot there would be one guard more for each.
            for old in [one for one in _guards if one[:2] == key[:2]]:
                _guards.pop(old).close()
            guard = _guards[key] = Guard(uri, uuid, lock, log, host)
    guard.armed()
    try:
        yield guard
    finally:
        if guard.owes:
            with _lock:
                _guards.pop(key, None)
            guard.leave()
        else:
            # Also after an error: whoever could handle it has done so by now, and the admin sees it.
            guard.disarmed()


# The other end


def main(uri: str, uuid: str, lock: str, pipe: str, ready: str, *host: str) -> None:
    """Wait for the end of the pipe; then, if we were armed, put the guest right."""
    from appliance.hypervisor import connect, hostlock

    hypervisor = connect(uri)
    # Now: everything that is imported, looked up or opened later would cost the guest time.
    from appliance.hypervisor.graph import base, tap  # noqa: F401

    domain = hypervisor.domain(uuid)
    os.close(int(ready))
    said = _listen(int(pipe))
    if _ARMED not in said:
        hypervisor.close()
        return
    if _FREEZING in said and _PAUSING not in said:
        domain.thaw(10)  # at once: nobody else's freeze can be under way yet
    with open(lock, "a") as file:
        # Whoever holds it for so long has cleaned up himself, and must not be cleaned up under.
        if _hold(file.fileno()):
            home = Path(lock).parent.parent
            # Another home that came first has cleaned up; the guest that we paused is still ours to resume, after it.
            with hostlock.hold(host, uuid, home, "guard", _AWAY_TIMEOUT):
                _put_right(domain, _PAUSING in said)
            paused_mark(Path(lock)).unlink(missing_ok=True)
    if _FREEZING in said and _PAUSING in said:
        domain.thaw(10)
    hypervisor.close()


def _put_right(domain: Domain, resume: bool) -> None:
    from appliance.hypervisor.base import DomainState
    from appliance.hypervisor.graph import base

    limit = time.monotonic() + _AWAY_TIMEOUT
    while True:
        try:
            if domain.state() is not DomainState.SHUTOFF:
                base.clean(domain.monitor(), prefix=base.EPOCH, resume=resume)
            return
        except (ConnectError, DomainLost):
            # A domain that is really gone is found shut off.
            if time.monotonic() > limit:
                raise
            time.sleep(0.5)


def _listen(pipe: int) -> set[bytes]:
    said: set[bytes] = set()
    undone = {_RESUMED: _PAUSING, _THAWED: _FREEZING}
    while word := os.read(pipe, 1):
        if word == _DISARMED:
            said.clear()
        elif word in undone:
            said.discard(undone[word])
        else:
            said.add(word)
    return said


def _hold(descriptor: int) -> bool:
    limit = time.monotonic() + _LOCK_TIMEOUT
    while time.monotonic() < limit:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.01)
    return False


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except RewindError as error:
        print(f"guard: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
