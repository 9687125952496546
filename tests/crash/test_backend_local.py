"""kill -9 of a process that puts and deletes, at every system call that changes the disk, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.deathcalls import die_at
from tests.support.limits import limit

ROOT = Path(__file__).parents[2]
CALLS = ("fsync", "link", "mkdir", "unlink", "write", "open")


def workload(backend, say) -> None:
    for number in range(3):
        backend.put(f"packs/{number:032x}", bytes([number]) * 10_000)
        say(f"+packs/{number:032x}")
        backend.put(f"points/{number}", bytes([number]) * 10)
        say(f"+points/{number}")
    backend.delete("points/1")
    say("-points/1")


def run_until_death(folder: Path, number: int) -> tuple[set[str], set[str], bool]:
    """What was acknowledged as put and as deleted, and whether the process died."""
    from appliance.store.backend.local import LocalBackend

    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        really_write = os.write
        die_at(number, CALLS)
        workload(LocalBackend(folder), lambda text: really_write(write, text.encode() + b"\n"))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read().split()
    _, status = os.waitpid(pid, 0)
    return {s[1:] for s in said if s[0] == "+"}, {s[1:] for s in said if s[0] == "-"}, os.WIFSIGNALED(status)


def check(folder: Path, put: set[str], deleted: set[str]) -> None:
    from appliance.store.backend import open_backend

    backend = open_backend(str(folder))
    there = {info.name: info.size for info in backend.list()}
    assert put - deleted - set(there) <= {"points/1"}, "an acknowledged object is gone"
    assert "points/1" in there or len(put) == 6 or "points/1" not in put, "gone before its deletion began"
    assert not deleted & set(there), "a deleted object came back"
    for name, size in there.items():
        assert size == (10_000 if name.startswith("packs/") else 10), f"{name} is torn"
        assert backend.get(name) == bytes([int(name[-1])]) * size
    if "points/1" in there or "points/1" not in put:
        workload(backend, lambda _: None)  # the whole again: meets what is there, completes what is not


def every_crash(folder: Path) -> int:
    """Die once at every step; the number of deaths."""
    number = 2
    while True:
        place = folder / str(number)
        put, deleted, died = run_until_death(place, number)
        if not died:
            return number - 2
        check(place, put, deleted)
        number += 1


def test_killed_at_every_step(tmp_path):
    """A9: kill -9 at every fsync and link of the store; what was acknowledged is there, everything is whole."""
    program = "from tests.crash.test_backend_local import *; print(every_crash(Path(sys.argv[1])))"
    # kill -9 is the same in memory, where the 2000 fsyncs cost nothing.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        argv = [sys.executable, "-c", program, folder]
        ended = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True, timeout=limit(25))
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 100
