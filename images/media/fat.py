"""File systems that firmware reads (FAT), and disks with partitions, written without root and without mounts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ImageError
from appliance.process import run
from appliance.units import MiB
from images.media.base import Parts

__all__ = ["BIOS_BOOT", "ESP", "SECTOR", "Partition", "write_disk", "write_fat"]

SECTOR = 512
# Type GUIDs: UEFI specification, table "Defined GPT partition entry"; GRUB manual, "BIOS installation".
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"

# FAT32 has at least 65525 clusters, here of one sector; firmware takes what is smaller for FAT16, whatever it says.
_SMALLEST = 36 * MiB
_CLUSTERS_FAT16 = 65000
_LABEL = "REWIND"
# Of a path: no `..`, nothing empty and so nothing absolute, nothing that a tool would take for an option or a pattern.
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GPT_END = 33  # sectors of the second table, at the end of a disk
_ALIGNED = MiB // SECTOR


@dataclass(frozen=True, slots=True)
class Partition:
    """`content` is a file that is copied to its beginning; `sectors` its size, 0: that of the content."""

    name: str
    kind: str
    content: Path
    sectors: int = 0


def write_fat(parts: Parts, files: Mapping[str, Path | bytes], out: Path, *, removable: bool = False) -> None:
    """A file system with these files by path: FAT32, or on a removable medium a FAT16 that is no larger than what is in
    it (UEFI specification, "File System Format": firmware reads both). Raises ToolFailed, ImageError for a name that is
    none or there twice (FAT knows no case)."""
    tree = parts.work / f"{out.name}.tree"
    size = _lay_out(tree, files, parts.epoch)
    # Two tables of four bytes a cluster, the folders, and the end of each file's last cluster.
    total = max(0 if removable else _SMALLEST, -(-(size + size // 50 + 4 * MiB) // MiB) * MiB)
    with out.open("wb") as file:
        file.truncate(total)
    environment = parts.environment
    # mtools expands `$` and `\\` in the path of an image, so it is given none.
    inside = ["sh", "-ec", 'cd "$0"; exec "$@"', str(out.parent)]
    form = _fat16(total) if removable else ["-F", "-c", "1" if total < 512 * MiB else "8"]
    run([*inside, "mformat", "-i", out.name, *form, "-N", parts.serial(_LABEL), "-v", _LABEL, "::"], env=environment)
    entries = sorted(str(path.absolute()) for path in tree.iterdir())
    run([*inside, "mcopy", "-i", out.name, "-s", "-p", "-m", "-Q", *entries, "::"], env=environment)
    shutil.rmtree(tree)


def write_disk(parts: Parts, partitions: Sequence[Partition], out: Path) -> list[int]:
    """A disk with a GPT and these partitions in this order, sparse. The first sector of each. Raises ToolFailed."""
    first = _ALIGNED
    starts: list[int] = []
    table = [f"label: gpt\nlabel-id: {parts.uuid('disk')}\nunit: sectors\n"]
    for partition in partitions:
        sectors = partition.sectors or -(-partition.content.stat().st_size // SECTOR)
        starts.append(first)
        identity = parts.uuid(f"partition {partition.name}")
        place = f"start={first}, size={sectors}, type={partition.kind}"
        table.append(f'{place}, uuid={identity}, name="{partition.name}"\n')
        first = -(-(first + sectors) // _ALIGNED) * _ALIGNED
    with out.open("wb") as file:
        file.truncate((first + -(-_GPT_END // _ALIGNED) * _ALIGNED) * SECTOR)
    run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", out], input="".join(table), env=parts.environment)
    for start, partition in zip(starts, partitions, strict=True):
        _copy_sparse(partition.content, out, start * SECTOR)
    return starts


def _fat16(total: int) -> list[str]:
    """With the smallest clusters of which there are not too many. Raises ImageError when it would be too large."""
    for sectors in (1, 2, 4, 8, 16, 32, 64):
        if total // SECTOR // sectors < _CLUSTERS_FAT16:
            return ["-c", str(sectors)]
    raise ImageError(reason=f"{total} bytes are too many for a removable medium")


def _lay_out(tree: Path, files: Mapping[str, Path | bytes], epoch: int) -> int:
    """The files as a folder with fixed times, for a tool that copies folders; their bytes. Raises ImageError for a name
    that leads out of the folder, before anything is written: a part of it may be a guest's word."""
    _check_names(files)
    size = 0
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        size += path.stat().st_size
    for path in (*tree.rglob("*"), tree):
        os.utime(path, (epoch, epoch))
    return size


def _check_names(names: Iterable[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            raise ImageError(reason=f"{name!r} is no name for a file of a medium")
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise ImageError(reason=f"{other!r} and {name!r} are the same file on a medium")


def _copy_sparse(source: Path, target: Path, offset: int) -> None:
    """Zeros are left as the holes that they are in a new file."""
    with source.open("rb") as reader, target.open("r+b") as writer:
        position = offset
        while block := reader.read(MiB):
            if block.count(0) != len(block):
                writer.seek(position)
                writer.write(block)
            position += len(block)
        if position > target.stat().st_size:
            raise ImageError(reason=f"{source.name} does not fit into {target.name}")
