"""Kernel modules as files: packed or not, and whether one is what it should be. Content is a guest's: hostile."""

from __future__ import annotations

import lzma
import re
import zlib

import zstandard

from appliance.errors import GuestUnreadable

__all__ = ["LARGEST", "firmware", "plain", "plain_name", "vermagic"]

# In bytes, unpacked. amdgpu, the largest one, has some 25 MB.
LARGEST = 128 << 20

_ELF = b"\x7fELF"


def plain(path: str, data: bytes) -> bytes:
    """A module as the kernel takes it, unpacked (.xz, .zst, .gz) by its file's name. The signature behind it stays.

    Raises GuestUnreadable when it is damaged, larger than LARGEST, or no module.
    """
    try:
        out = _unpacked(path, data)
    except (lzma.LZMAError, zstandard.ZstdError, zlib.error, MemoryError) as error:
        raise GuestUnreadable(what=f"module {path!r}", reason=f"it cannot be unpacked: {error}") from error
    if len(out) > LARGEST:
        raise GuestUnreadable(what=f"module {path!r}", reason=f"it has more than {LARGEST} bytes")
    if not out.startswith(_ELF):
        raise GuestUnreadable(what=f"module {path!r}", reason="it is no ELF file")
    return out


def plain_name(path: str) -> str:
    """The name of the file that `plain` makes."""
    return re.sub(r"\.ko\.(xz|zst|gz)$", ".ko", path)


def vermagic(data: bytes) -> str:
    """The kernel release that an unpacked module was built for; empty when it does not say."""
    found = re.search(rb"(?:^|\0)vermagic=([^\0]{1,255})\0", data)
    return found[1].decode(errors="replace").partition(" ")[0] if found else ""


def firmware(data: bytes) -> tuple[str, ...]:
    """Names of firmware files that an unpacked module may ask for, relative to /lib/firmware."""
    found = re.findall(rb"\0firmware=([^\0]{1,255})\0", data)
    return tuple(sorted({name.decode(errors="replace") for name in found}))


def _unpacked(path: str, data: bytes) -> bytes:
    if path.endswith(".xz"):
        return lzma.LZMADecompressor(memlimit=256 << 20).decompress(data, LARGEST + 1)
    if path.endswith(".zst"):
        return zstandard.ZstdDecompressor(max_window_size=LARGEST).stream_reader(data).read(LARGEST + 1)
    if path.endswith(".gz"):
        return zlib.decompressobj(wbits=31).decompress(data, LARGEST + 1)
    return data
