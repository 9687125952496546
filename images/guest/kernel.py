"""The client's kernel file: that it is one, its release, and whether it is signed.

Sources: Linux, Documentation/arch/x86/boot.rst (setup header at 0x1F1); Microsoft, PE format (certificate table).
"""

from __future__ import annotations

import re
import struct

from appliance.errors import GuestUnreadable

__all__ = ["LIMIT", "is_signed", "release_of"]

LIMIT = 128 << 20
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}")


def release_of(kernel: bytes, path: str) -> str:
    """The release that a bzImage says it is (`6.1.0-50-amd64`). Raises GuestUnreadable when it is no bzImage."""
    if len(kernel) < 0x1000 or kernel[0x202:0x206] != b"HdrS" or kernel[0x1FE:0x200] != b"\x55\xaa":
        raise GuestUnreadable(what=f"kernel {path!r} of the guest", reason="it is not a Linux kernel for x86")
    at = struct.unpack_from("<H", kernel, 0x20E)[0] + 0x200
    words = kernel[at : at + 512].partition(b"\0")[0].decode(errors="replace").split()
    if not words or not _RELEASE.fullmatch(words[0]):
        raise GuestUnreadable(what=f"kernel {path!r} of the guest", reason="it does not say which release it is")
    return words[0]


def is_signed(kernel: bytes) -> bool:
    """Whether it is a PE file with a certificate table; whose signature it is and whether it fits is not looked at."""
    if kernel[:2] != b"MZ" or len(kernel) < 0x40:
        return False
    at = struct.unpack_from("<I", kernel, 0x3C)[0]
    optional = at + 24
    if kernel[at : at + 4] != b"PE\0\0" or len(kernel) < optional + 152:
        return False
    directories = optional + {0x20B: 112, 0x10B: 96}.get(struct.unpack_from("<H", kernel, optional)[0], 112)
    if struct.unpack_from("<I", kernel, directories - 4)[0] <= 4:
        return False
    offset, size = struct.unpack_from("<II", kernel, directories + 4 * 8)
    return bool(size) and offset + size <= len(kernel)
