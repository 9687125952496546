"""The changes of one disk since its base map: a file that the intake writes and outlives it.

    0      magic "RWCH1\\n", state ("o" open, "s" sealed), one line of JSON: size of the disk, counters; to 4096
    4096   16 bytes for each chunk of the disk, by index:
             0…0   as in the base map
             f…f   all zero now
             else  the id of the chunk's new content

It is sorted by construction, may be written in any order by several threads, takes room on disk only where something
changed (it is sparse, 4 KiB for up to 256 neighbouring chunks), and costs no memory: a first full of a large disk would
need 150 bytes a chunk as a Python mapping. It is a means of one epoch on one machine, not part of the repository.

*Sealed* means: every change in it is in the repository and durable there.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from appliance.errors import CaptureError
from appliance.units import chunks_of

__all__ = ["ID_LENGTH", "ChangesFile", "read_changes", "read_header"]

ID_LENGTH = 16

_HEADER = 4096
_MAGIC = b"RWCH1\n"
_SAME = bytes(ID_LENGTH)
_ZERO = b"\xff" * ID_LENGTH
# Entries read at once (64 KiB of the file), and those in a page.
_BLOCK = 4096
_PAGE = 256
_EMPTY_PAGE = bytes(_PAGE * ID_LENGTH)


class ChangesFile:
    """The writing side. `get`, `set` and `clear` may be called by any thread; one chunk by one thread at a time.

    `None` stands for "as in the base", b"" for an all-zero chunk, as everywhere else. OSError passes through.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Make it anew; what was there is lost."""
        self.path = path
        self._size = size
        self._lock = threading.Lock()  # guards the generation and the state in the header
        self._generation = 0
        self._sealed = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, _HEADER + chunks_of(size) * ID_LENGTH)
        self._write_header(b"o", {})

    @property
    def generation(self) -> int:
        """Grows with every change; `seal` wants the one that was read before the repository was flushed."""
        return self._generation

    def get(self, index: int) -> bytes | None:
        return _decode(os.pread(self._file, ID_LENGTH, _at(index)))

    def set(self, index: int, chunk: bytes | None) -> None:
        """Record the id of the chunk's new content."""
        self.touch()
        os.pwrite(self._file, _encode(chunk), _at(index))
        self.touch()  # also for a seal that was begun in between

    def touch(self) -> None:
        """Something is to change: what was sealed is so no more."""
        with self._lock:
            self._generation += 1
            if self._sealed:
                self._sealed = False
                os.pwrite(self._file, b"o", len(_MAGIC))

    def zero(self, start: int, stop: int, non_zero: Iterator[int]) -> None:
        """Record chunks `start <= index < stop` as all zero; `non_zero` are those that are not so in the base,
        ascending. Without any, holes of the file are skipped: a cleared terabyte costs one system call."""
        self.touch()
        following = next(non_zero, stop)
        at = start
        while at < stop:
            if following >= min(_page_end(at), stop):
                at = min(self._next_entry(at), following, stop)
            end = min(_page_end(at), stop)
            block = bytearray(ID_LENGTH * (end - at))
            while following < end:
                position = ID_LENGTH * (following - at)
                block[position : position + ID_LENGTH] = _ZERO
                following = next(non_zero, stop)
            if block:
                os.pwrite(self._file, block, _at(at))
            at = end
        self.touch()

    def seal(self, generation: int, counters: Mapping[str, Any]) -> bool:
        """Make it durable and mark it sealed, unless something changed since `generation`; whether it is sealed."""
        os.fdatasync(self._file)
        with self._lock:
            self._sealed = generation == self._generation
            self._write_header(b"s" if self._sealed else b"o", counters)
        os.fdatasync(self._file)
        return self._sealed

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _next_entry(self, index: int) -> int:
        """The first index at or after this whose place in the file is not a hole."""
        found = _seek_data(self._file, _at(index))
        return chunks_of(self._size) if found is None else max(index, (found - _HEADER) // ID_LENGTH)

    def _write_header(self, state: bytes, counters: Mapping[str, Any]) -> None:
        text = json.dumps({"size": self._size, **counters}).encode() + b"\n"
        os.pwrite(self._file, (_MAGIC + state + text).ljust(_HEADER, b"\0"), 0)


class _Reader:
    def __init__(self, path: Path) -> None:
        try:
            self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CaptureError(reason=f"the intake left no result {path.name}: {error.strerror}") from error
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def header(self) -> dict[str, Any]:
        head = os.pread(self.file, _HEADER, 0)
        if not head.startswith(_MAGIC + b"s"):
            raise CaptureError(
                reason=f"the intake's result {self.path.name} is not complete",
                hint="its writer never flushed, or died before; nothing is lost: the epoch is repeated",
            )
        found: dict[str, Any] = json.loads(head[len(_MAGIC) + 1 : head.index(b"\n", len(_MAGIC) + 1)])
        return found


def read_header(path: Path) -> dict[str, Any]:
    """Size and counters of a sealed file. Raises CaptureError when it is not there or not sealed."""
    with _Reader(path) as reader:
        return reader.header()


def read_changes(path: Path) -> Iterator[tuple[int, bytes]]:
    """(index, id) of every chunk that changed, ascending; b"" for all zero. Raises CaptureError, before the first."""
    with _Reader(path) as reader:
        end = chunks_of(int(reader.header()["size"]))
        at = 0
        while (found := _seek_data(reader.file, _at(at))) is not None:
            at = max(at, (found - _HEADER) // ID_LENGTH)
            if at >= end:
                return
            block = os.pread(reader.file, ID_LENGTH * min(_BLOCK, end - at), _at(at))
            yield from _entries(block, at)
            at += len(block) // ID_LENGTH


def _entries(block: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(block), len(_EMPTY_PAGE)):
        if block.startswith(_EMPTY_PAGE, start):
            continue  # holes come as zeroes
        for position in range(start, min(start + len(_EMPTY_PAGE), len(block)), ID_LENGTH):
            entry = block[position : position + ID_LENGTH]
            if entry != _SAME:
                yield first + position // ID_LENGTH, b"" if entry == _ZERO else entry


def _seek_data(file: int, offset: int) -> int | None:
    try:
        return os.lseek(file, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from there on
            return None
        raise


def _page_end(index: int) -> int:
    """The first index of the next page of the file: zeroes written beyond it would fill its holes."""
    return (index // _PAGE + 1) * _PAGE


def _at(index: int) -> int:
    return _HEADER + index * ID_LENGTH


def _encode(chunk: bytes | None) -> bytes:
    return _SAME if chunk is None else (chunk or _ZERO)


def _decode(entry: bytes) -> bytes | None:
    if entry == _SAME:
        return None
    return b"" if entry == _ZERO else entry
