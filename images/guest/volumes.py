"""The volumes of a guest: what lies on its disks, from the disk up to each file system.

    disks → partitions → physical volumes of LVM → logical volumes

`Found` is what the child keeps, with blocks to read from; `Volume` is what it tells, and what both readers tell alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from images.guest.blocks import Blocks, Window
from images.guest.fat import Fat
from images.guest.files import FileSystem, Unsupported
from images.guest.journal import open_ext4
from images.guest.layout import Partition, partitions
from images.guest.lvm import logical_volumes
from images.guest.signature import Signature, recognise
from images.model import Layer

__all__ = ["Found", "Volume", "find_volumes", "open_files", "opened_name", "partition_name"]

_READERS: dict[str, Callable[[Blocks], FileSystem]] = {
    "ext2": open_ext4, "ext3": open_ext4, "ext4": open_ext4, "vfat": Fat,
}  # fmt: skip


class Volume(BaseModel):
    """A disk, partition, or something above them, that can hold a file system.

    `name` is its own among the guest's (`vda1`, `vg/root`, `md127`, `vda2:@` for a subvolume). `fs` as libblkid calls
    it, empty when nothing was recognised. `disks` are the targets it lies on and `layers` how, from the disk up;
    `offset` and `length` in bytes are its place on `disks[0]` when that is a partition or the disk itself, else 0.
    `mountable` tells whether the reader that found it can read files there. `flags` are mount options that it needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=512)
    fs: str = Field(default="", max_length=64)
    uuid: str = Field(default="", max_length=128)
    label: str = Field(default="", max_length=256)
    disks: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    offset: int = Field(default=0, ge=0)
    length: int = Field(default=0, ge=0)
    number: int = Field(default=0, ge=0)
    kind: str = Field(default="", max_length=64)
    partuuid: str = Field(default="", max_length=64)
    partlabel: str = Field(default="", max_length=128)
    mountable: bool = False
    flags: str = Field(default="", max_length=256)


@dataclass(slots=True)
class Found:
    """A volume with its blocks, None where they cannot be put together."""

    volume: Volume
    blocks: Blocks | None
    files: FileSystem | None = None


def find_volumes(disks: Mapping[str, Blocks]) -> list[Found]:
    """All of them. Raises GuestUnreadable when a partition table or the metadata of LVM is damaged."""
    simple = [one for name in disks for one in _on_disk(name, disks[name])]
    return simple + list(_on_lvm(simple))


def open_files(found: Found) -> FileSystem:
    """Raises Unsupported where this reader has no way, GuestUnreadable where it is damaged."""
    if found.files is None:
        reader = _READERS.get(found.volume.fs)
        if reader is None or found.blocks is None:
            raise Unsupported(what=f"volume {found.volume.name!r}", reason=f"it has {found.volume.fs or 'nothing'}")
        found.files = reader(found.blocks)
    return found.files


def partition_name(disk: str, number: int) -> str:
    """As Linux does it: `vda1`, `nvme0n1p1`."""
    return f"{disk}{'p' if disk[-1:].isdigit() else ''}{number}"


def opened_name(container: str) -> str:
    """What readers call the volume in an opened container of LUKS."""
    return f"luks-{container}".replace("/", "-")


def _on_disk(name: str, disk: Blocks) -> Iterator[Found]:
    table = partitions(disk)
    if not table:
        yield _found(Volume(name=name, disks=(name,), length=disk.size), recognise(disk), disk)
    for one in table:
        volume = _partition(name, one)
        window = Window(volume.name, disk, one.offset, one.length)
        yield _found(volume, recognise(window), window)


def _partition(disk: str, one: Partition) -> Volume:
    return Volume(
        name=partition_name(disk, one.number), disks=(disk,), layers=(Layer.PARTITION,), offset=one.offset,
        length=one.length, number=one.number, kind=one.kind, partuuid=one.uuid, partlabel=one.label,
    )  # fmt: skip


def _on_lvm(simple: list[Found]) -> Iterator[Found]:
    physical = [(one.volume, one.blocks) for one in simple if one.volume.fs == "LVM2_member" and one.blocks]
    for one in logical_volumes([blocks for _, blocks in physical]):
        below = [physical[position][0] for position in one.on]
        disks = tuple(dict.fromkeys(disk for volume in below for disk in volume.disks))
        layers = tuple(dict.fromkeys(layer for volume in below for layer in volume.layers))
        volume = Volume(name=f"{one.group}/{one.name}", disks=disks, layers=(*layers, Layer.LVM))
        signature = recognise(one.blocks) if one.blocks else Signature(re.sub(r"\W", "_", f"lvm_{one.type}"))
        yield _found(volume, signature, one.blocks)


def _found(volume: Volume, signature: Signature, blocks: Blocks | None) -> Found:
    full = volume.model_copy(update={
        "fs": signature.fs, "uuid": signature.uuid, "label": signature.label, "mountable": signature.fs in _READERS,
    })  # fmt: skip
    return Found(full, blocks)


