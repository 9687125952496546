"""The one way to look at the files of a guest: a Tree, whoever reads it.

Paths are absolute, of the guest, with `/` between parts. A Tree resolves symbolic links itself, inside the guest: no
link and no `..` leads out of it. Content of a guest is hostile: every read has a limit.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

__all__ = ["Kind", "Tree", "exists"]


class Kind(Enum):
    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"


class Tree(Protocol):
    """Not thread-safe. All methods raise FileNotFoundError (no such path, or a link that leads nowhere or in a circle),
    and GuestUnreadable when the file system is damaged or the reader ended."""

    def read(self, path: str, limit: int) -> bytes:
        """A regular file's content. Raises GuestUnreadable when it is none or has more than `limit` bytes."""
        ...

    def list(self, path: str) -> tuple[str, ...]:
        """Names in a folder, sorted, without `.` and `..`; names that are not UTF-8 are left out."""
        ...

    def kind(self, path: str) -> Kind:
        """Of the path itself: a link in its last part is not followed."""
        ...

    def resolve(self, path: str) -> str:
        """The same file by a path without symbolic links."""
        ...


def exists(tree: Tree, path: str) -> bool:
    try:
        tree.resolve(path)
    except FileNotFoundError:
        return False
    return True
