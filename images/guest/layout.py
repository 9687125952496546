"""Partition tables: MBR with extended partitions, and GPT.

Own parsing and not libblkid: it would be C over hostile bytes, and it cannot read through our Blocks. Formats: UEFI
specification 2.10, chapter 5 (GPT, protective MBR); the MBR has no standard, this is what Linux's block/partitions/
msdos.c takes. A damaged GPT is taken from its copy at the end of the disk.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.errors import GuestUnreadable
from images.guest.blocks import Blocks

__all__ = ["ESP", "Partition", "partitions"]

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"

_SECTOR = 512
_GPT_ENTRIES = 1024
_LOGICAL = 60
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE


@dataclass(frozen=True, slots=True)
class Partition:
    """`offset` and `length` in bytes. `kind`: the type's GUID, or `0x83`. `uuid` is what Linux calls PARTUUID."""

    number: int
    offset: int
    length: int
    kind: str
    uuid: str
    label: str = ""


def partitions(disk: Blocks) -> tuple[Partition, ...]:
    """In the order of their numbers; empty when there is no table. A partition that ends beyond the disk is left out.
    Raises GuestUnreadable when a GPT and its copy are both damaged."""
    if disk.size < 2 * _SECTOR:
        return ()
    mbr = disk.read(0, _SECTOR)
    if mbr[510:] != b"\x55\xaa" or not _is_table(mbr):
        return ()
    primary = list(_mbr_entries(mbr))
    found = _gpt(disk) if any(kind == _PROTECTIVE for kind, _, _ in primary) else _mbr(disk, mbr)
    return tuple(sorted((one for one in found if _inside(one, disk)), key=lambda one: one.number))


def _inside(one: Partition, disk: Blocks) -> bool:
    return one.length > 0 and one.offset > 0 and one.offset + one.length <= disk.size


# --- MBR ---


def _is_table(mbr: bytes) -> bool:
    """A boot sector of a FAT file system ends with the same two bytes; its text lies where a table has flags."""
    return all(mbr[at] in (0, 0x80) for at in range(446, 510, 16)) and any(mbr[446:510])


def _mbr_entries(sector: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries."""
    for at in range(446, 510, 16):
        first, count = struct.unpack_from("<II", sector, at + 8)
        yield sector[at + 4], first, count


def _mbr(disk: Blocks, mbr: bytes) -> Iterator[Partition]:
    name = struct.unpack_from("<I", mbr, 440)[0]
    for number, (kind, first, count) in enumerate(_mbr_entries(mbr), 1):
        if kind in _EXTENDED:
            yield from _logical(disk, first, name)
        elif kind and count:
            yield _mbr_partition(name, number, kind, first, count)


def _logical(disk: Blocks, start: int, name: int) -> Iterator[Partition]:
    """A chain of sectors, each with one partition and the place of the next; a circle ends at the highest number."""
    at = start
    for number in range(5, 5 + _LOGICAL):
        if (at + 1) * _SECTOR > disk.size:
            return
        sector = disk.read(at * _SECTOR, _SECTOR)
        if sector[510:] != b"\x55\xaa":
            return
        (kind, first, count), (next_kind, step, _) = list(_mbr_entries(sector))[:2]
        if kind and count and kind not in _EXTENDED:
            yield _mbr_partition(name, number, kind, at + first, count)
        if next_kind not in _EXTENDED or not step:
            return
        at = start + step


def _mbr_partition(name: int, number: int, kind: int, first: int, count: int) -> Partition:
    return Partition(number, first * _SECTOR, count * _SECTOR, f"{kind:#04x}", f"{name:08x}-{number:02x}")


# --- GPT ---


def _gpt(disk: Blocks) -> list[Partition]:
    """From the first table whose checksums are right; disks of 4 KiB sectors have theirs at 4096."""
    for sector in (_SECTOR, 4096):
        for at in (sector, disk.size - sector):
            found = _gpt_at(disk, at, sector)
            if found is not None:
                return found
    raise GuestUnreadable(what=f"the partition table of {disk.name}", reason="both copies of its GPT are damaged")


def _gpt_at(disk: Blocks, at: int, sector: int) -> list[Partition] | None:
    if at < 0 or at + 92 > disk.size:
        return None
    raw = disk.read(at, 92)
    signature, _, size, checksum = struct.unpack_from("<8sIII", raw)
    if signature != b"EFI PART" or size != 92 or zlib.crc32(raw[:16] + bytes(4) + raw[20:]) != checksum:
        return None
    first, count, width, entries_checksum = struct.unpack_from("<QIII", raw, 72)
    if width not in (128, 256, 512) or count > _GPT_ENTRIES or first * sector + count * width > disk.size:
        return None
    table = disk.read(first * sector, count * width)
    if zlib.crc32(table) != entries_checksum:
        return None
    entries = (table[index * width : (index + 1) * width] for index in range(count))
    return [_gpt_partition(number, entry, sector) for number, entry in enumerate(entries, 1) if any(entry[:16])]


def _gpt_partition(number: int, entry: bytes, sector: int) -> Partition:
    first, last = struct.unpack_from("<QQ", entry, 32)
    kind, name = (str(uuid.UUID(bytes_le=entry[at : at + 16])) for at in (0, 16))
    label = entry[56:128].decode("utf-16-le", errors="replace").partition("\0")[0]
    return Partition(number, first * sector, (last - first + 1) * sector, kind, name, label)
