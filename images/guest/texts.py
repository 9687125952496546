"""Small text files of a guest, read with a limit: what is not there is empty, what is no text is replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator

from images.tree import Kind, Tree

__all__ = ["LIMIT", "fields", "lines", "listed", "printable", "text"]

# Of a configuration file. A grub.cfg of ten kernels has 20 KiB.
LIMIT = 1 << 20
_NAMES = 512


def text(tree: Tree, path: str, limit: int = LIMIT) -> str:
    """Empty when there is no such file. Raises GuestUnreadable when it is larger, or no regular file."""
    try:
        return tree.read(path, limit).decode(errors="replace")
    except FileNotFoundError:
        return ""


def lines(content: str) -> Iterator[str]:
    """Without comments of whole lines, and empty ones."""
    for line in content.split("\n"):
        line = line.strip()
        if line and not line.startswith("#"):
            yield line


def fields(content: str) -> dict[str, str]:
    """`KEY=value` lines, as os-release and grubenv have them; quotes are taken off, the last one wins."""
    found: dict[str, str] = {}
    for line in lines(content):
        key, mark, value = line.partition("=")
        if mark:
            found[key.strip()] = _unquoted(value.strip())
    return found


def listed(tree: Tree, folder: str, ending: str) -> list[str]:
    """Paths of the regular files (and links) in a folder that end so, at most 512; none when there is no folder."""
    try:
        names = [name for name in tree.list(folder) if name.endswith(ending)]
        return [path for name in names[:_NAMES] if tree.kind(path := f"{folder}/{name}") in (Kind.FILE, Kind.LINK)]
    except FileNotFoundError:
        return []


def printable(value: str, most: int = 200) -> str:
    """Fit for a terminal and a report."""
    return "".join(letter if letter.isprintable() else "?" for letter in value[:most])


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return re.sub(r"\\([\"'$`\\])", r"\1", value)
