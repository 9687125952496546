"""Bytes by their place: what every parser of a guest's disk reads from.

    Blocks     the protocol: a size, and reads inside it
    Cached     pages of 64 KiB kept in memory, which is the size of a chunk in the repository
    Called     what a function gives
    Linear     pieces of other Blocks, one behind the other: a partition, a logical volume

Nothing here can write. A read that goes beyond the end is the guest's doing (a length in a hostile superblock), so it
is GuestUnreadable and never a short answer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.errors import GuestUnreadable

__all__ = ["Blocks", "Cached", "Called", "Linear", "Piece", "Window"]

_PAGE = 64 << 10
_PAGES = 1024  # 64 MiB


class Blocks(Protocol):
    """Not thread-safe."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises GuestUnreadable when not all are inside, or none can be had."""
        ...


class Cached:
    """`source` with its last pages in memory. Reads of more than four pages go past the cache: they are contents of
    files, which nobody asks for twice."""

    def __init__(self, source: Blocks) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._pages: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        check_inside(self, offset, length)
        if length > 4 * _PAGE:
            return self._source.read(offset, length)
        first, last = offset // _PAGE, (offset + max(length, 1) - 1) // _PAGE
        data = b"".join(self._page(number) for number in range(first, last + 1))
        start = offset - first * _PAGE
        return data[start : start + length]

    def _page(self, number: int) -> bytes:
        page = self._pages.get(number)
        if page is None:
            at = number * _PAGE
            page = self._pages[number] = self._source.read(at, min(_PAGE, self.size - at))
            if len(self._pages) > _PAGES:
                self._pages.popitem(last=False)
        self._pages.move_to_end(number)
        return page


class Called:
    """What `source(offset, length)` gives, which may be too little."""

    def __init__(self, name: str, size: int, source: Callable[[int, int], bytes]) -> None:
        self.name = name
        self.size = size
        self._source = source

    def read(self, offset: int, length: int) -> bytes:
        check_inside(self, offset, length)
        data = self._source(offset, length)
        if len(data) != length:
            raise GuestUnreadable(what=self.name, reason=f"it gives {len(data)} of {length} bytes at {offset}")
        return data


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes of `source` from `offset`."""

    source: Blocks
    offset: int
    length: int


class Linear:
    """Pieces one behind the other. Raises GuestUnreadable when a piece is not inside its source."""

    def __init__(self, name: str, pieces: Sequence[Piece]) -> None:
        self.name = name
        self._pieces = tuple(pieces)
        self._starts: list[int] = []
        self.size = 0
        for piece in self._pieces:
            check_inside(piece.source, piece.offset, piece.length)
            self._starts.append(self.size)
            self.size += piece.length

    def read(self, offset: int, length: int) -> bytes:
        check_inside(self, offset, length)
        found: list[bytes] = []
        index = bisect_right(self._starts, offset) - 1
        while length:
            piece, within = self._pieces[index], offset - self._starts[index]
            part = min(length, piece.length - within)
            found.append(piece.source.read(piece.offset + within, part))
            offset, length, index = offset + part, length - part, index + 1
        return b"".join(found)


def Window(name: str, source: Blocks, offset: int, length: int) -> Linear:  # noqa: N802 -- it makes one
    """A partition."""
    return Linear(name, [Piece(source, offset, length)])


def check_inside(blocks: Blocks, offset: int, length: int) -> None:
    """Raises GuestUnreadable unless the range is inside."""
    if offset < 0 or length < 0 or offset + length > blocks.size:
        reason = f"{length} bytes at {offset} are asked for and it ends at {blocks.size}"
        raise GuestUnreadable(what=blocks.name, reason=reason)
