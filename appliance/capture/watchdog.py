"""The hand that kills a journal which holds a guest up. A process of its own, so that nothing of ours can delay it.

A write of the guest waits for the journal's answer, and QEMU's main loop waits for that write as soon as anything
drains. So the journal is asked for its `status` every 50 ms over a connection that only this asks through, and killed
when for BOUND seconds

    it has not answered                   it hangs, was stopped, or its control thread cannot go on
    a record is being written             its disk is too slow: the guest would wait for as long

Killing frees QEMU at once and loses nothing that was answered. A process that is stuck in the kernel does not die
until the kernel lets it: therefore its connections are shut down as well, by descriptors taken from it beforehand.

This is run as a file and imports nothing of ours: `python -I -S watchdog.py PID:START CONTROL BOUND`. It keeps its beat
on a loaded machine by a real-time priority and locked memory where it is granted them, and goes without elsewhere. It
ends with the journal, its last line a JSON object: {"gone": true}, or {"killed": why, "after_ms": …}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # typing takes as long to import as all the rest
if TYPE_CHECKING:
    from typing import Any

BEAT = 0.05
# A wait that ended so much later than it should have (the machine slept, we were stopped): the journal may have had no
# chance either and is asked once more. Not without end: a machine that thrashes oversleeps every time.
_OVERSLEPT = 0.1
_ONCE_MORE = 2
_PIDFD_GETFD = 438
_MCL_BOTH = 3
_PRIORITY = 10


def watch(journal: int, control: str, bound: float) -> str:
    """Until the journal has ended (empty), or for what reason it has to."""
    asked = Asked(control)
    good = time.monotonic()  # the last moment at which it is known to have worked
    excused = 0
    while not _ended(journal):
        status = asked.status(journal, good + bound)
        now = time.monotonic()
        if status is None:
            if asked.overslept > _OVERSLEPT and excused < _ONCE_MORE:
                good, excused = now, excused + 1
                continue
            return "" if _ended(journal) else f"it has not answered for {(now - good) * 1000:.0f} ms"
        good, excused = now, 0
        waiting = float(status.get("unfinished_us", 0)) / 1e6
        if waiting >= bound:
            return f"a record has been on its way to the disk for {waiting * 1000:.0f} ms"
        # Neither earlier than needed nor later than promised.
        select.select([journal], [], [], max(0.001, min(BEAT, bound - waiting)))
    return ""


class Asked:
    """The connection to the control socket, made anew when it was lost."""

    def __init__(self, control: str) -> None:
        self._path = control
        self._socket: socket.socket | None = None
        self._have = b""
        self.overslept = 0.0

    def status(self, journal: int, until: float) -> dict[str, Any] | None:
        """One answer, or None when there is none at that time. A lost connection is tried again until then."""
        self.overslept = 0.0
        while True:
            try:
                answer = self._ask(journal, until)
            except (OSError, ValueError):
                # Refused, dropped for another client, or an answer that is none.
                self._close()
                answer = None
                if time.monotonic() < until and not _ended(journal):
                    time.sleep(0.005)
                    continue
            if answer is None:
                self._close()
            return answer

    def _ask(self, journal: int, until: float) -> dict[str, Any] | None:
        if self._socket is None:
            self._have = b""
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.setblocking(False)
            self._socket.connect(self._path)
        self._socket.send(b"status\n")
        while b"\n" not in self._have:
            left = until - time.monotonic()
            both: list[Any] = [self._socket, journal]
            ready = select.select(both, [], [], max(0.0, left))[0]
            self.overslept = max(0.0, time.monotonic() - until)
            if self._socket not in ready:
                return None
            piece = self._socket.recv(65536)
            if not piece:
                raise ConnectionResetError(self._path)
            self._have += piece
        line, _, self._have = self._have.partition(b"\n")
        found = json.loads(line)
        if "state" not in found:
            raise ValueError(line)
        return dict(found)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def end(journal: int, pid: int) -> None:
    """Kill it and free whoever waits for it, also when it cannot die now."""
    taken = _connections(journal, pid)
    signal.pidfd_send_signal(journal, signal.SIGKILL)
    for one in taken:
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed by its other end
        one.close()


def _connections(journal: int, pid: int) -> list[socket.socket]:
    """Its connected sockets, ours as well; none where the kernel does not let us have them."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    for name in names:
        try:
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
            copy = libc.syscall(_PIDFD_GETFD, journal, int(name), 0)
            if copy < 0:
                continue
            one = socket.socket(fileno=copy)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                one.close()
            else:
                found.append(one)
        except OSError:
            continue
    return found


def _ended(journal: int) -> bool:
    return bool(select.select([journal], [], [], 0)[0])


def _start_time(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def _keep_the_beat() -> None:
    """Before everybody else, and never waiting for memory. Each is gone without where it is not granted."""
    gc.disable()
    for act in (
        lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY)),
        lambda: ctypes.CDLL(None).mlockall(_MCL_BOTH),
        lambda: _write("/proc/self/oom_score_adj", "-900"),
    ):
        try:
            act()
        except OSError:
            pass


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def main(key: str, control: str, bound: str) -> int:
    """Watch until the end. 1 when the process of that key is not there."""
    pid, _, start = key.partition(":")
    try:
        journal = os.pidfd_open(int(pid))
        same = _start_time(int(pid)) == start
    except (OSError, ValueError):
        same = False
    if not same:
        print(json.dumps({"gone": True}), flush=True)
        return 1
    _keep_the_beat()
    reason = watch(journal, control, float(bound))
    if reason:
        end(journal, int(pid))
    print(json.dumps({"killed": reason} if reason else {"gone": True}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
