"""What a medium is made of, what it can say of itself, and how they are found."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import images.media
from appliance.errors import ImageError, NotSigned
from images.model import Firmware

__all__ = ["Medium", "Parts", "SignedChain", "check_command_line", "media", "medium"]

# The kernel takes 2048 bytes with the NUL at the end (COMMAND_LINE_SIZE of x86).
_LONGEST = 2047


@dataclass(frozen=True, slots=True)
class SignedChain:
    """EFI programs that a firmware with Secure Boot starts, one after the other, up to the client's signed kernel.
    `vendor` is the name of the folder below /EFI where this GRUB looks for its configuration."""

    shim: Path
    grub: Path
    vendor: str


@dataclass(frozen=True, slots=True)
class Parts:
    """What all media of a build have in common. `loaders` is the template's folder (images/template/loaders.py),
    `work` a folder for what is made on the way, which the caller removes. `epoch`: the time that files get, in seconds
    since 1970. `signed` only when the target starts nothing that is not signed. `identity` changes with the content and
    with nothing else: serial numbers and UUIDs are made from it."""

    title: str
    kernel: Path
    initrd: Path
    command_line: str
    loaders: Path
    work: Path
    identity: str
    epoch: int = 0
    console: str = ""
    signed: SignedChain | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For tools that write times: none of now, and none of this machine's time zone."""
        return {"PATH": _PATH, "SOURCE_DATE_EPOCH": str(self.epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"}

    def uuid(self, what: str) -> uuid.UUID:
        """Always the same one for the same content and word."""
        return uuid.UUID(bytes=hashlib.sha256(f"{self.identity}\0{what}".encode()).digest()[:16], version=4)

    def serial(self, what: str) -> str:
        """8 hexadecimal digits, for a FAT file system."""
        return self.uuid(what).hex[:8].upper()


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@runtime_checkable
class Medium(Protocol):
    """Any thread may use it. `suffix` is that of the file, empty for a folder; `needs` the tools by name; `firmware`
    what can start it. `signable`: whether it can carry a chain of signed programs."""

    name: str
    description: str
    suffix: str
    needs: tuple[str, ...]
    firmware: frozenset[Firmware]
    signable: bool

    def make(self, parts: Parts, out: Path) -> None:
        """Write it to `out`. The same parts give the same bytes. Raises ToolFailed, ImageError, NoSpace's OSError;
        what is at `out` then is of no use, and the caller removes it."""
        ...


def media() -> dict[str, Medium]:
    """All media by name: every module of this folder that has a `MEDIUM`."""
    found: dict[str, Medium] = {}
    for module in pkgutil.iter_modules(images.media.__path__):
        one = getattr(importlib.import_module(f"images.media.{module.name}"), "MEDIUM", None)
        if one is not None:
            found[one.name] = one
    return dict(sorted(found.items()))


def medium(name: str, firmware: Firmware, *, target: str, secure_boot: bool) -> Medium:
    """The medium of that name, if this target can start it. Raises ImageError for an unknown one or one for other
    firmware, NotSigned where Secure Boot would refuse it."""
    known = media()
    if name not in known:
        raise ImageError(reason=f"there is no medium {name!r}", hint=f"there are {', '.join(known)}")
    found = known[name]
    if firmware not in found.firmware:
        fitting = ", ".join(one.name for one in known.values() if firmware in one.firmware)
        raise ImageError(
            reason=f"target {target!r} has {firmware.name} firmware, which cannot start medium {name!r}",
            hint=f"it can start {fitting}",
        )
    if secure_boot and not found.signable:
        fitting = ", ".join(one.name for one in known.values() if one.signable)
        raise NotSigned(target=target, what=f"medium {name!r}", hint=f"media that can be signed: {fitting}")
    return found


def check_command_line(line: str) -> None:
    """Raises ImageError for one that the kernel would cut off or a boot loader would misread."""
    if len(line.encode()) > _LONGEST:
        raise ImageError(reason=f"the command line has {len(line.encode())} bytes; a kernel takes {_LONGEST}")
    strange = re.search(r"[^\x20-\x7e]", line)
    if strange:
        raise ImageError(reason=f"the command line has a character that no boot loader passes on: {strange[0]!r}")
    # pxelinux and the kernel's EFI stub split it at every space and load what they find there.
    other = next((word for word in line.split() if word.startswith("initrd=")), "")
    if other:
        raise ImageError(reason=f"the command line has {other!r}, which a boot loader would take for its own")
