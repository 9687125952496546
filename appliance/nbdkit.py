"""One nbdkit process with one of our plugins, on a unix socket.

Two plugins (`filters/intake`, `filters/view`) are thin: the work is in `appliance.*`, which the interpreter inside
nbdkit imports from where we run. That interpreter is the distribution's, the one our environment is made from. The
third (`filters/journal`) is compiled and needs nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket as sockets
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from appliance.errors import ConfigError, ToolFailed
from appliance.process import Child

__all__ = ["PLUGINS", "Server", "keep_thread", "last_words", "settle_parents_death"]

PLUGINS = Path(__file__).resolve().parent.parent / "filters"

# nbdkit 1.32 (not 1.42) asks for SIGTERM at its parent's death, also without `--exit-with-parent`, and so undoes what
# was asked for when it was forked. That would end a view that has to live on, with an error for every read of a guest
# under way; and it does not end a server that is stopped or hangs. Our plugins put it right, by this variable.
_PARENT_DIED = "REWIND_PARENT_DIED"
_PR_SET_PDEATHSIG = 1

# Threads that keep their state in the interpreter. Those of a closed connection leave theirs behind, some 20 KiB each:
# beyond this number the threads of a server that has seen many connections are only slower.
_MOST_KEPT = 64
_kept = 0
_thread = threading.local()

# sockaddr_un: the kernel takes no longer path.
_LONGEST_SOCKET = 107
# What a server says first, without its flags; and how a client says at once that it wants nothing.
_GREETING = b"NBDMAGICIHAVEOPT"
_GOODBYE = b"\0\0\0\1IHAVEOPT\0\0\0\2\0\0\0\0"


class Server:
    """nbdkit in the foreground under our own eyes: it dies with us, its messages are in `log`.

    `plugin` is the name of a Python one, or the path of a compiled one. `owner` (uid, gid) is who may connect, for QEMU
    runs as another user; the socket's mode is 0600. `nice` below 0 is asked for, and gone without where it is not
    granted. Any thread may call everything here.
    """

    def __init__(
        self,
        plugin: str | Path,
        socket: Path,
        parameters: Mapping[str, str | os.PathLike[str]] | Sequence[tuple[str, str | os.PathLike[str]]],
        *,
        filters: Sequence[str] = (),
        threads: int = 4,
        owner: tuple[int, int] | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        die_with_parent: bool = True,
        nice: int = 0,
    ) -> None:
        if len(os.fsencode(socket)) > _LONGEST_SOCKET:
            raise ConfigError(reason=f"the path of socket {socket} is longer than {_LONGEST_SOCKET} bytes")
        self.socket = socket
        self._owner = owner
        compiled = isinstance(plugin, Path)
        self._name = plugin.stem if isinstance(plugin, Path) else f"nbdkit-{plugin}"
        pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
        self._argv: list[str | os.PathLike[str]] = [
            *(["nice", "-n", str(nice)] if nice else []),  # by itself, for all of its threads from the first one on
            "nbdkit", "--foreground", "--newstyle", f"--unix={socket}", f"--threads={threads}",
            *(f"--filter={name}" for name in filters),
            *([plugin] if compiled else ["python", PLUGINS / plugin / "plugin.py"]),
            *(f"{key}={os.fspath(value)}" for key, value in pairs),
        ]  # fmt: skip
        self._log = log
        died = str(int(signal.SIGKILL) if die_with_parent else 0)
        self._env = _environment({**(env or {}), _PARENT_DIED: died})
        self._pass_fds = pass_fds
        self._die_with_parent = die_with_parent
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the running process. Raises ToolFailed when it was not started."""
        return self._running().pid

    def start(self, timeout: float = 20.0) -> None:
        """Start it and wait until it greets clients. Raises ToolFailed with its last words; nothing runs then."""
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()  # a killed one leaves its socket, and nbdkit does not take an existing path
        for descriptor in self._pass_fds:
            with contextlib.suppress(OSError):
                os.lseek(descriptor, 0, os.SEEK_SET)  # the one before may have read it to its end
        self._child = Child(
            self._argv,
            name=self._name,
            log=self._log,
            env=self._env,
            pass_fds=self._pass_fds,
            die_with_parent=self._die_with_parent,
        )
        try:
            self._await_ready(time.monotonic() + timeout)
            self._hand_over()
        except BaseException:  # also Ctrl-C: nobody would end it
            self._child.kill()
            raise

    def take_place(self, path: Path) -> None:
        """Be found at `path` from now on, in place of whatever was found there: nobody who connects meets neither.
        Raises ToolFailed; it is found where it was then."""
        try:
            self.socket.replace(path)
        except OSError as error:
            raise ToolFailed(tool=self._name, reason=f"its socket cannot be at {path}: {error}") from error
        self.socket = path

    def alive(self) -> bool:
        """Whether the process is there; it may hang: see `answers`."""
        return self._child is not None and self._child.alive()

    def answers(self, timeout: float) -> bool:
        """Whether it greets a new client within `timeout` seconds; a stopped or hung one does not."""
        try:
            with sockets.socket(sockets.AF_UNIX) as client:
                client.settimeout(timeout)
                client.connect(os.fspath(self.socket))
                greeted = client.recv(len(_GREETING) + 2).startswith(_GREETING)
                client.sendall(_GOODBYE)
                client.recv(20)  # its answer: a client that just leaves is an error in the server's log
                return greeted
        except OSError:
            return False

    def stop(self, grace: float = 5.0, patience: float | None = None) -> None:
        """End it in order, kill it after `grace` seconds. May be repeated, also when it was not started. Raises as
        `process.Child.kill`."""
        if self._child is not None:
            self._child.stop(grace, patience)
            self._forget_socket()

    def kill(self, *, succeeded: bool = False) -> None:
        """End it at once, whatever it does. May be repeated, also when it was not started. `succeeded`: its socket's
        path is another's by now."""
        if self._child is not None:
            self._child.kill()
            if not succeeded:
                self._forget_socket()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it has ended."""
        self._running().signal(number)

    def tail(self) -> str:
        """Its last words."""
        return self._child.tail() if self._child is not None else ""

    def _running(self) -> Child:
        if self._child is None:
            raise ToolFailed(tool=self._name, reason="it was not started")
        return self._child

    def _await_ready(self, deadline: float) -> None:
        while not (self.socket.exists() and self.answers(max(0.05, deadline - time.monotonic()))):
            if not self.alive():
                raise ToolFailed(tool=self._name, reason=self.tail() or "it ended without a word")
            if time.monotonic() > deadline:
                raise ToolFailed(tool=self._name, reason=f"it does not answer at {self.socket}: {self.tail()}")
            time.sleep(0.01)

    def _hand_over(self) -> None:
        self.socket.chmod(0o600)
        if self._owner is not None:
            os.chown(self.socket, *self._owner)

    def _forget_socket(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()


def settle_parents_death() -> None:
    """For plugins, in `get_ready` and thus in nbdkit's main thread, the one it holds for: what happens to this process
    when its parent dies is what the parent wanted."""
    if number := os.environ.get(_PARENT_DIED):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def keep_thread() -> None:
    """For plugins, first in whatever is called for every request: let the calling thread keep its Python state.

    nbdkit calls each time as from a thread that the interpreter has never seen. It then makes a state and a stack of
    frames (mmap) and throws both away (munmap, which interrupts every other thread of the process): a fifth of all the
    work on a request of 64 KiB. One `PyGILState_Ensure` that is never released is what makes the state stay.
    """
    global _kept
    if getattr(_thread, "kept", False):
        return
    if _kept < _MOST_KEPT:
        _kept += 1
        ctypes.pythonapi.PyGILState_Ensure()
        _thread.kept = True


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    # The interpreter inside nbdkit knows nothing of a virtual environment: it is told where we found our modules.
    places = [str(PLUGINS.parent), *(place for place in sys.path if place)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)),
        "PYTHONUNBUFFERED": "1",
        # nbdkit has dozens of threads, and the C library a heap for each: a tenth of the memory for no gain.
        "MALLOC_ARENA_MAX": "2",
        **extra,
    }


def last_words(said: str) -> str:
    """The last line of what a server of ours said, without the class that Python names in front of an error's text."""
    return re.sub(r"^.*?\bappliance(\.\w+)+: *", "", said.rpartition("\n")[2]).strip()
