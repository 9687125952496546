"""What a kernel module says about itself, read from its ELF file without running anything.

    plain     its bytes, decompressed (.xz, .zst, .gz)      read    → ModInfo

Sources of the formats: ELF-64 (System V ABI), the section `.modinfo` of `KEY=value` ended by NUL (include/linux/
moduleparam.h), the words at the end of a signed module (scripts/sign-file.c). A file may be hostile: every offset is
checked, and nothing larger than 256 MiB is unpacked. Pure functions.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from dataclasses import dataclass

import zstandard

from appliance.errors import GuestUnreadable
from appliance.units import MiB
from images.drivers.tables import Soft, module_name, soft_of

__all__ = ["MOST", "ModInfo", "plain", "read"]

MOST = 256 * MiB
_SIGNATURE = b"~Module signature appended~\n"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_LZMA_MEMORY = 128 * MiB
# A module of graphics has some 900 words about itself, most of them names of firmware.
_WORDS = 50_000


@dataclass(frozen=True, slots=True)
class ModInfo:
    """`release` is the first word of `vermagic`. `depends` are names, with `_`. `firmware` are paths below
    /lib/firmware that it may ask for."""

    name: str
    vermagic: str
    release: str
    depends: tuple[str, ...]
    aliases: tuple[str, ...]
    soft: Soft
    firmware: tuple[str, ...]
    signed: bool


def plain(path: str, data: bytes, most: int = MOST) -> bytes:
    """The module's bytes, by the suffix of its name. Raises GuestUnreadable: damaged, or more than `most` bytes."""
    try:
        if path.endswith(".xz"):
            out = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(data, most + 1)
        elif path.endswith(".gz"):
            out = zlib.decompressobj(wbits=31).decompress(data, most + 1)
        elif path.endswith(".zst"):
            out = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(most + 1)
        else:
            out = data
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise GuestUnreadable(what=f"module {path}", reason=f"it cannot be decompressed ({error})") from error
    if len(out) > most:
        raise GuestUnreadable(what=f"module {path}", reason=f"it has more than {most} bytes")
    return out


def read(path: str, data: bytes) -> ModInfo:
    """Of a module as it lies in its folder, also compressed. Raises GuestUnreadable when it is no kernel module."""
    content = plain(path, data)
    try:
        section = _modinfo(content)
    except (struct.error, IndexError, OverflowError) as error:
        raise GuestUnreadable(what=f"module {path}", reason=f"it is no ELF file of a module ({error})") from error
    words = _words(path, section)
    vermagic = words.get("vermagic", [""])[0]
    if not vermagic:
        raise GuestUnreadable(what=f"module {path}", reason="it does not say for which kernel it is (no vermagic)")
    soft = [soft_of(text) for text in words.get("softdep", [])]
    depends = (one.replace("-", "_") for text in words.get("depends", []) for one in text.split(","))
    return ModInfo(
        name=words.get("name", [module_name(path)])[0].replace("-", "_"),
        vermagic=vermagic.strip(),
        release=vermagic.split(" ")[0],
        depends=tuple(one for one in dict.fromkeys(depends) if one),
        aliases=tuple(words.get("alias", [])),
        soft=Soft(tuple(w for one in soft for w in one.before), tuple(w for one in soft for w in one.behind)),
        firmware=tuple(words.get("firmware", [])),
        signed=content.endswith(_SIGNATURE),
    )


def _words(path: str, section: bytes) -> dict[str, list[str]]:
    records = section.split(b"\0")
    if len(records) > _WORDS:
        raise GuestUnreadable(what=f"module {path}", reason=f"it says more than {_WORDS} things about itself")
    words: dict[str, list[str]] = {}
    for record in records:
        key, _, value = record.decode("utf-8", "replace").partition("=")
        words.setdefault(key, []).append(value)
    return words


def _modinfo(content: bytes) -> bytes:
    """The section of that name. Raises struct.error or IndexError where the file is not what it says."""
    ident, *_, table, _flags, _size, _ph, _phnum, width, count, names = _HEADER.unpack_from(content)
    if ident[:6] != b"\x7fELF\x02\x01" or width != _SECTION.size:
        raise struct.error("not 64 bits, little-endian")
    sections = [_SECTION.unpack_from(content, table + number * width) for number in range(count)]
    _, _, _, _, at, size, *_ = sections[names]
    texts = _cut(content, at, size)
    for name, _kind, _flag, _address, at, size, *_ in sections:
        if texts[name : name + 9] == b".modinfo\0":
            return _cut(content, at, size)
    raise IndexError("no section .modinfo")


def _cut(content: bytes, at: int, size: int) -> bytes:
    if at + size > len(content):
        raise IndexError("a section behind the end")
    return content[at : at + size]
