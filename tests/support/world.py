"""The private world that `./dev` makes: its own libvirt folders and processes, no /dev/kvm.

Whatever starts a libvirt daemon or defines a domain asks here first, so that a bare `pytest` on somebody's workstation
can never reach the real ones.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

__all__ = ["IMAGES", "cache_folder", "folder", "images_folder", "inside", "qemu_ids", "require"]

# The one folder that QEMU's own user can be relied on to pass through.
IMAGES = Path("/var/lib/libvirt/images")


def inside() -> bool:
    """Are we in the private world?"""
    return bool(os.environ.get("REWIND_WORLD"))


def folder() -> Path:
    """The world's own folder: short enough for sockets below it, open to QEMU's user, gone with the world."""
    require()
    return Path(os.environ["REWIND_WORLD"])


def require() -> None:
    """Raises RuntimeError outside the private world."""
    if not inside():
        raise RuntimeError("this would use the libvirt of this machine; run it through `./dev test` or `./dev shell`")


def cache_folder() -> Path:
    """What survives a run: downloaded kernels and built guests."""
    return Path(os.environ.get("REWIND_CACHE") or Path.home() / ".cache" / "rewind")


def qemu_ids() -> tuple[int, int]:
    """User and group that libvirt's QEMU runs as."""
    entry = pwd.getpwnam("libvirt-qemu")
    return entry.pw_uid, entry.pw_gid


def images_folder(name: str) -> Path:
    """A new folder for images that libvirt's QEMU can use; gone with the world."""
    require()
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=IMAGES))
    os.chown(folder, *qemu_ids())
    folder.chmod(0o755)
    return folder
