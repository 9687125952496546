"""Kernel, initrd and command line as one EFI program (a unified kernel image): systemd's stub with sections.

Format: UAPI group, Unified Kernel Image. Not signed by anybody, so nothing for Secure Boot.
"""

from __future__ import annotations

from pathlib import Path

from images.media.base import Parts
from images.media.pe import add_sections
from images.model import Firmware

__all__ = ["MEDIUM", "write_uki"]


def write_uki(parts: Parts, out: Path) -> None:
    """Raises ToolFailed, ImageError."""
    command_line, system = parts.work / "uki.cmdline", parts.work / "uki.osrel"
    command_line.write_bytes(parts.command_line.encode())
    system.write_text(f'ID=rewind\nNAME="Rewind"\nPRETTY_NAME="{parts.title}"\n')
    sections = [(".osrel", system), (".cmdline", command_line), (".linux", parts.kernel), (".initrd", parts.initrd)]
    add_sections(parts.loaders / "stub.efi", sections, out)


class _Uki:
    name = "uki"
    description = "one EFI program; for the EFI system partition or HTTP boot of the target"
    suffix = ".efi"
    needs = ("objcopy", "objdump")
    firmware = frozenset({Firmware.UEFI})
    signable = False

    def make(self, parts: Parts, out: Path) -> None:
        write_uki(parts, out)


MEDIUM = _Uki()
