"""Sizes, rates and durations: constants, and text in both directions.

Sizes are bytes, durations are seconds. Binary multiples throughout: an admin who types `10G` means what `qemu-img`
means by it.
"""

from __future__ import annotations

import re

__all__ = [
    "CHUNK",
    "GiB",
    "KiB",
    "MiB",
    "TiB",
    "chunks_of",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

# The unit of everything stored: also QEMU's default bitmap granularity and qcow2 cluster, so that a dirty granule is
# exactly one chunk and QEMU's push job writes whole chunks.
CHUNK = 64 * KiB

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?\s*$", re.IGNORECASE)
_NUMBER = re.compile(r"^\d+(?:\.\d+)?$")
_DURATION_PART = re.compile(
    r"(\d+(?:\.\d+)?)\s*(ms|s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?|h(?:(?:ou)?rs?)?|d(?:ays?)?|w(?:eeks?)?)(?![a-z])"
)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def chunks_of(size: int) -> int:
    """Number of chunks of a disk of `size` bytes; the last one may be partly beyond its end."""
    return -(-size // CHUNK)


def parse_size(text: str) -> int:
    """Bytes from `4096`, `64k`, `1.5 GiB`. Raises ValueError with the text in it."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(float(match[1]) * (1 << 10 * " kmgtp".index(match[2].lower() or " ")))


def format_size(size: float) -> str:
    """Three significant figures with a binary unit: `0 B`, `64 KiB`, `1.46 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if abs(size) < 1000 else f"{size:.0f} {unit}"


def parse_duration(text: str) -> float:
    """Seconds from `90`, `500ms`, `15m`, `1h30m`, `2 days`. Raises ValueError with the text in it."""
    stripped = text.strip().lower()
    if _NUMBER.match(stripped):
        return float(stripped)
    parts = _DURATION_PART.findall(stripped)
    if not parts or _DURATION_PART.sub("", stripped).strip():
        raise ValueError(f"not a duration: {text!r}")
    return sum(float(number) * _SECONDS[unit if unit == "ms" else unit[0]] for number, unit in parts)


def format_duration(seconds: float) -> str:
    """`12 ms`, `3.4 s`, `2 m 05 s`, `15 m`, `1 h 04 m`, `3 d 02 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    units = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))
    unit, length, small, part = next(one for one in units if whole >= one[1])
    rest = whole % length // part
    return f"{whole // length} {unit}" + (f" {rest:02d} {small}" if rest else "")
