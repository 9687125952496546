"""What stands on a volume that UEFI firmware starts from: a UKI, or the signed chain where nothing else is started.

    EFI/BOOT/BOOTX64.EFI                  the UKI
  or
    EFI/BOOT/BOOTX64.EFI                  shim, signed for the firmware
    EFI/BOOT/grubx64.efi                  GRUB, signed for this shim
    EFI/BOOT/grub.cfg, EFI/VENDOR/grub.cfg   what it starts
    rewind/vmlinuz, rewind/initrd         the client's kernel, signed for shim; our initrd, which nobody verifies
"""

from __future__ import annotations

from pathlib import Path

from images.media import menu
from images.media.base import Parts
from images.media.uki import write_uki

__all__ = ["efi_files"]

DEFAULT = "EFI/BOOT/BOOTX64.EFI"


def efi_files(parts: Parts) -> dict[str, Path | bytes]:
    """Content by path. Raises ToolFailed, ImageError."""
    if parts.signed is not None:
        return _signed(parts)
    uki = parts.work / "uki.efi"
    if not uki.exists():
        write_uki(parts, uki)
    return {DEFAULT: uki}


def _signed(parts: Parts) -> dict[str, Path | bytes]:
    chain = parts.signed
    assert chain is not None
    # GRUB begins with the volume that it was started from as its root, unless its vendor chose otherwise.
    config = b"search --no-floppy --file --set=root /rewind/" + parts.identity.encode() + b"\n"
    config += menu.grub(parts, "/rewind/vmlinuz", "/rewind/initrd")
    return {
        DEFAULT: chain.shim,
        "EFI/BOOT/grubx64.efi": chain.grub,
        "EFI/BOOT/grub.cfg": config,
        f"EFI/{chain.vendor}/grub.cfg": config,
        "rewind/vmlinuz": parts.kernel,
        "rewind/initrd": parts.initrd,
        f"rewind/{parts.identity}": b"This volume was made for one start of one machine.\n",
    }
