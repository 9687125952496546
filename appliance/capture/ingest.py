"""What arrives for a recovery point, into the repository: whole chunks at once, parts of chunks joined first.

    write ──► whole chunk ─────────────────────────► put ──► id ──► changes file
       └────► part ──► kept until whole, or flushed ──┘
                       (the rest comes from what the chunk was before)
    zero, trim ──► changes file alone

A write returns when its whole chunks are in a pack: answering earlier was measured to lose chunks without any error.
Parts, and the seal that makes everything durable, are what `flush` is for. The changes are relative to the base map:
a chunk that came again with the content it had there is none, so a disk may be sent whole against any base (after a
bitmap was lost, say) and yields only what differs.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from appliance.capture.changes import ChangesFile
from appliance.errors import NoSpace
from appliance.model import MapRef
from appliance.units import CHUNK

if TYPE_CHECKING:
    from appliance.store import ChunkWriter, Repository

__all__ = ["Counters", "Ingest", "errno_of", "result_path"]

# Parts of chunks kept for one disk. A client that writes in order needs one for each of its connections; with 64 the
# buffers of a disk stay under 4 MiB and one that jumps about still joins most of its neighbours.
_MOST_PARTS = 64
# Locks that keep two writers of one chunk apart. With 256 of them, clients that work in different regions rarely meet.
_STRIPES = 256

_ZEROES = memoryview(bytes(CHUNK))

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(slots=True)
class Counters:
    """Of one disk: bytes that came as data, bytes told to be zero, requests of both kinds."""

    moved: int = 0
    zeroed: int = 0
    writes: int = 0
    zeroes: int = 0


def result_path(results: Path, disk: str) -> Path:
    """Where the changes of a disk are kept."""
    return results / f"{disk}.changes"


def errno_of(error: BaseException) -> int:
    """What an NBD client is told: ENOSPC if something is full, else EIO."""
    full = isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
    return errno.ENOSPC if full else errno.EIO


class Ingest:
    """The disks of one domain on their way into one repository. Any thread may call everything.

    After the first error every call fails with that same error: a result is never sealed that misses something.
    Concurrent calls must not overlap in what they write, as with any disk; if they do, either order may result.
    """

    def __init__(self, repo: Repository, disks: Mapping[str, tuple[int, MapRef | None]], results: Path) -> None:
        """`disks` gives size and base map of each; `results` is an existing folder that the changes go to."""
        self._writer = repo.writer()
        self._disks = {
            name: _Disk(repo, self._writer, size, base, ChangesFile(result_path(results, name), size))
            for name, (size, base) in disks.items()
        }
        self._failed: BaseException | None = None

    def size(self, disk: str) -> int:
        """In bytes. Raises KeyError for a disk that is not ours."""
        return self._disks[disk].size

    def write(self, disk: str, offset: int, data: memoryview) -> None:
        """`data` is used during the call only. Raises StoreError or OSError."""
        self._remembering(self._disks[disk].write, offset, data)

    def zero(self, disk: str, offset: int, length: int) -> None:
        """The range reads as zeroes now. Nothing is stored for it. Raises as `write`."""
        self._remembering(self._disks[disk].zero, offset, length)

    def read(self, disk: str, offset: int, length: int) -> bytearray:
        """What the range holds now: what was written here, else what the base has."""
        return self._remembering(self._disks[disk].read, offset, length)

    def flush(self, disk: str) -> None:
        """Everything of the disk that was answered before is durable, and its changes file is sealed, unless more was
        written meanwhile: then the next flush seals it."""
        self._remembering(self._disks[disk].flush)

    def counters(self, disk: str) -> Counters:
        return self._disks[disk].counters

    def close(self) -> None:
        """Let go of the repository's writer. What was not flushed is nowhere promised."""
        for disk in self._disks.values():
            disk.changes.close()
        self._writer.close()

    def _remembering(self, work: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
        if self._failed is not None:
            raise self._failed
        try:
            return work(*arguments, **named)
        except BaseException as error:
            self._failed = self._failed or error
            raise


class _Part:
    """A chunk that came only partly: its bytes, and which of them are filled, as sorted disjoint ranges."""

    __slots__ = ("data", "filled")

    def __init__(self) -> None:
        self.data = bytearray(CHUNK)
        self.filled: list[tuple[int, int]] = []

    def put(self, start: int, data: memoryview) -> None:
        end = start + len(data)
        self.data[start:end] = data
        apart = [(low, high) for low, high in self.filled if high < start or low > end]
        joined = [both for both in self.filled if both not in apart]
        low = min([start, *(low for low, _ in joined)])
        high = max([end, *(high for _, high in joined)])
        self.filled = sorted([*apart, (low, high)])

    def whole(self, length: int) -> bool:
        return self.filled[:1] == [(0, length)]

    def fill(self, rest: bytes, length: int) -> None:
        """Take what is not filled of the first `length` bytes from the chunk as it was."""
        at = 0
        for low, high in [*self.filled, (length, length)]:
            self.data[at:low] = rest[at:low]
            at = high
        self.filled = [(0, length)]


class _Disk:
    """`_lock` guards the parts' dictionary; the stripe of a chunk guards its part and its place in the changes file.
    A stripe is taken before `_lock`, never two stripes at once."""

    def __init__(self, repo: Repository, writer: ChunkWriter, size: int, base: MapRef | None, changes: ChangesFile):
        self.size = size
        self.changes = changes
        self.counters = Counters()
        self._repo = repo
        self._writer = writer
        self._base = repo.map(base) if base is not None else None
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]
        if base is not None and base.size > size:
            self._cut()

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self.counters.moved += len(data)
            self.counters.writes += 1
        for index, start, stop, at in self._pieces(offset, len(data)):
            piece = data[at : at + stop - start]
            if stop - start == self._length(index):
                self._write_chunk(index, piece)
            else:
                self._write_part(index, start, piece)
        self._make_room()

    def zero(self, offset: int, length: int) -> None:
        with self._lock:
            self.counters.zeroed += length
            self.counters.zeroes += 1
        first, last = -(-offset // CHUNK), (offset + length) // CHUNK
        if offset + length == self.size:
            last = -(-self.size // CHUNK)
        if first < last:
            self._zero_chunks(first, last)
        for index, start, stop, _ in self._edges(offset, length, first, last):
            if not self._is_zero(index):
                self._write_part(index, start, _ZEROES[: stop - start])
        self._make_room()

    def read(self, offset: int, length: int) -> bytearray:
        found = bytearray()
        for index, start, stop, _ in self._pieces(offset, length):
            with self._stripe(index):
                part = self._parts.get(index)
                if part is not None:
                    part.fill(self._content(index), self._length(index))
                found += memoryview(part.data if part is not None else self._content(index))[start:stop]
        return found

    def flush(self) -> None:
        for index in self._part_indexes():
            self._settle_index(index)
        generation = self.changes.generation
        self._writer.flush()
        stats = self._writer.stats
        whole = {"stored": stats.stored_bytes, "new_chunks": stats.new_chunks}
        self.changes.seal(generation, asdict(self.counters) | whole)

    def _cut(self) -> None:
        """The disk has shrunk: bytes beyond its end must not come back when it grows again."""
        index, length = divmod(self.size, CHUNK)
        if length and self._before(index):
            self._record(index, self._writer.put(self._content(index)[:length]))

    def _write_chunk(self, index: int, data: memoryview) -> None:
        with self._stripe(index):
            self._record(index, self._writer.put(data))
            with self._lock:
                self._parts.pop(index, None)

    def _write_part(self, index: int, start: int, data: memoryview) -> None:
        with self._stripe(index):
            self.changes.touch()  # the result lacks this part until the next flush
            with self._lock:
                part = self._parts.get(index) or self._parts.setdefault(index, _Part())
                self._parts.move_to_end(index)
            part.put(start, data)
            if part.whole(self._length(index)):
                self._settle(index, part)

    def _settle(self, index: int, part: _Part) -> None:
        """Put a part's chunk away; the caller holds the stripe."""
        if not part.whole(self._length(index)):
            part.fill(self._content(index), self._length(index))
        self._record(index, self._writer.put(part.data))
        with self._lock:
            self._parts.pop(index, None)

    def _part_indexes(self) -> list[int]:
        with self._lock:
            return list(self._parts)

    def _settle_index(self, index: int) -> None:
        with self._stripe(index):
            part = self._parts.get(index)
            if part is not None:
                self._settle(index, part)

    def _make_room(self) -> None:
        while len(self._parts) > _MOST_PARTS:
            with self._lock:
                oldest = next(iter(self._parts), None)
            if oldest is not None:
                self._settle_index(oldest)

    def _zero_chunks(self, first: int, last: int) -> None:
        for index in self._part_indexes():
            if first <= index < last:
                with self._stripe(index), self._lock:
                    self._parts.pop(index, None)
        self.changes.zero(first, last, self._non_zero_before(first, last))

    def _non_zero_before(self, first: int, last: int) -> Iterator[int]:
        return iter(()) if self._base is None else (index for index, _ in self._base.items(first, last))

    def _record(self, index: int, chunk: bytes) -> None:
        self.changes.set(index, None if chunk == self._before(index) else chunk)

    def _before(self, index: int) -> bytes:
        return self._base.get(index) if self._base is not None else b""

    def _now(self, index: int) -> bytes:
        chunk = self.changes.get(index)
        return self._before(index) if chunk is None else chunk

    def _is_zero(self, index: int) -> bool:
        with self._stripe(index):
            return index not in self._parts and not self._now(index)

    def _content(self, index: int) -> bytes:
        return self._repo.read_chunk(self._now(index))

    def _stripe(self, index: int) -> threading.Lock:
        return self._stripes[index % _STRIPES]

    def _length(self, index: int) -> int:
        """Bytes of the chunk that are on the disk: the last one may be shorter."""
        return min(CHUNK, self.size - index * CHUNK)

    @staticmethod
    def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(chunk, first byte in it, end in it, place in the request) of each chunk the range touches."""
        at = 0
        while at < length:
            index, start = divmod(offset + at, CHUNK)
            stop = min(CHUNK, start + length - at)
            yield index, start, stop, at
            at += stop - start

    def _edges(self, offset: int, length: int, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """The pieces of chunks at both ends of a range that are not whole."""
        if first > last:  # in the middle of one chunk
            yield from self._pieces(offset, length)
            return
        yield from self._pieces(offset, min(first * CHUNK, offset + length) - offset)
        yield from self._pieces(last * CHUNK, offset + length - last * CHUNK)
