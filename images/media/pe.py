"""EFI programs: whether one is signed, and sections put behind those of another.

Format: Microsoft, PE Format. At 0x3C the offset of the letters `PE\\0\\0`; behind them a file header of 20 bytes (the
time at 4), and the optional header (magic 0x20B; sizes at fixed places; the check at 64; from 112 on pairs of address
and size, the fifth of which, at 144, is the table of certificates).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

from appliance.errors import ImageError
from appliance.process import run

__all__ = ["add_sections", "is_signed"]

_PE32_PLUS = 0x20B
_TIME, _CHECK, _CERTIFICATES = 4, 64, 144
_FILE_HEADER = 20
_PAGE = 4096


def is_signed(data: bytes) -> bool:
    """Whether a PE program carries a signature; by whom, firmware and shim judge. False for what is no PE program."""
    header = _optional_header(data)
    if header is None or len(data) < header + _CERTIFICATES + 8:
        return False
    place, size = struct.unpack_from("<II", data, header + _CERTIFICATES)
    return bool(size > 8 and place + size <= len(data))


def add_sections(program: Path, sections: Sequence[tuple[str, Path]], out: Path) -> None:
    """Copy `program` with files as further sections, at addresses of their own behind the others.

    Raises ToolFailed, and ImageError when it is no PE program.
    """
    at = _page(_end(program))
    words: list[str | Path] = []
    for name, file in sections:
        words += ["--add-section", f"{name}={file}", "--change-section-vma", f"{name}={at:#x}"]
        at = _page(at + file.stat().st_size)
    run(["objcopy", *words, program, out])
    _forget_time(out)


def _end(program: Path) -> int:
    """The address behind the last section."""
    shown = run(["objdump", "--section-headers", "--wide", program])
    places = re.findall(r"^\s*\d+\s+\S+\s+([0-9a-f]+)\s+([0-9a-f]+)", shown, re.MULTILINE)
    if not places:
        raise ImageError(reason=f"{program.name} is no EFI program: it has no sections")
    return max(int(size, 16) + int(address, 16) for size, address in places)


def _forget_time(program: Path) -> None:
    """objcopy writes the time of now, and a check over it that firmware does not look at."""
    with program.open("r+b") as file:
        header = _optional_header(file.read(_PAGE))
        if header is None:
            raise ImageError(reason=f"{program.name} is no EFI program")
        for place in (header - _FILE_HEADER + _TIME, header + _CHECK):
            file.seek(place)
            file.write(bytes(4))


def _optional_header(data: bytes) -> int | None:
    if data[:2] != b"MZ" or len(data) < 0x40:
        return None
    start = struct.unpack_from("<I", data, 0x3C)[0]
    header: int = start + 4 + _FILE_HEADER
    if data[start : start + 4] != b"PE\0\0" or len(data) < header + 2:
        return None
    return header if struct.unpack_from("<H", data, header)[0] == _PE32_PLUS else None


def _page(address: int) -> int:
    return (address + _PAGE - 1) & -_PAGE
