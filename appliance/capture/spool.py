"""What lies in a spool folder, for a look every few seconds: names, ages and ids, without opening more than is new.

`journal.Journal` reads records; this asks only what there is to ship and how old it is. The writer seals and forgets
meanwhile: what is gone when it is looked at counts as not there.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.errors import SegmentCorrupt
from appliance.journal.layout import HEADER_MOST, RECORD, RECORD_MAGIC, parse_header

__all__ = ["Sealed", "age", "journal_of", "sealed", "size_of", "unsealed"]

_NAME: Final = re.compile(r"(\d{20})-(\d{20})\.rwj")


@dataclass(frozen=True, slots=True, order=True)
class Sealed:
    """A sealed segment in the spool. It never changes, so name, inode and time tell it from every other one; an inode
    alone is soon given to the next file."""

    first: int
    last: int
    inode: int
    modified: int
    path: Path = field(compare=False)


def _parsed(entry: os.DirEntry[str]) -> Sealed | None:
    """None for other files, and for one that was forgotten meanwhile."""
    match = _NAME.fullmatch(entry.name)
    try:
        status = entry.stat() if match else None
    except FileNotFoundError:
        return None
    if match is None or status is None:
        return None
    return Sealed(int(match[1]), int(match[2]), status.st_ino, status.st_mtime_ns, Path(entry.path))


def sealed(spool: Path) -> list[Sealed]:
    """In order. Raises OSError."""
    with os.scandir(spool) as entries:
        return sorted(one for entry in entries if (one := _parsed(entry)) is not None)


def unsealed(spool: Path) -> list[Path]:
    """In order. Raises OSError."""
    return sorted(path for path in spool.iterdir() if path.suffix == ".open")


def journal_of(path: Path) -> str | None:
    """None when it is gone or cannot be read, which is told when it is shipped."""
    try:
        with path.open("rb") as file:
            return parse_header(path, file.read(HEADER_MOST)).journal.hex()
    except (FileNotFoundError, SegmentCorrupt):
        return None


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def age(path: Path) -> float | None:
    """Seconds since the first record of a segment; None when there is no record, or no such file any more."""
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_MOST + RECORD.size)
        header = parse_header(path, data)
    except (FileNotFoundError, SegmentCorrupt):
        return None
    if len(data) < header.length + RECORD.size:
        return None
    magic, _, _, wall, mono, *_ = RECORD.unpack_from(data, header.length)
    if magic != RECORD_MAGIC:
        return None
    now, then = (time.monotonic_ns(), int(mono)) if header.boot == _boot() else (time.time_ns(), int(wall))
    return max(0.0, (now - then) / 1e9)


def _boot() -> bytes:
    """Empty where the kernel does not tell: then wall times count."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return b""
