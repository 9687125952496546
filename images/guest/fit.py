"""A disk of another size for the same content: how small it may be, and the partition table that it needs.

Partitions keep their places. Only what no partition uses can go, so a disk becomes smaller down to the end of its last
one, and a disk without partitions not at all. Of a GPT, whose second table lies at the end of the disk and whose first
one names that place, both have to be written anew: Linux takes neither from a disk that ends before. A larger disk is
left to the client, which may grow into it (`images/settle/steps/grow.sh`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from appliance.errors import ImageError
from appliance.process import run
from images.guest.volumes import Volume
from images.model import Layer

__all__ = ["HEAD", "check_fit", "least", "tables_for"]

# Bytes from the start of a disk in which its first table lies.
HEAD = 1 << 20
_SECTOR = 512
# The second table of a GPT: 32 sectors of entries and the header.
_TAIL = 33 * _SECTOR


def least(disk: str, size: int, volumes: Sequence[Volume]) -> int:
    """Bytes that a disk of `size` bytes must have at least, a multiple of 1 MiB if that is less than it has."""
    parts = _parts(disk, volumes)
    if not parts:
        return size
    end = max(one.offset + one.length for one in parts) + (_TAIL if _is_gpt(parts) else 0)
    return min(size, -(-end // HEAD) * HEAD)


def check_fit(disk: str, size: int, wanted: int, volumes: Sequence[Volume]) -> bool:
    """Whether a disk of `wanted` bytes needs new tables (`tables_for`). Raises ImageError when the content of the one
    of `size` bytes does not fit, and for a size that is no whole number of sectors."""
    if wanted <= 0 or wanted % _SECTOR:
        raise ImageError(reason=f"disk {disk!r} cannot have {wanted} bytes: they are no whole number of sectors")
    needs = least(disk, size, volumes)
    if wanted < needs:
        parts = _parts(disk, volumes)
        last = max(parts, key=lambda one: one.offset + one.length).name if parts else ""
        why = f"{last} ends at byte {needs}, and nothing is moved" if last else "it has no partitions, so all is in use"
        hint = f"`--size {disk}={-(-needs // HEAD)}M` is the least"
        raise ImageError(reason=f"disk {disk!r} cannot have {wanted} bytes: {why}", hint=hint)
    return wanted < size and _is_gpt(_parts(disk, volumes))


def tables_for(head: bytes, size: int, wanted: int) -> list[tuple[int, bytes]]:
    """Both tables of a GPT for a disk of `wanted` bytes, as (offset, bytes): `head` are the first `HEAD` bytes of the
    disk that had `size`. What else is in there (a boot loader) is as it was. By sfdisk; raises ToolFailed."""
    with tempfile.TemporaryDirectory() as scratch:
        old, new = Path(scratch, "old"), Path(scratch, "new")
        for path, length in ((old, size), (new, wanted)):
            with path.open("wb") as file:
                file.write(head)
                file.truncate(length)
        table = run(["sfdisk", "--dump", old])
        run(["sfdisk", "--quiet", "--force", new], input=_without_end(table))
        with new.open("r+b") as file:
            file.write(head[:440])
            file.seek(0)
            first = file.read(34 * _SECTOR)
            file.seek(wanted - _TAIL)
            return [(0, first), (wanted - _TAIL, file.read())]


def _without_end(table: str) -> str:
    return re.sub(r"(?m)^last-lba:.*\n", "", table)


def _parts(disk: str, volumes: Sequence[Volume]) -> list[Volume]:
    return [one for one in volumes if one.disks == (disk,) and one.layers == (Layer.PARTITION,) and one.number]


def _is_gpt(parts: Sequence[Volume]) -> bool:
    """The kinds of a GPT's partitions are GUIDs."""
    return any(len(one.kind) == 36 for one in parts)
