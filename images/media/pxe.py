"""Files for a TFTP or HTTP server: a UKI for UEFI firmware, kernel and initrd with a script for each boot loader.

    README                   which of them is for whom
    rewind.efi               UEFI: the firmware's own network start
    vmlinuz, initrd          with boot.ipxe (iPXE), pxelinux.cfg/default (pxelinux), grub/grub.cfg (GRUB's netboot)
    sha256sums               of all the others

iPXE, which is in the ROM of many cards, is for boot.ipxe alone, on UEFI too: it hands a program its own name as a
command line, and systemd's stub takes that in the place of the one in the UKI. The client would come up without its
settings, and nobody would be told.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from images.media import menu
from images.media.base import Parts
from images.media.uki import write_uki
from images.model import Firmware

__all__ = ["MEDIUM"]

_README = """\
Give each loader the file that is for it, by TFTP or HTTP:

  rewind.efi              UEFI firmware's own network start (not iPXE: it would put another command line in)
  boot.ipxe               iPXE, on BIOS and UEFI
  pxelinux.cfg/default    pxelinux
  grub/grub.cfg           GRUB's network image

vmlinuz and initrd are what the last three start. A server that runs as another user must be let in: chmod -R a+rX .
"""


class _Pxe:
    name = "pxe"
    description = "a folder for a network boot server: UKI, kernel, initrd, scripts of iPXE, pxelinux and GRUB"
    suffix = ""
    needs = ("objcopy", "objdump")
    firmware = frozenset({Firmware.BIOS, Firmware.UEFI})
    signable = False

    def make(self, parts: Parts, out: Path) -> None:
        for folder in (out, out / "pxelinux.cfg", out / "grub"):
            folder.mkdir(mode=0o755)
        write_uki(parts, out / "rewind.efi")
        shutil.copyfile(parts.kernel, out / "vmlinuz")
        shutil.copyfile(parts.initrd, out / "initrd")
        (out / "boot.ipxe").write_bytes(menu.ipxe(parts, "vmlinuz", "initrd"))
        (out / "pxelinux.cfg/default").write_bytes(menu.pxelinux(parts, "vmlinuz", "initrd"))
        (out / "grub/grub.cfg").write_bytes(menu.grub(parts, "/vmlinuz", "/initrd"))
        (out / "README").write_text(_README)
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out)}\n"
            for path in sorted(out.rglob("*"))
            if path.is_file()
        ]
        (out / "sha256sums").write_text("".join(lines))


MEDIUM = _Pxe()
