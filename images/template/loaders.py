"""The boot loaders of the media, kept in the template: an image depends on point, target and template alone.

    stub.efi          systemd's stub, which makes a UKI of a kernel and an initrd
    shim.efi          signed by Microsoft; starts        grub.efi    Debian's GRUB, signed by Debian
    grub/mbr.img      first sector of a disk             grub/mbr-iso.img    the same for a hybrid ISO
    grub/core.img     GRUB for BIOS on a disk            grub/core-iso.img   the same for an ISO, CD or stick

GRUB for BIOS takes its configuration from the medium that it was started from: `/boot/grub/grub.cfg` of the ISO, or of
the disk's second partition. So its images are the same for all builds and can be made beforehand.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.errors import ImageError
from appliance.process import run

__all__ = ["PACKAGES", "collect"]

PACKAGES = ("grub-efi-amd64-signed", "grub-pc-bin", "shim-signed", "systemd-boot-efi")

_FILES = {
    "stub.efi": "usr/lib/systemd/boot/efi/linuxx64.efi.stub",
    "shim.efi": "usr/lib/shim/shimx64.efi.signed",
    "grub.efi": "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
    "grub/mbr.img": "usr/lib/grub/i386-pc/boot.img",
    "grub/mbr-iso.img": "usr/lib/grub/i386-pc/boot_hybrid.img",
}
_MODULES = [
    "biosdisk", "part_gpt", "part_msdos", "iso9660", "fat", "normal", "configfile", "linux", "serial", "terminal",
    "echo", "test", "sleep", "reboot", "halt",
]  # fmt: skip


def collect(root: Path, into: Path) -> None:
    """Take them from a root of unpacked packages. Raises ImageError when a package has no such file."""
    (into / "grub").mkdir(parents=True, exist_ok=True)
    for name, source in _FILES.items():
        if not (root / source).is_file():
            raise ImageError(reason=f"no {source!r} in packages {', '.join(PACKAGES)}")
        shutil.copyfile(root / source, into / name)
    modules = root / "usr/lib/grub/i386-pc"
    _core(modules, into / "grub/core.img", "i386-pc", "(,gpt2)/boot/grub")
    _core(modules, into / "grub/core-iso.img", "i386-pc-eltorito", "/boot/grub")


def _core(modules: Path, out: Path, form: str, prefix: str) -> None:
    run(["grub-mkimage", "-d", modules, "-O", form, "-p", prefix, "-o", out, *_MODULES])
