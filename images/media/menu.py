"""Configurations of boot loaders that start the one kernel at once. No menu: there is nothing to choose."""

from __future__ import annotations

import re

from appliance.errors import ImageError
from images.media.base import Parts
from images.words import words_of

__all__ = ["grub", "ipxe", "pxelinux"]


def grub(parts: Parts, kernel: str, initrd: str) -> bytes:
    """`kernel` and `initrd` are paths on the volume that GRUB has as its root.

    A word with spaces in quotes stays one, without its quotes: GRUB puts others around it for the kernel, and would put
    a backslash before those that are in it (grub-core/lib/cmdline.c).
    """
    words = (word.replace('"', "") for word in words_of(parts.command_line))
    line = " ".join(_quoted(word) for word in words if word)
    lines = [*_grub_console(parts.console), f"linux {kernel} {line}", f"initrd {initrd}", "boot"]
    return "".join(f"{one}\n" for one in lines).encode()


def ipxe(parts: Parts, kernel: str, initrd: str) -> bytes:
    """With `initrd=` for kernels that are started by their EFI stub, which looks for it by that name, and with the name
    that GRUB would give: on UEFI it is the first word of the command line, and another would be an argument of init.
    Raises ImageError for a word that iPXE acts on: it has no quotes that could keep it from that.

    Source: iPXE, src/core/exec.c (`command_terminator`), src/core/settings.c (`expand_settings`),
    src/image/efi_image.c (`efi_image_cmdline`).
    """
    for word in parts.command_line.split():
        if "${" in word or word in ("||", "&&", ";") or word.startswith("#"):
            raise ImageError(
                reason=f"the command line has the word {word!r}, which iPXE would take for its own",
                hint="a medium other than pxe passes it on",
            )
    words = f"kernel --name BOOT_IMAGE={kernel} {kernel} initrd={initrd} {parts.command_line}"
    return f"#!ipxe\n{words}\ninitrd {initrd}\nboot\n".encode()


def pxelinux(parts: Parts, kernel: str, initrd: str) -> bytes:
    return (
        f"DEFAULT rewind\nPROMPT 0\nLABEL rewind\n  KERNEL {kernel}\n  INITRD {initrd}\n  APPEND {parts.command_line}\n"
    ).encode()


def _grub_console(console: str) -> list[str]:
    serial = re.fullmatch(r"ttyS([0-3])", console.partition(",")[0])
    if not serial:
        return ["terminal_output console"]
    return [f"serial --unit={serial[1]} --speed=115200", "terminal_output console serial"]


def _quoted(word: str) -> str:
    """For GRUB's own language. It has no way to a single quote inside single quotes."""
    if re.fullmatch(r"[A-Za-z0-9_./:=,@%+-]+", word):
        return word
    return "'" + word.replace("'", "'\\''") + "'"
