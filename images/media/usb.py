"""A stick for BIOS and UEFI: the hybrid ISO, to be written to the whole stick.

Not a disk image of its own kind: the ISO has a GPT and an EFI partition where UEFI looks for them and a first sector
that BIOS starts, and one file that was tested twice is better than two.
"""

from __future__ import annotations

from pathlib import Path

from images.media.base import Parts
from images.media.iso import write_iso
from images.model import Firmware

__all__ = ["MEDIUM"]


class _Usb:
    name = "usb"
    description = "an image to be written to a whole USB stick, for BIOS and UEFI"
    suffix = ".usb.img"
    needs = ("xorriso", "objcopy", "objdump", "mformat", "mcopy")
    firmware = frozenset({Firmware.BIOS, Firmware.UEFI})
    signable = True

    def make(self, parts: Parts, out: Path) -> None:
        write_iso(parts, out)


MEDIUM = _Usb()
