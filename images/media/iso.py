"""A CD that is also a stick: BIOS starts GRUB, UEFI starts what is on an EFI partition in it.

`usb` is the same file under the name that people look for.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from appliance.process import run
from images.media import menu
from images.media.base import Parts
from images.media.efi import efi_files
from images.media.fat import write_fat
from images.model import Firmware

__all__ = ["MEDIUM", "write_iso"]


def write_iso(parts: Parts, out: Path) -> None:
    """Raises ToolFailed, ImageError."""
    tree, volume = parts.work / "iso", parts.work / "iso.fat"
    _fill(parts, tree)
    write_fat(parts, efi_files(parts), volume, removable=True)
    run([*_command(parts, volume, out), tree], env=parts.environment)
    shutil.rmtree(tree)
    volume.unlink()


def _fill(parts: Parts, tree: Path) -> None:
    (tree / "boot/grub").mkdir(parents=True)
    (tree / "rewind").mkdir()
    shutil.copyfile(parts.loaders / "grub/core-iso.img", tree / "boot/grub/core.img")
    (tree / "boot/grub/grub.cfg").write_bytes(menu.grub(parts, "/rewind/vmlinuz", "/rewind/initrd"))
    shutil.copyfile(parts.kernel, tree / "rewind/vmlinuz")
    shutil.copyfile(parts.initrd, tree / "rewind/initrd")
    for path in (*tree.rglob("*"), tree):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (parts.epoch, parts.epoch))


def _command(parts: Parts, volume: Path, out: Path) -> list[str | Path]:
    moment = time.strftime("%Y%m%d%H%M%S00", time.gmtime(parts.epoch))
    return [
        "xorriso", "-as", "mkisofs", "-quiet", "-r", "-V", "REWIND", "-o", out,
        f"--modification-date={moment}", "--set_all_file_dates", moment,
        "--gpt_disk_guid", parts.uuid("iso").hex,
        "--grub2-mbr", parts.loaders / "grub/mbr-iso.img", "-partition_offset", "16",
        "-b", "boot/grub/core.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "--grub2-boot-info",
        "-append_partition", "2", "0xef", volume, "-appended_part_as_gpt",
        "-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot",
    ]  # fmt: skip


class _Iso:
    name = "iso"
    description = "a CD or DVD image for BIOS and UEFI; written to a stick it starts too"
    suffix = ".iso"
    needs = ("xorriso", "objcopy", "objdump", "mformat", "mcopy")
    firmware = frozenset({Firmware.BIOS, Firmware.UEFI})
    signable = True

    def make(self, parts: Parts, out: Path) -> None:
        write_iso(parts, out)


MEDIUM = _Iso()
