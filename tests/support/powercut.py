"""A disk that loses power: a file system of its own in a file, which from one instant on writes nothing any more.

The kernel's own way to test file systems is used: the shutdown call of ext4 without a flush of its log. What a program
wrote and did not sync is only in memory then and is thrown away with the mount; what was synced comes back by replaying
the log. It cannot show a disk that lies about its cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import struct
import subprocess
import time
from pathlib import Path

from tests.support.limits import limit

__all__ = ["PowerDisk"]

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2


class PowerDisk:
    """Mounted at `folder` from `image`. Everything that matters after a power cut has to lie on it."""

    def __init__(self, image: Path, folder: Path, megabytes: int) -> None:
        self.image, self.folder = image, folder
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m0", str(image)], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.folder)], check=True)

    def prepare(self) -> None:
        """So that `cut` takes no time."""
        self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)

    def cut(self) -> None:
        """Nothing gets onto the disk from now on."""
        fcntl.ioctl(self._handle, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(self._handle)

    def restart(self) -> None:
        """Power is back. Whoever used it must have died."""
        end = time.monotonic() + limit(20)
        while subprocess.run(["umount", str(self.folder)], check=False, capture_output=True).returncode:
            assert time.monotonic() < end, self._users()
            gc.collect()  # what we ourselves have let go of, but not closed
            time.sleep(0.1)
        self.mount()

    def _users(self) -> list[str]:
        """Who keeps what open on it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith(f"{self.folder}/"):
                    found.append(f"{entry}: {target}")
        return found

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=False, capture_output=True)
