"""What a piece of work cost: wall time, processor time of every process it started, and their peak memory.

    processor    of all children, once they were waited for, and of processes that were there before and work for us
                 (QEMU, libvirtd), from /proc
    memory       of all processes under this one, sampled; those that were there before are left out

Detached helpers count, too: while something is measured this process is the one that orphans of its children fall to,
and it waits for them. In between it is not: libvirt waits for its dead QEMUs to be reaped by somebody.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Cost", "busy_seconds", "cpu_clock", "measure", "steal_seconds"]

_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_SAMPLE = 0.05
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds` on the wall and `cpu` seconds of processor; `rss` and `private` are the largest sums of resident and of
    anonymous memory that were seen, in bytes. `load` is the machine's load average when it began, `others` how many
    processors somebody else kept busy meanwhile: with much of it, trust ratios and processor time only.
    """

    seconds: float
    cpu: float
    rss: int
    private: int
    load: float = 0.0
    others: float = 0.0


def measure(work: Callable[[], Any], lasting: Iterable[int] = (), settle: float = 5.0) -> Cost:
    """Run `work` and wait until the helpers it left have ended, `settle` seconds at most.

    `lasting` are processes that were there before and stay, such as QEMU: what they and their children use meanwhile is
    added, their memory is not.
    """
    lasting = list(lasting)
    load = os.getloadavg()[0]
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        watch = _Watch(_descendants())
        before, busy = _used(lasting), busy_seconds()
        own = time.process_time()
        watch.start()
        started = time.monotonic()
        try:
            work()
        finally:
            seconds = time.monotonic() - started
            busy, own = busy_seconds() - busy, time.process_time() - own
            _reap(watch.known, settle)
            watch.end()
        cpu = _used(lasting) - before
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    others = max(0.0, busy - cpu - own) / seconds if seconds else 0.0
    return Cost(seconds, cpu, watch.rss, watch.private, load, round(others, 2))


def steal_seconds() -> float:
    """Processor time that the machine below us has taken away since the boot."""
    return int(Path("/proc/stat").read_text().split(None, 9)[8]) / _TICK


def cpu_clock(pid: int) -> float:
    """Seconds of processor that a process of ours has used, to the nanosecond, threads that have ended included."""
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) makes of it


def _used(lasting: list[int]) -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + sum(map(_cpu_of, lasting))


def busy_seconds() -> float:
    """All processors of the machine: user, nice, system, irq, softirq."""
    fields = [int(one) for one in Path("/proc/stat").read_text().split(None, 9)[1:9]]
    return (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / _TICK


def _cpu_of(pid: int) -> float:
    """Its own time and that of the children it has waited for."""
    return sum(int(one) for one in _stat(pid)[11:15]) / _TICK


def _stat(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def _descendants() -> set[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                parents.setdefault(int(_stat(entry)[1]), []).append(int(entry))
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found.update(children)
        waiting += children
    return found


def _reap(known: set[int], settle: float) -> None:
    """Wait for what the work left behind, so that its processor time counts; never for what was there before."""
    deadline = time.monotonic() + settle
    while time.monotonic() < deadline:
        left = _descendants() - known
        if not left:
            return
        for pid in left:
            with suppress(ChildProcessError):  # its parent is another child of ours, which waits for it
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


class _Watch(threading.Thread):
    """Samples the memory of all processes under this one but the `known`."""

    def __init__(self, known: set[int]) -> None:
        super().__init__(daemon=True)
        self.known = known
        self.rss = 0
        self.private = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE):
            seen = [_memory(pid) for pid in _descendants() - self.known]
            self.rss = max(self.rss, sum(rss for rss, _ in seen))
            self.private = max(self.private, sum(private for _, private in seen))

    def end(self) -> None:
        self._ended.set()
        self.join()


def _memory(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return 0, 0  # it has ended
