"""Where an epoch keeps what the guest overwrites while it is pushed: unlinked files, bounded if the admin says so.

Whatever happens to us, they are gone when QEMU closes them. The bound (`scratch_limit`) is a wall inside QEMU and not
a watcher beside it: the image lies in a window of the file, and a write beyond the window's end is answered "no space".
Copy-before-write then gives the snapshot up and lets the guest write.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import epoch
from appliance.process import run
from appliance.units import CHUNK, MiB, format_size

__all__ = ["Scratches"]

# Copy-before-write asks for so much at once, and the image needs a few clusters for itself: with less left it is full.
_REST = MiB + 4 * CHUNK


class Scratches:
    """The scratch files of one epoch in `folder`; close it when QEMU has let go of them. `limit` is the bytes that all
    of them may take together, 0 without limit; each has an equal share, since no wall can be shared."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._share = 0
        self._files: dict[str, int] = {}

    def add(self, monitor: Monitor, sources: Sequence[epoch.Source]) -> None:
        """One for each source, given to QEMU. Raises ToolFailed, OSError, MonitorError."""
        # Of nothing, QEMU could not even write the image's own tables.
        self._share = max(self._limit // len(sources) // CHUNK, 8) * CHUNK if self._limit and sources else 0
        for source in sources:
            self._add(monitor, source)

    def _add(self, monitor: Monitor, source: epoch.Source) -> None:
        path = self._folder / f"scratch-{source.number}.qcow2"
        path.unlink(missing_ok=True)
        run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(source.disk.size)], timeout=30)
        share = self._share and max(self._share, -(-path.stat().st_size // CHUNK) * CHUNK)
        if share:
            os.truncate(path, share)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Another open file, which shares no lock with QEMU's: only to see how much it takes.
            self._files[source.disk.target] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            path.unlink()
            epoch.add_scratch(monitor, source, descriptor, share)
        finally:
            os.close(descriptor)

    def why_full(self) -> str:
        """In words that an admin can do something about; empty when there is room."""
        used = {target: os.fstat(file).st_blocks * 512 for target, file in self._files.items()}
        full = [target for target, size in used.items() if self._share and size + _REST > self._share]
        if full:
            return (
                f"the guest overwrote more of {', '.join(full)} during the push than the scratch may hold "
                f"(its share of scratch_limit is {format_size(self._share)})"
            )
        free = os.statvfs(self._folder)
        if free.f_bavail * free.f_frsize < _REST:
            return f"no space is left in {self._folder} for what the guest overwrote during the push"
        return ""

    def why_broken(self) -> str:
        """Why a snapshot broke when nothing else is at fault."""
        return self.why_full() or f"what the guest overwrote could not be kept in {self._folder} in time"

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
