"""Files as objects, in parts: opaque bytes under a name, sealed, each readable in pieces.

    NAME            the first 16 MiB of the file; put last, it makes the whole exist
    NAME.N          the 16 MiB number N = 1, 2 … of a longer one

    header   "RWSG" | version u8 | flags u8 (1 = encrypted) | 0 u16
    frame*   sealed, compressed: 1 MiB of the file each, the file's last one what is left
    table    sealed: size of the file u64 | its checksum[16] | parts u32 | this part u32 | lengths of frames u24 BE
    footer   salt[16] | length of the table u32 | frames u32 | "RWS" | version u8

A file may have some GiB and objects are small everywhere else: parts keep the memory of both sides and what a broken
connection costs at 16 MiB. A part says of which whole it is one, so one that a killed writer left is used by the next.
FORMAT.md is normative (it calls these files segments, which were the first of them).
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from appliance.errors import AlreadyExists, IntegrityError, ObjectNotFound, VersionUnsupported
from appliance.store.backend.base import Backend
from appliance.store.codec import OVERHEAD, SALT_SIZE, Box, Codec, compress, decompress

__all__ = ["FRAME", "PART", "VERSION", "delete", "fetch", "prove", "put", "read"]

VERSION: Final = 1
FRAME: Final = 1 << 20
PART: Final = 16 * FRAME

_HEADER: Final = struct.Struct("<4sBBH")
_TABLE: Final = struct.Struct("<Q16sII")
_FOOTER: Final = struct.Struct("<16sII3sB")
_HEADER_MAGIC, _FOOTER_MAGIC = b"RWSG", b"RWS"
_TABLE_LABEL, _FRAME_LABEL = b"\x00", b"\x01"
# Brings the table of a full part.
_TAIL: Final = _TABLE.size + 3 * (PART // FRAME) + OVERHEAD + _FOOTER.size


@dataclass(frozen=True, slots=True)
class _Table:
    """What a part says: `size` and `checksum` of the whole file, and where its own frames lie in the object."""

    box: Box
    size: int
    checksum: bytes
    parts: int
    part: int
    places: tuple[tuple[int, int], ...]

    def same_file(self, other: _Table) -> bool:
        return (self.size, self.checksum) == (other.size, other.checksum)


def put(
    backend: Backend, codec: Codec, whole: str, path: Path, pace: Callable[[int], None] | None = None
) -> tuple[int, int]:
    """Store the file, which nobody changes meanwhile, under the name `whole`; durable on return. (bytes stored, parts).
    `pace` is told the bytes of each object before it goes out, and may wait. Memory: a few parts.

    Again with the same content is no error: what is there is read and compared, and stored anew where it is damaged.
    Raises AlreadyExists when a sound file of that name has another content, OSError of the file, and what the
    backend raises; parts may have been stored then, which the next try uses and `delete` removes.
    """
    with path.open("rb") as file:
        size, checksum = _measure(file, codec)
        stored, parts = 0, _parts(size)
        for part in reversed(range(parts)):
            data = _build(file, codec, _part_name(whole, part), _TABLE.pack(size, checksum, parts, part))
            if pace is not None:
                pace(len(data))
            stored += _create(backend, codec, _part_name(whole, part), data)
    return stored, parts


def fetch(backend: Backend, codec: Codec, whole: str, path: Path) -> None:
    """Write the file; it has its name only when every byte of it is proved and durable. One caller for one path.

    Raises ObjectNotFound, IntegrityError, VersionUnsupported, OSError, and what the backend raises; `path` is as before
    then. What a kill leaves is `.NAME.fetching`, which the next call uses.
    """
    temporary = path.with_name(f".{path.name}.fetching")
    try:
        with temporary.open("wb") as file:
            for piece in _content(backend, codec, whole):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:  # also Ctrl-C: half a file must not stay
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(backend: Backend, codec: Codec, whole: str, offset: int = 0, length: int | None = None) -> bytes:
    """`length` bytes of the file from `offset` (None: to the end; negative: so many before the end), fewer beyond it.
    Moves whole frames and the tables of their parts. Raises as `fetch`.
    """
    first = table = _load_table(backend, codec, whole, 0)
    start = max(0, first.size + offset) if offset < 0 else min(offset, first.size)
    end = first.size if length is None else min(first.size, start + length)
    pieces = []
    for number in range(start // FRAME, -(-end // FRAME)):
        part, frame = divmod(number, PART // FRAME)
        if part != table.part:
            table = _load_table(backend, codec, whole, part, first)
        name, (at, long) = _part_name(whole, part), table.places[frame]
        plain = _frame(table, name, frame, _get(backend, name, part, at, long))
        pieces.append(plain[max(0, start - number * FRAME) : end - number * FRAME])
    return b"".join(pieces)


def prove(backend: Backend, codec: Codec, whole: str, read_data: bool) -> int:
    """That each part is there and fits the others, and with `read_data` that every byte can be read; bytes read.

    Raises IntegrityError, VersionUnsupported, ObjectNotFound when it is gone, and what the backend raises.
    """
    if read_data:
        return sum(map(len, _content(backend, codec, whole)))
    first = _load_table(backend, codec, whole, 0)
    for part in range(1, first.parts):
        _load_table(backend, codec, whole, part, first)
    return 0


def delete(backend: Backend, whole: str) -> None:
    """No error when it is gone. Killed in between: what is left is not whole, and listed as such."""
    backend.delete(whole)
    for info in list(backend.list(whole + ".")):
        backend.delete(info.name)


# Writing


def _measure(file: BinaryIO, codec: Codec) -> tuple[int, bytes]:
    summing, size = codec.summing(), 0
    while piece := file.read(FRAME):
        summing.update(piece)
        size += len(piece)
    return size, summing.digest(16)


def _parts(size: int) -> int:
    return max(1, -(-size // PART))


def _part_name(whole: str, part: int) -> str:
    return f"{whole}.{part}" if part else whole


def _build(file: BinaryIO, codec: Codec, name: str, table: bytes) -> bytearray:
    """The object of a part."""
    size, _, _, part = _TABLE.unpack(table)
    salt = secrets.token_bytes(SALT_SIZE)
    box = codec.box("segment", salt)
    data = bytearray(_HEADER.pack(_HEADER_MAGIC, VERSION, int(codec.encrypted), 0))
    count = -(-min(PART, size - part * PART) // FRAME)
    for frame in range(count):
        file.seek(part * PART + frame * FRAME)
        sealed = box.seal(len(data), _FRAME_LABEL + name.encode(), compress(file.read(FRAME)))
        data += sealed
        table += len(sealed).to_bytes(3, "big")
    sealed = box.seal(len(data), _TABLE_LABEL + name.encode(), table)
    data += sealed
    data += _FOOTER.pack(salt, len(sealed), count, _FOOTER_MAGIC, VERSION)
    return data


def _create(backend: Backend, codec: Codec, name: str, data: bytearray) -> int:
    """Bytes that are stored under that name now."""
    for _ in range(2):
        try:
            backend.put(name, data)
            return len(data)
        except AlreadyExists:
            try:
                there = backend.get(name)
                if not _equal(codec, name, there, bytes(data)):
                    raise
                return len(there)
            except ObjectNotFound:
                continue  # deleted since
            except IntegrityError:
                # It is of no use to anybody, and here is what it should be.
                backend.delete(name)
    backend.put(name, data)
    return len(data)


def _equal(codec: Codec, name: str, there: bytes, here: bytes) -> bool:
    """Whether both hold the same part of the same file. Raises IntegrityError, VersionUnsupported for `there`."""
    ours, theirs = _open_table(codec, name, here, len(here)), _open_table(codec, name, there, len(there))
    pairs = zip(_frames(ours, name, here), _frames(theirs, name, there), strict=False)
    return all(a == b for a, b in pairs) and ours.same_file(theirs)


# Reading


def _content(backend: Backend, codec: Codec, whole: str) -> Iterator[bytes]:
    """The file, frame by frame; the checksum of the whole is compared at the end."""
    summing, first, part = codec.summing(), None, 0
    while first is None or part < first.parts:
        name = _part_name(whole, part)
        data = _get(backend, name, part)
        table = _open_table(codec, name, data, len(data), part)
        first = first or table
        _fits(name, table, first)
        for plain in _frames(table, name, data):
            summing.update(plain)
            yield plain
        part += 1
    if summing.digest(16) != first.checksum:
        raise IntegrityError(object=whole, reason="the checksum of the whole is wrong")


def _get(backend: Backend, name: str, part: int, offset: int = 0, length: int | None = None) -> bytes:
    try:
        return backend.get(name, offset, length)
    except ObjectNotFound as error:
        if part:
            raise IntegrityError(object=name, reason="this part is gone") from error
        raise


def _load_table(backend: Backend, codec: Codec, whole: str, part: int, first: _Table | None = None) -> _Table:
    name = _part_name(whole, part)
    try:
        size = backend.stat(name).size
    except ObjectNotFound as error:
        if part:
            raise IntegrityError(object=name, reason="this part is gone") from error
        raise
    start = max(0, size - _TAIL)
    table = _open_table(codec, name, _get(backend, name, part, start, size - start), size, part)
    _fits(name, table, first or table)
    return table


def _fits(name: str, table: _Table, first: _Table) -> None:
    if not table.same_file(first):
        raise IntegrityError(object=name, reason="it is a part of another file")


def _open_table(codec: Codec, name: str, tail: bytes, size: int, part: int | None = None) -> _Table:
    """From the last bytes of an object of `size` bytes. Raises IntegrityError, VersionUnsupported."""
    if len(tail) < min(size, _TAIL) or size < _HEADER.size + OVERHEAD + _FOOTER.size:
        raise IntegrityError(object=name, reason="it is cut short")
    salt, length, count, magic, version = _FOOTER.unpack_from(tail, len(tail) - _FOOTER.size)
    if magic != _FOOTER_MAGIC:
        raise IntegrityError(object=name, reason="it does not end as a file in parts does, so it is cut or overwritten")
    if version != VERSION:
        raise VersionUnsupported(object=name, version=version, supported=VERSION)
    offset, end = size - _FOOTER.size - length, len(tail) - _FOOTER.size
    if length != _TABLE.size + 3 * count + OVERHEAD or offset < _HEADER.size or length > end:
        raise IntegrityError(object=name, reason="its footer contradicts itself")
    box = codec.box("segment", salt)
    try:
        plain = box.open(offset, _TABLE_LABEL + name.encode(), tail[end - length : end])
    except IntegrityError as error:
        raise IntegrityError(object=name, reason=f"table: {error.fields['reason']}") from error
    return _parse_table(name, box, plain, offset, part)


def _parse_table(name: str, box: Box, plain: bytes, end: int, part: int | None) -> _Table:
    size, checksum, parts, number = _TABLE.unpack_from(plain)
    places, offset = [], _HEADER.size
    for start in range(_TABLE.size, len(plain), 3):
        length = int.from_bytes(plain[start : start + 3], "big")
        places.append((offset, length))
        offset += length
    frames = -(-min(PART, size - number * PART) // FRAME)
    if (offset, parts, len(places)) != (end, _parts(size), frames) or number >= parts or part not in {None, number}:
        raise IntegrityError(object=name, reason="its frames and its table do not meet")
    return _Table(box, size, checksum, parts, number, tuple(places))


def _frames(table: _Table, name: str, data: bytes) -> Iterator[bytes]:
    if data[:5] != _HEADER_MAGIC + bytes([VERSION]):
        raise IntegrityError(object=name, reason="it does not begin as a segment does")
    for frame, (offset, length) in enumerate(table.places):
        yield _frame(table, name, frame, data[offset : offset + length])


def _frame(table: _Table, name: str, frame: int, sealed: bytes) -> bytes:
    try:
        plain = decompress(table.box.open(table.places[frame][0], _FRAME_LABEL + name.encode(), sealed), FRAME)
    except (IntegrityError, ValueError) as error:
        reason = error.fields["reason"] if isinstance(error, IntegrityError) else str(error)
        raise IntegrityError(object=name, reason=f"frame {frame}: {reason}") from error
    if len(plain) != min(FRAME, table.size - table.part * PART - frame * FRAME):
        raise IntegrityError(object=name, reason=f"frame {frame} has {len(plain)} bytes")
    return plain
