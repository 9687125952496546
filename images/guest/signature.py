"""What lies on a volume, told by its first bytes: file systems, and what makes other volumes of it.

Offsets as in libblkid's superblock probes. The order matters where two can be there at once: a container comes before
what is left of an older file system. Names are those of libblkid (`ext4`, `crypto_LUKS`, `LVM2_member`).
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from itertools import pairwise

from images.guest.blocks import Blocks

__all__ = ["Signature", "recognise"]


@dataclass(frozen=True, slots=True)
class Signature:
    """`fs` is empty when nothing is recognised."""

    fs: str = ""
    uuid: str = ""
    label: str = ""


def recognise(blocks: Blocks) -> Signature:
    """What is on it. Never fails for what it reads there."""
    head = blocks.read(0, min(blocks.size, 72 << 10))
    for probe in (_luks, _lvm, _md, _btrfs, _xfs, _ext, _swap, _ntfs, _vfat):
        found = probe(_Head(blocks, head))
        if found:
            return found
    return Signature()


@dataclass(frozen=True, slots=True)
class _Head:
    blocks: Blocks
    raw: bytes

    def at(self, offset: int, length: int) -> bytes:
        """Zeroes for what is beyond the end."""
        return self.raw[offset : offset + length].ljust(length, b"\0")

    def tail(self, before_end: int, length: int) -> bytes:
        start = self.blocks.size - before_end
        return self.blocks.read(start, length) if start >= 0 else bytes(length)



def _luks(head: _Head) -> Signature | None:
    if head.at(0, 6) != b"LUKS\xba\xbe":
        return None
    label = _text(head.at(24, 48)) if head.at(6, 2) == b"\0\2" else ""
    return Signature("crypto_LUKS", _text(head.at(168, 40)), label)


def _lvm(head: _Head) -> Signature | None:
    for sector in range(4):
        label = head.at(sector * 512, 512)
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            name = _text(label[32:64])
            cuts = (0, 6, 10, 14, 18, 22, 26, 32)
            return Signature("LVM2_member", "-".join(name[a:b] for a, b in pairwise(cuts)))
    return None


def _md(head: _Head) -> Signature | None:
    size = head.blocks.size
    places = [head.at(4096, 64), head.at(0, 64)]  # version 1.2, 1.1
    places.append(head.tail(size - ((size // 512 - 16) & ~7) * 512, 64) if size > 16384 else b"")  # 1.0
    for raw in places:
        if raw[:8] == b"\xfc\x4e\x2b\xa9\x01\0\0\0":
            return Signature("linux_raid_member", _uuid(raw[16:32]), _text(raw[32:64]))
    old = head.tail(size - ((size & ~0xFFFF) - 0x10000), 64) if size > 1 << 17 else b""  # 0.90
    return Signature("linux_raid_member") if old[:4] == b"\xfc\x4e\x2b\xa9" else None


def _btrfs(head: _Head) -> Signature | None:
    if head.at(0x10040, 8) != b"_BHRfS_M":
        return None
    return Signature("btrfs", _uuid(head.at(0x10020, 16)), _text(head.at(0x1012B, 256)))


def _xfs(head: _Head) -> Signature | None:
    if head.at(0, 4) != b"XFSB":
        return None
    return Signature("xfs", _uuid(head.at(32, 16)), _text(head.at(108, 12)))


def _ext(head: _Head) -> Signature | None:
    raw = head.at(1024, 1024)
    if raw[0x38:0x3A] != b"\x53\xef":
        return None
    compat, incompat, ro_compat = struct.unpack_from("<III", raw, 0x5C)
    if incompat & 0x8:
        fs = "jbd"
    elif incompat & ~0x16 or ro_compat & ~0x7:  # what ext3 does not know
        fs = "ext4"
    else:
        fs = "ext3" if compat & 0x4 else "ext2"
    return Signature(fs, _uuid(raw[0x68:0x78]), _text(raw[0x78:0x88]))


def _swap(head: _Head) -> Signature | None:
    for page in (4096, 8192, 16384, 65536):
        if head.at(page - 10, 10) == b"SWAPSPACE2":
            return Signature("swap", _uuid(head.at(1036, 16)), _text(head.at(1052, 16)))
    return None


def _ntfs(head: _Head) -> Signature | None:
    """Read by the general reader alone, which has to be asked then."""
    return Signature("ntfs", head.at(72, 8)[::-1].hex().upper()) if head.at(3, 8) == b"NTFS    " else None


def _vfat(head: _Head) -> Signature | None:
    if head.at(510, 2) != b"\x55\xaa":
        return None
    for at, serial in ((82, 67), (54, 39)):
        if head.at(at, 5) in (b"FAT32", b"FAT16", b"FAT12"):
            number = struct.unpack("<I", head.at(serial, 4))[0]
            label = _text(head.at(serial + 4, 11)).strip()
            return Signature("vfat", f"{number >> 16:04X}-{number & 0xFFFF:04X}", "" if label == "NO NAME" else label)
    return None


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""


def _text(raw: bytes) -> str:
    text = raw.partition(b"\0")[0].decode(errors="replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
