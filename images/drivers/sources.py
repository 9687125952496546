"""The kernel modules in a folder, a Debian package or an RPM, one after the other; nothing of a package is run.

    modules_in   → (path as it stands there, bytes)

Packages are read by ourselves and not by their tools: only regular files whose name ends like a module's are taken, so
there are no links, owners, scripts or paths that a tool could be led astray by. What calls this decides where they go.

Sources of the formats: deb(5), ar(5); the RPM file format 4 (lead, two headers, payload) and cpio's `newc` (070701).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from appliance.errors import ImageError
from appliance.units import GiB, MiB
from images.drivers.modinfo import MOST

__all__ = ["DriversRefused", "modules_in"]

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")
# Debian's generic kernel has 4000 modules and 400 MiB.
_MODULES = 20_000
_TOGETHER = 8 * GiB
_HEADER_BYTES = 64 * MiB
_BLOCK = MiB
_AR_HEAD = 60
_CPIO_HEAD = 110
_RPM_LEAD = 96


class DriversRefused(ImageError):
    template = "drivers in {path!r} cannot be used: {reason}"


def modules_in(path: Path) -> Iterator[tuple[str, bytes]]:
    """Raises DriversRefused: it is none of the three, it is damaged, a path in it leads out, or a limit is exceeded
    (20 000 modules, 8 GiB together, 256 MiB each)."""
    count = total = 0
    for name, data in _open(path):
        count, total = count + 1, total + len(data)
        if count > _MODULES or total > _TOGETHER:
            raise DriversRefused(path=str(path), reason=f"it has more than {_MODULES} modules or {_TOGETHER} bytes")
        yield name, data


def _open(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        return _of_folder(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DriversRefused(path=str(path), reason=error.strerror or str(error)) from error
    if start == b"!<arch>\n":
        return _guarded(path, _of_deb(path))
    if start.startswith(b"\xed\xab\xee\xdb"):
        return _guarded(path, _of_rpm(path))
    if path.name.endswith(_SUFFIXES):
        return iter([(path.name, _limited(path, path.name, path.read_bytes()))])
    raise DriversRefused(path=str(path), reason="it is no folder, .deb, .rpm or module")


def _guarded(path: Path, members: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    try:
        yield from members
    except (
        OSError, EOFError, ValueError, OverflowError, struct.error, tarfile.TarError, lzma.LZMAError, zlib.error,
        zstandard.ZstdError,
    ) as error:  # fmt: skip
        raise DriversRefused(path=str(path), reason=f"it is damaged ({error})") from error


def _limited(path: Path, name: str, data: bytes) -> bytes:
    if len(data) > MOST:
        raise DriversRefused(path=str(path), reason=f"{name} has more than {MOST} bytes")
    return data


# --- a folder -------------------------------------------------------------------------------------------------------


def _of_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """Paths are absolute, so that a folder inside /lib/modules/RELEASE still tells the release. Links are not
    followed."""
    for folder, folders, files in os.walk(path.resolve()):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            if name.endswith(_SUFFIXES) and file.is_file() and not file.is_symlink():
                if file.stat().st_size > MOST:
                    raise DriversRefused(path=str(path), reason=f"{file} has more than {MOST} bytes")
                yield str(file), file.read_bytes()


# --- a Debian package -----------------------------------------------------------------------------------------------


def _of_deb(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(_AR_HEAD)) == _AR_HEAD:
            name, size = head[:16].decode("ascii", "replace").strip().rstrip("/"), int(head[48:58])
            if name.startswith("data.tar"):
                yield from _of_tar(path, _unpacked(_Window(file, size), name.rpartition(".")[2]))
                return
            file.seek(size + size % 2, os.SEEK_CUR)
    raise DriversRefused(path=str(path), reason="it has no data.tar")


def _of_tar(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not member.isreg() or not member.name.endswith(_SUFFIXES):
                continue
            if member.size > MOST:
                raise DriversRefused(path=str(path), reason=f"{member.name} has more than {MOST} bytes")
            content = tar.extractfile(member)
            if content is not None:
                yield member.name, content.read()


class _Window(io.RawIOBase):
    """The next bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _unpacked(raw: io.RawIOBase, kind: str) -> IO[bytes]:
    packed = io.BufferedReader(raw, _BLOCK)
    if kind == "xz":
        return lzma.LZMAFile(packed)
    if kind == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), _BLOCK)
    if kind == "bz2":
        return bz2.BZ2File(packed)
    if kind == "zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True), _BLOCK)
    return packed


# --- an RPM ---------------------------------------------------------------------------------------------------------


def _of_rpm(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        file.seek(_RPM_LEAD)
        # The signature's header is filled up to eight bytes, the package's own is not.
        signature = _skip_header(path, file)
        file.seek(-signature % 8, os.SEEK_CUR)
        _skip_header(path, file)
        start = file.read(6)
        file.seek(-len(start), os.SEEK_CUR)
        size = path.stat().st_size - file.tell()
        yield from _of_cpio(path, _unpacked(_Window(file, size), _kind_of(start)))


def _skip_header(path: Path, file: IO[bytes]) -> int:
    """Bytes of the header's index and store."""
    magic, _, entries, store = struct.unpack(">4s4sII", file.read(16))
    size: int = 16 * entries + store
    if magic != b"\x8e\xad\xe8\x01" or size > _HEADER_BYTES:
        raise DriversRefused(path=str(path), reason="it is damaged (no header)")
    file.seek(size, os.SEEK_CUR)
    return size


def _kind_of(start: bytes) -> str:
    kinds = {b"\xfd7zXZ": "xz", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst", b"07070": ""}
    for mark, kind in kinds.items():
        if start.startswith(mark):
            return kind
    raise ValueError("its payload is packed in an unknown way")


def _of_cpio(path: Path, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    while True:
        head = _exactly(stream, _CPIO_HEAD)
        if head[:6] not in (b"070701", b"070702"):
            raise ValueError("its payload is no cpio archive (newc)")
        mode, size, length = (int(head[at : at + 8], 16) for at in (14, 54, 94))
        if length > 4096:
            raise ValueError("a name in it has more than 4096 bytes")
        name = _exactly(stream, length + -(_CPIO_HEAD + length) % 4)[: length - 1].decode("utf-8", "replace")
        if name == "TRAILER!!!":
            return
        wanted = mode & 0o170000 == 0o100000 and name.endswith(_SUFFIXES)
        if wanted and size > MOST:
            raise DriversRefused(path=str(path), reason=f"{name} has more than {MOST} bytes")
        padded = size + -size % 4
        if wanted:
            yield name, _exactly(stream, padded)[:size]
        else:
            _skip(stream, padded)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data


def _skip(stream: IO[bytes], size: int) -> None:
    while size:
        size -= len(_exactly(stream, min(size, _BLOCK)))
