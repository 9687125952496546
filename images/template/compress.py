"""One packed form for an initrd, the same bytes each time, that the client's kernel can unpack."""

from __future__ import annotations

import gzip
import re

import zstandard

__all__ = ["compress", "knows_zstd"]

# Fixed: another level is another digest.
_LEVEL = 9
_GZIP_LEVEL = 6
_SINCE = (5, 9)


def compress(data: bytes, *, zstd: bool) -> bytes:
    if zstd:
        return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(data)
    return gzip.compress(data, _GZIP_LEVEL, mtime=0)


def knows_zstd(release: str, config: bytes | None) -> bool:
    """By the kernel's configuration, the text of /boot/config-RELEASE, or else by its release: Linux has it since 5.9,
    and no distribution has switched it off since."""
    if config is not None:
        return re.search(rb"^CONFIG_RD_ZSTD=y$", config, re.MULTILINE) is not None
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _SINCE
