"""Where a repository in a folder lies: whether it goes with this host.

Decided by the type of the file system alone, and in doubt against us. A network file system that we know by name is
elsewhere, and so is what a program serves (FUSE: sshfs, GlusterFS, s3fs …; not `fuseblk`, which is a local disk).
Everything else is here: ext4 on a disk of a storage network, too, since nothing tells it from one in this machine, and
a file system of which nothing is known. Who reads "all would be lost" in vain has lost nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

__all__ = ["NEARLY_NOTHING", "file_system", "folder_of", "free_bytes", "on_this_host"]

# Bytes below which the next point of some size does not find room any more.
NEARLY_NOTHING: Final = 256 << 20

_MOUNTS: Final = Path("/proc/self/mountinfo")
_ELSEWHERE: Final = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "9p", "virtiofs", "afs", "coda", "lustre", "beegfs",
    "gpfs", "orangefs", "pvfs2", "ocfs2", "gfs2", "fuse",
}  # fmt: skip
# When there is no list of mounts, or nothing in it fits.
_UNKNOWN: Final = "unknown file system"


def on_this_host(url: str, mounts: Path = _MOUNTS) -> str:
    """The type of the file system of a repository that is lost with this host, empty for one that is not. Never
    raises; asks nothing of the repository itself."""
    kind = file_system(url, mounts)
    return "" if kind in _ELSEWHERE or kind.startswith("fuse.") else kind


def folder_of(url: str) -> Path | None:
    """None where the URL is of no folder."""
    scheme, separator, _ = url.partition("://")
    if separator and scheme != "file":
        return None
    return Path(unquote(urlsplit(url).path) if separator else url)


def free_bytes(url: str) -> int | None:
    """What is left where the folder lies; None where there is no folder, or it cannot be told."""
    folder = folder_of(url)
    try:
        return None if folder is None else shutil.disk_usage(folder).free
    except OSError:
        return None


def file_system(url: str, mounts: Path = _MOUNTS) -> str:
    """The type of the file system that the folder lies on; empty where the URL is of no folder."""
    named = folder_of(url)
    if named is None:
        return ""
    folder = Path(os.path.realpath(named))
    found = (0, _UNKNOWN)
    for point, kind in _mounted(mounts):
        # Of two on one folder the later one covers the other.
        if folder.is_relative_to(point) and len(point.parts) >= found[0]:
            found = (len(point.parts), kind)
    return found[1]


def _mounted(mounts: Path) -> list[tuple[Path, str]]:
    """(folder, type) in the order in which they were mounted."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    rows = (line.partition(" - ") for line in lines)
    return [
        (Path(_plain(left.split()[4])), right.split()[0])
        for left, _, right in rows
        if len(left.split()) > 4 and right.split()
    ]


def _plain(text: str) -> str:
    """The kernel writes blanks and the like in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
