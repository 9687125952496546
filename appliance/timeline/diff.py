"""In what two instants of a disk differ: chunks by their maps, blocks inside them by their contents.

    changed_chunks    from the maps alone; equal subtrees are skipped, nothing is read
    refine            reads both contents of those chunks and compares them block by block
    changed_extents   both as extents
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from appliance.extents import Extent, merge
from appliance.model import MapRef
from appliance.units import CHUNK, KiB

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["changed_chunks", "changed_extents", "full_mask", "refine"]

# Results that a thread may be ahead of the reader: with two threads at most 4 MiB of opened chunks are alive.
_AHEAD = 16

_ZERO = bytes(CHUNK)


def changed_chunks(repo: Repository, a: MapRef | None, b: MapRef | None) -> Iterator[int]:
    """Ascending indexes of the chunks that differ; None is a disk of zeroes."""
    return repo.diff(a, b)


def full_mask(unit: int) -> int:
    """The mask that says "all of the chunk differs"."""
    return (1 << CHUNK // unit) - 1


def refine(
    repo: Repository,
    a: MapRef | None,
    b: MapRef | None,
    indexes: Iterable[int],
    unit: int = 4 * KiB,
    threads: int = 2,
    budget: int | None = None,
) -> Iterator[tuple[int, int]]:
    """(index, mask) for each of the chunks in the order given; bit i of the mask: its block i of `unit` bytes differs.

    `unit` is a power of two from 512 to 64 KiB. Chunks that turn out to be equal are left out. From chunk number
    `budget` on nothing is read any more and everything is said to differ: exactness costs two reads a chunk, and
    beyond some amount moving too much is cheaper. Raises what reading a chunk raises, where its turn comes.
    """
    if unit not in (512 << power for power in range(8)):
        raise ValueError(f"unit {unit} is not a power of two from 512 to {CHUNK}")
    compare = _Comparison(repo, a, b, unit)
    waiting: deque[tuple[int, Future[int]]] = deque()
    rest = iter(indexes)
    with ThreadPoolExecutor(threads, "refine") as pool:
        try:
            for number, index in enumerate(rest):
                if budget is not None and number >= budget:
                    rest = _prepended(index, rest)
                    break
                waiting.append((index, pool.submit(compare.mask, index)))
                if len(waiting) > _AHEAD * threads:
                    yield from _next(waiting)
            while waiting:
                yield from _next(waiting)
        finally:
            pool.shutdown(cancel_futures=True)
    for index in rest:
        yield index, full_mask(unit)


def changed_extents(
    repo: Repository, a: MapRef | None, b: MapRef | None, unit: int = CHUNK, budget: int | None = None
) -> Iterator[Extent]:
    """What of `b` differs from `a`, cut at the size of `b`; at chunks by default, which reads nothing."""
    size = b.size if b is not None else a.size if a is not None else 0
    indexes = changed_chunks(repo, a, b)
    if unit == CHUNK:
        masks: Iterator[tuple[int, int]] = ((index, 1) for index in indexes)
    else:
        masks = refine(repo, a, b, indexes, unit, budget=budget)
    return merge(_blocks(masks, unit, size))


class _Comparison:
    """Both disks' contents, compared chunk by chunk. Any thread may call `mask`."""

    def __init__(self, repo: Repository, a: MapRef | None, b: MapRef | None, unit: int) -> None:
        self._read = repo.read_chunk
        self._maps = [repo.map(ref) if ref is not None else None for ref in (a, b)]
        self._blocks = [(1 << number, start, start + unit) for number, start in enumerate(range(0, CHUNK, unit))]

    def mask(self, index: int) -> int:
        old, new = (one.get(index) if one is not None else b"" for one in self._maps)
        if old == new:
            return 0
        before = self._read(old) if old else _ZERO
        after = self._read(new) if new else _ZERO
        return sum(bit for bit, start, end in self._blocks if before[start:end] != after[start:end])


def _next(waiting: deque[tuple[int, Future[int]]]) -> Iterator[tuple[int, int]]:
    index, future = waiting.popleft()
    mask = future.result()
    if mask:
        yield index, mask


def _prepended(first: int, rest: Iterator[int]) -> Iterator[int]:
    yield first
    yield from rest


def _blocks(masks: Iterable[tuple[int, int]], unit: int, size: int) -> Iterator[Extent]:
    for index, mask in masks:
        for number in range(mask.bit_length()):
            offset = index * CHUNK + number * unit
            if mask >> number & 1 and offset < size:
                yield Extent(offset, min(unit, size - offset))
