"""A small boot disk for both kinds of firmware, to be attached beside the restored disks and to stay there.

    first sector    GRUB's, which loads             BIOS boot partition   GRUB, which reads
    ESP             EFI/BOOT/BOOTX64.EFI for UEFI; boot/grub/grub.cfg, rewind/vmlinuz and initrd for BIOS

The places of GRUB's parts are written into them as grub-bios-setup does it, which itself wants a device and root.
Format: GRUB, boot/i386/pc/boot.S and diskboot.S (include/grub/i386/pc/boot.h, include/grub/offsets.h).
"""

from __future__ import annotations

import struct
from pathlib import Path

from images.media import menu
from images.media.base import Parts
from images.media.efi import efi_files
from images.media.fat import BIOS_BOOT, ESP, SECTOR, Partition, write_disk, write_fat
from images.model import Firmware

__all__ = ["MEDIUM"]

_CODE = 440  # bytes of a first sector before the disk's signature and table
_FIRST_OF_CORE = 0x5C  # in the first sector: where GRUB begins, 8 bytes
_DRIVE_CHECK = 0x66  # in the first sector: a jump around the use of the drive that the BIOS names; two NOPs are none
_REST_OF_CORE = 0x1F4  # in GRUB's first sector: where its second one is, 8 bytes


class _Disk:
    name = "disk"
    description = "a small boot disk for BIOS and UEFI, raw; attached beside the restored disks, may stay there"
    suffix = ".disk.img"
    needs = ("objcopy", "objdump", "mformat", "mcopy", "sfdisk")
    firmware = frozenset({Firmware.BIOS, Firmware.UEFI})
    signable = True

    def make(self, parts: Parts, out: Path) -> None:
        volume = parts.work / "disk.fat"
        write_fat(parts, _files(parts), volume)
        core = parts.loaders / "grub/core.img"
        partitions = [Partition("rewind-bios", BIOS_BOOT, core), Partition("rewind-esp", ESP, volume)]
        _install_grub(parts.loaders / "grub/mbr.img", out, write_disk(parts, partitions, out)[0])
        volume.unlink()


def _files(parts: Parts) -> dict[str, Path | bytes]:
    bios: dict[str, Path | bytes] = {
        "boot/grub/grub.cfg": menu.grub(parts, "/rewind/vmlinuz", "/rewind/initrd"),
        "rewind/vmlinuz": parts.kernel,
        "rewind/initrd": parts.initrd,
    }
    return bios | efi_files(parts)


def _install_grub(first_sector: Path, disk: Path, core: int) -> None:
    code = bytearray(first_sector.read_bytes()[:_CODE])
    struct.pack_into("<Q", code, _FIRST_OF_CORE, core)
    code[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"
    with disk.open("r+b") as file:
        file.write(code)
        file.seek(core * SECTOR + _REST_OF_CORE)
        file.write(struct.pack("<Q", core + 1))


MEDIUM = _Disk()
