"""A first file system of a kernel, as a cpio archive in the format `newc`, the same bytes each time.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. Each member is a head of 110 letters (magic
`070701` and 13 numbers of 8 hexadecimal digits), its name with a NUL, and its data; name and data end on a multiple of
four bytes. The order of the numbers: inode, mode, uid, gid, links, mtime, size, device major and minor, major and minor
of a device node, length of the name, check (0). A member named `TRAILER!!!` is the end.

Nothing of the maker is in it: members are sorted, owned by root, of the time 0, and numbered from 1.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

from appliance.errors import ImageError

__all__ = ["Archive", "names"]

_MAGIC = b"070701"
_HEAD = 110
_END = "TRAILER!!!"
_LARGEST = 0xFFFFFFFF


class Archive:
    """Collects members; `finish` writes them. Folders on the way to a member are made. Not thread-safe.

    A name is a relative path without `.` and `..` parts; ImageError otherwise, and when a name is put twice with
    different content.
    """

    def __init__(self) -> None:
        self._members: dict[str, tuple[int, int, int, bytes]] = {}

    def folder(self, name: str) -> None:
        self._put(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._put(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        self._put(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device."""
        self._put(name, stat.S_IFCHR | mode, major=major, minor=minor)

    def finish(self) -> bytes:
        """The archive. Parents come before what is in them, since a path sorts before all that it begins."""
        out = bytearray()
        for number, (name, member) in enumerate(sorted(self._members.items()), 1):
            _append(out, number, name, *member)
        _append(out, 0, _END, 0, 0, 0, b"")
        return bytes(out)

    def _put(self, name: str, mode: int, data: bytes = b"", *, major: int = 0, minor: int = 0) -> None:
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
            raise ImageError(reason=f"{name!r} is no name for a file of an initrd")
        if len(data) > _LARGEST:
            raise ImageError(reason=f"{name!r} with {len(data)} bytes is too large for an initrd")
        member = (mode, major, minor, data)
        if self._members.setdefault(name, member) != member:
            raise ImageError(reason=f"{name!r} is put into the initrd twice, with different content")
        for parent in list(path.parents)[:-1]:
            found = self._members.setdefault(str(parent), (stat.S_IFDIR | 0o755, 0, 0, b""))
            if not stat.S_ISDIR(found[0]):
                raise ImageError(reason=f"{name!r} cannot lie below {str(parent)!r}, which is no folder of the initrd")


def names(archive: bytes) -> dict[str, int]:
    """Names and modes of the members of one archive, in its order. Raises ImageError when it is none."""
    found: dict[str, int] = {}
    at = 0
    while True:
        head = archive[at : at + _HEAD]
        if len(head) < _HEAD or not head.startswith(_MAGIC):
            raise ImageError(reason=f"no member of a newc archive at byte {at}")
        fields = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + _HEAD : at + _HEAD + fields[11] - 1].decode()
        if name == _END:
            return found
        found[name] = fields[1]
        at = _aligned(_aligned(at + _HEAD + fields[11]) + fields[6])


def _append(out: bytearray, number: int, name: str, mode: int, major: int, minor: int, data: bytes) -> None:
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(encoded), 0)
    out += _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
    out += bytes(-len(out) % 4) + data
    out += bytes(-len(out) % 4)


def _aligned(at: int) -> int:
    return (at + 3) & ~3
