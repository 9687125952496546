"""Folders for what is being made, which go with whoever makes it; when that is killed, with the next one.

    scratch_folder   one of ours below another folder; what killed processes have left there goes first

A folder is locked for as long as it is in use, and the kernel ends a lock with its process: nobody is taken for dead
because he is slow, nor for living because somebody else has his pid.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["scratch_folder"]


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, which is made, and where `prefix` is that of such folders alone. It may be renamed.
    `parent` may be a link to a folder; what a killed process has left stays until the next one in that folder.

    Any thread and process may call it at once. Raises OSError when it cannot be made; what others have left and cannot
    be removed stays."""
    parent.mkdir(parents=True, exist_ok=True)
    with _opened(parent) as here:
        fcntl.flock(here, fcntl.LOCK_EX)  # nobody finds a folder that is not locked yet
        for left in parent.iterdir():
            if left.name.startswith(prefix):
                _remove_abandoned(left)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError), _opened(folder, os.O_NOFOLLOW) as handle:  # it is in use, or went meanwhile
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path, flags: int = 0) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:
        yield handle
    finally:
        os.close(handle)
