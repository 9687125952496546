"""Whether a folder has the room for what is to be written there, before anything is."""

from __future__ import annotations

import os
from pathlib import Path

from appliance.errors import NoSpace
from appliance.units import format_size

__all__ = ["free_in", "refuse_without"]


def free_in(folder: Path) -> int | None:
    """Bytes that this user may still write there; `folder` need not exist yet. None where nothing tells."""
    for where in (folder, *folder.absolute().parents):
        try:
            found = os.statvfs(where)
        except FileNotFoundError:
            continue
        except OSError:
            return None  # whoever writes there is told what is wrong with it
        # What counts no blocks (procfs, some of FUSE) tells nothing about room.
        return found.f_bavail * found.f_frsize if found.f_blocks else None
    return None


def refuse_without(size: int, folder: Path, what: str) -> None:
    """Raises NoSpace when `what`, of at least `size` bytes, has no room in `folder`."""
    free = free_in(folder)
    if free is not None and free < size:
        needs = f"{what}, which take at least {format_size(size)}"
        hint = "make room there, or name another folder; nothing was written"
        raise NoSpace(url=f"{folder} ({format_size(free)} are free)", name=needs, hint=hint)
