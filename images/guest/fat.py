"""FAT12, FAT16 and FAT32 with long names: the ESP of a guest.

Source: Microsoft, FAT32 File System Specification 1.03. A chain of clusters ends after as many as the volume has, so a
circle does too. Names are found without regard to case, as FAT does. Not thread-safe.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from appliance.errors import GuestUnreadable
from images.guest.blocks import Blocks
from images.guest.files import Node
from images.tree import Kind

__all__ = ["Fat"]

_FOLDER_BYTES = 2 << 20  # the format's own limit: 65536 entries
_READ_ONLY_LONG, _FOLDER, _VOLUME = 0x0F, 0x10, 0x08


class Fat:
    """A FileSystem (see there)."""

    def __init__(self, blocks: Blocks) -> None:
        self.name = blocks.name
        self._blocks = blocks
        boot = blocks.read(0, 512)
        self._sector, per_cluster, reserved, tables = struct.unpack_from("<HBHB", boot, 11)
        root_entries, sectors_16, _, table_16 = struct.unpack_from("<HHBH", boot, 17)
        sectors, table_32 = struct.unpack_from("<II", boot, 32)
        table, sectors = table_16 or table_32, sectors_16 or sectors
        if self._sector not in (512, 1024, 2048, 4096) or not per_cluster or not reserved or not tables or not table:
            raise self._damaged("its boot sector is not right")
        self._cluster = per_cluster * self._sector
        root_at = (reserved + tables * table) * self._sector
        self._root_fixed = (root_at, root_entries * 32)
        self._data = root_at + -(-root_entries * 32 // self._sector) * self._sector
        self._count = max(0, (sectors * self._sector - self._data) // self._cluster)
        self._bits = 12 if self._count < 4085 else 16 if self._count < 65525 else 32
        size = min(table * self._sector, (self._count + 2) * 4)
        self._table = blocks.read(reserved * self._sector, size)
        first = struct.unpack_from("<I", boot, 44)[0] if self._bits == 32 else 0
        self.root = Node(first, Kind.FOLDER, 0)
        self._folders: dict[int, dict[str, tuple[bytes, Node]]] = {}

    def names(self, folder: Node) -> Iterable[bytes]:
        return [name for name, _ in self._entries(folder).values()]

    def lookup(self, folder: Node, name: bytes) -> Node | None:
        found = self._entries(folder).get(name.decode(errors="replace").casefold())
        return found[1] if found else None

    def target(self, link: Node) -> bytes:
        raise self._damaged(f"it has no links, and {link.number} is said to be one")

    def read(self, file: Node) -> bytes:
        content = self._content(file.number, file.size)
        if len(content) < file.size:
            raise self._damaged(f"the file at cluster {file.number} ends before its {file.size} bytes")
        return content[: file.size]

    def _entries(self, folder: Node) -> dict[str, tuple[bytes, Node]]:
        found = self._folders.get(folder.number)
        if found is None:
            if folder.number == 0:
                raw = self._blocks.read(*self._root_fixed)
            else:
                raw = self._content(folder.number, _FOLDER_BYTES)
            found = {name.casefold(): (name.encode(), node) for name, node in self._parse(raw)}
            if len(self._folders) < 64:
                self._folders[folder.number] = found
        return found

    def _parse(self, raw: bytes) -> Iterator[tuple[str, Node]]:
        long: dict[int, bytes] = {}
        for at in range(0, len(raw) - 31, 32):
            entry = raw[at : at + 32]
            if entry[0] == 0:
                return
            if entry[0] == 0xE5:
                long = {}
            elif entry[11] == _READ_ONLY_LONG:
                long[entry[0] & 0x3F] = entry[1:11] + entry[14:26] + entry[28:32]
            else:
                name = _long_name(long) or _short_name(entry)
                long = {}
                if not entry[11] & _VOLUME and name not in (".", ".."):
                    yield name, self._node(entry)

    def _node(self, entry: bytes) -> Node:
        high, low, size = struct.unpack("<H4xHI", entry[20:32])
        number = low | (high << 16 if self._bits == 32 else 0)
        folder = bool(entry[11] & _FOLDER)
        return Node(number, Kind.FOLDER if folder else Kind.FILE, 0 if folder else size)

    def _content(self, first: int, most: int) -> bytes:
        """Clusters from `first` on, until their chain ends or there are `most` bytes."""
        parts: list[bytes] = []
        number, left = first, min(self._count, -(-most // self._cluster))
        while 2 <= number < self._count + 2 and left > 0:
            parts.append(self._blocks.read(self._data + (number - 2) * self._cluster, self._cluster))
            number, left = self._next(number), left - 1
        return b"".join(parts)

    def _next(self, number: int) -> int:
        """0 where the table ends."""
        at = number * self._bits // 8
        raw = int.from_bytes(self._table[at : at + 4], "little")
        if self._bits == 12:
            return raw >> (4 * (number & 1)) & 0xFFF
        return raw & (0xFFFF if self._bits == 16 else 0x0FFFFFFF)

    def _damaged(self, reason: str) -> GuestUnreadable:
        return GuestUnreadable(what=f"the FAT file system on {self.name}", reason=reason)


def _long_name(parts: dict[int, bytes]) -> str:
    """Empty when there are no parts."""
    raw = b"".join(parts[key] for key in sorted(parts))
    return raw.decode("utf-16-le", errors="replace").partition("\0")[0].rstrip("\uffff")


def _short_name(entry: bytes) -> str:
    """The marks in byte 12 say which half is in lower case."""
    stem = entry[:8].decode("cp437").rstrip()
    ending = entry[8:11].decode("cp437").rstrip()
    stem = stem.lower() if entry[12] & 0x08 else stem
    ending = ending.lower() if entry[12] & 0x10 else ending
    return f"{stem}.{ending}" if ending else stem
