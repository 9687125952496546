"""When the bytes of a segment were written, as finely as somebody wants to see it.

A segment of a quiet guest spans hours of which seconds were busy, so its footer alone does not tell when something
happened. The index says where each record is, and a record has its time: halves are looked at until each takes no
longer than `grain`, so of a segment that is short enough nothing is read, and of the others a few headers for each
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate

from appliance.journal.layout import Entry, Kind
from appliance.journal.segment import Segment

__all__ = ["Burst", "bursts"]

# The wall times of the first and the last record, in nanoseconds, and the bytes of payload from one to the other.
Burst = tuple[int, int, int]


def bursts(segment: Segment, grain: int) -> list[Burst]:
    """In order, with nothing written between two of them; `grain` in nanoseconds. Raises SegmentCorrupt."""
    if segment.footer is not None:
        first, last = sorted((segment.footer.wall_first_ns, segment.footer.wall_last_ns))
        if last - first <= grain:
            return [(first, last, segment.footer.payload)]
    entries = sorted(_all(segment), key=lambda entry: entry.sequence)
    sums = [0, *accumulate(one.length if one.kind in (Kind.WRITE, Kind.MARK) else 0 for one in entries)]

    @cache
    def wall(number: int) -> int:
        return segment.record(entries[number].position, entries[number].sequence).wall_ns

    return list(_split(0, len(entries) - 1, grain, wall, sums)) if entries else []


def _all(segment: Segment) -> Iterator[Entry]:
    for disk in segment.index.disks():
        yield from segment.index.entries(disk)


def _split(low: int, high: int, grain: int, wall: Callable[[int], int], sums: list[int]) -> Iterator[Burst]:
    first, last = sorted((wall(low), wall(high)))
    if low == high or last - first <= grain:
        yield first, last, sums[high + 1] - sums[low]
        return
    middle = (low + high) // 2
    yield from _split(low, middle, grain, wall, sums)
    yield from _split(middle + 1, high, grain, wall, sums)
