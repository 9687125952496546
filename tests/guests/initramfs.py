"""The first file system of a guest, written without its tools: an archive the kernel unpacks, and modules in order."""

from __future__ import annotations

import lzma
import re
import stat
from pathlib import Path

__all__ = ["Archive", "add_busybox", "add_modules"]


def add_busybox(archive: Archive, unpacked: Path, applets: list[str]) -> None:
    """Put busybox and links to it into /bin."""
    # Debian moved /bin into /usr; a package may still ship either.
    (busybox,) = [p for p in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if p.exists()]
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in applets:
        archive.link(f"bin/{applet}", "busybox")


def add_modules(archive: Archive, unpacked: Path, wanted: list[str]) -> None:
    """Put kernel modules and what they need into /modules; /modules/order lists them so that each can be loaded."""
    files = {_module_name(p): p for p in unpacked.glob("**/kernel/**/*.ko*")}
    order: list[str] = []

    def add(name: str) -> None:
        # What is not a file is built into the kernel.
        if name in order or name not in files:
            return
        data = _module_data(files[name])
        needs = re.search(rb"(?:^|\0)depends=([^\0]*)\0", data)
        for needed in (needs.group(1).decode() if needs else "").split(","):
            add(needed.replace("-", "_"))
        archive.file(f"modules/{name}.ko", data, 0o644)
        order.append(name)

    for name in wanted:
        add(name)
    archive.file("modules/order", "".join(f"/modules/{name}.ko\n" for name in order).encode(), 0o644)


def _module_name(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _module_data(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


class Archive:
    """A cpio archive in the format that the kernel unpacks (`newc`)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 1

    def folder(self, name: str) -> None:
        self._add(name, b"", stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int) -> None:
        self._add(name, data, stat.S_IFREG | mode)

    def link(self, name: str, target: str) -> None:
        self._add(name, target.encode(), stat.S_IFLNK | 0o777)

    def finish(self) -> bytes:
        self._add("TRAILER!!!", b"", 0)
        return b"".join(self._parts)

    def _add(self, name: str, data: bytes, mode: int) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]
