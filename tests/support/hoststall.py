"""How long this machine itself stands still: what a guest on it has to wait for, whatever we do.

    with HostStall(folder) as host:
        host.reset()
        …
        assert waited < bound + 2 * host.worst()

A process of its own, so that nothing in the tests can hold it up, sleeps 50 ms, writes 4 KiB and syncs them, over and
over; the worst is by how much one such round took longer than it should have. Twice that is what a write may wait for
in addition: for its own turn and for one that it stands behind.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

__all__ = ["HostStall"]

# More often, its own syncs would be what others wait for on a slow disk.
_BEAT = 0.05
# The answer comes after the round that is under way, so a stall that has not ended counts as well.
_METER = """
import os, select, sys, time
file, beat, worst = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600), float(sys.argv[2]), 0.0
print(flush=True)
while True:
    begun = time.monotonic()
    asked = bool(select.select([sys.stdin], [], [], beat)[0])
    os.pwrite(file, bytes(4096), 0)
    os.fdatasync(file)
    worst = max(worst, time.monotonic() - begun - (0 if asked else beat))
    if asked:
        word = os.read(0, 1)
        if not word:
            break
        print(worst, flush=True)
        worst = 0.0 if word == b"r" else worst
"""


class HostStall:
    """Measures in that folder, in which a file is made, until the end of the block. One thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "hoststall"
        self._meter = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _METER, self._path, str(_BEAT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._meter.stdout is not None
        self._meter.stdout.readline()

    def __enter__(self) -> HostStall:
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.communicate()
        self._path.unlink(missing_ok=True)

    def worst(self) -> float:
        """In seconds, since the begin or the last `reset`."""
        return self._ask(b"w")

    def reset(self) -> None:
        self._ask(b"r")

    def _ask(self, word: bytes) -> float:
        assert self._meter.stdin is not None and self._meter.stdout is not None
        self._meter.stdin.write(word)
        self._meter.stdin.flush()
        return float(self._meter.stdout.readline())
