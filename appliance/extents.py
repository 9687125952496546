"""Extents of a disk, and the arithmetic on lists of them.

A list of extents is sorted by offset and its members do not overlap; every function here takes and gives such lists.
All numbers are bytes. Pure functions; any thread may call them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Extent", "align", "intersect", "merge", "of_chunks", "total", "union"]


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """`length` bytes from `offset`; `zero` tells that they are known to read as zeroes."""

    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes with adjoining extents of one kind joined; the input is sorted and does not overlap."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.end == extent.offset and last.zero == extent.zero:
            last = Extent(last.offset, last.length + extent.length, last.zero)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def union(*lists: Iterable[Extent]) -> Iterator[Extent]:
    """Every byte that is in any of the lists, once; the kind is lost (all come back as data)."""
    last: Extent | None = None
    for extent in sorted((extent for one in lists for extent in one), key=lambda extent: extent.offset):
        if last is None or extent.offset > last.end:
            if last is not None:
                yield last
            last = Extent(extent.offset, extent.length)
        elif extent.end > last.end:
            last = Extent(last.offset, extent.end - last.offset)
    if last is not None:
        yield last


def intersect(extents: Iterable[Extent], start: int, end: int) -> Iterator[Extent]:
    """What of the list lies in `start <= byte < end`."""
    for extent in extents:
        low, high = max(extent.offset, start), min(extent.end, end)
        if low < high:
            yield Extent(low, high - low, extent.zero)


def align(extents: Iterable[Extent], unit: int, size: int) -> Iterator[Extent]:
    """Each extent grown to multiples of `unit`, cut at `size`, joined where they meet; the kind is lost."""
    grown = (
        Extent(low := extent.offset // unit * unit, min(-(-extent.end // unit) * unit, size) - low)
        for extent in extents
        if extent.offset < size
    )
    return union(grown)


def of_chunks(indexes: Iterable[int], chunk: int, size: int) -> Iterator[Extent]:
    """Extents of the chunks with these ascending indexes, cut at `size`, neighbours joined."""
    return merge(
        Extent(index * chunk, min(chunk, size - index * chunk)) for index in indexes if index * chunk < size
    )


def total(extents: Iterable[Extent]) -> int:
    """Number of bytes in the list."""
    return sum(extent.length for extent in extents)
