"""A small disk for UEFI: one EFI system partition. To be attached beside the restored disks, which stay as they are."""

from __future__ import annotations

from pathlib import Path

from images.media.base import Parts
from images.media.efi import efi_files
from images.media.fat import ESP, Partition, write_disk, write_fat
from images.model import Firmware

__all__ = ["MEDIUM"]


class _Esp:
    name = "esp"
    description = "a small disk with an EFI system partition, raw; attached beside the restored disks"
    suffix = ".esp.img"
    needs = ("objcopy", "objdump", "mformat", "mcopy", "sfdisk")
    firmware = frozenset({Firmware.UEFI})
    signable = True

    def make(self, parts: Parts, out: Path) -> None:
        volume = parts.work / "esp.fat"
        write_fat(parts, efi_files(parts), volume)
        write_disk(parts, [Partition("rewind-esp", ESP, volume)], out)
        volume.unlink()


MEDIUM = _Esp()
