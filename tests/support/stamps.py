"""Is this set of disk images exactly the state after some op N of each writer? The host's side of `tiny.c`.

    op k of writer w  ->  disk k % disks, a slot, stamp or zero         (pure, so it can be replayed here)
    image slot        ->  0 (all zero) or the op whose stamp fills it

`check` finds N for each writer and compares every slot of every disk with the replay: it accepts a set of images only
if they are one instant across disks.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Layout", "State", "check", "file_reader"]

SECTOR = 512
SLOT_SIZES = (4096, 12288, 4096)
# So many ops in a row of which nothing is to be seen are hardly ever there.
_TRACELESS = 64
_MASK = (1 << 64) - 1
_HEAD = struct.Struct("<8sIIQQQII")
# (magic, writer, disk, seq, gen, offset, length, crc)

Reader = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the writers write; must be what the guest was booted with. `span` is bytes of each writer on each disk."""

    disks: int
    seed: int = 1
    span: int = 4 << 20
    base: int = 1 << 20

    def slots(self, writer: int) -> int:
        return self.span // SLOT_SIZES[writer]

    def offset(self, writer: int, slot: int) -> int:
        return self.base + writer * self.span + slot * SLOT_SIZES[writer]

    @property
    def end(self) -> int:
        """First byte behind all that is stamped."""
        return self.base + len(SLOT_SIZES) * self.span


@dataclass(slots=True)
class State:
    """`seq` is N of each writer. `wrong` counts slots that are not as they are after N; `messages` names the first."""

    seq: tuple[int, ...] = ()
    wrong: int = 0
    messages: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.wrong == 0

    def note(self, text: str) -> None:
        self.wrong += 1
        if len(self.messages) < 10:
            self.messages.append(text)


def check(readers: Sequence[Reader], layout: Layout, expected: Sequence[int] = (0, 0, 0)) -> State:
    """`readers[i](offset, length)` gives bytes of disk i. Never raises for wrong content: it is in the result.

    Zeroing what is zero changes nothing, so two N can be the same state: `expected` is preferred, else the smallest.
    """
    state = State()
    state.seq = tuple(_check_writer(readers, layout, w, state, expected[w]) for w in range(len(SLOT_SIZES)))
    return state


def file_reader(path: str) -> Reader:
    """Reader of a raw image."""

    def read(offset: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return read


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _op(layout: Layout, writer: int, k: int) -> tuple[int, int, bool]:
    """(disk, slot, whether it zeroes) of op k."""
    r = _mix(_mix(layout.seed) ^ (writer << 56) ^ k)
    return k % layout.disks, (r & 0xFFFFFFFF) % layout.slots(writer), writer == 2 and (r >> 32) % 4 == 0


def _leaves_nothing(found: dict[tuple[int, int], int], layout: Layout, writer: int, k: int) -> bool:
    disk, slot, zero = _op(layout, writer, k)
    return zero or found[disk, slot] == 0


def _check_writer(readers: Sequence[Reader], layout: Layout, writer: int, state: State, expected: int) -> int:
    found: dict[tuple[int, int], int] = {}
    boots: dict[int, list[int]] = {}
    for disk, read in enumerate(readers):
        data = read(layout.offset(writer, 0), layout.slots(writer) * SLOT_SIZES[writer])
        for slot in range(layout.slots(writer)):
            found[disk, slot] = _slot(data, layout, writer, disk, slot, state, boots)
    high = max(0, *found.values())
    best, fewest = high, _differing(found, layout, writer, high)
    if expected > high and not _differing(found, layout, writer, expected):
        best, fewest = expected, {}
    # A zeroing op leaves no stamp, nor does one whose slot was zeroed since: the true N may be a few further on.
    n = high + 1
    while fewest and n - high < _TRACELESS and _leaves_nothing(found, layout, writer, n):
        differing = _differing(found, layout, writer, n)
        if len(differing) < len(fewest):
            best, fewest = n, differing
        n += 1
    for (disk, slot), right in fewest.items():
        state.note(f"writer {writer} disk {disk} slot {slot}: op {found[disk, slot]} where {right} is right")
    _check_boots(boots, writer, state)
    return best


def _slot(
    data: bytes, layout: Layout, writer: int, disk: int, slot: int, state: State, boots: dict[int, list[int]]
) -> int:
    size = SLOT_SIZES[writer]
    piece = data[slot * size : (slot + 1) * size]
    if not piece.strip(b"\0"):
        return 0
    offset = layout.offset(writer, slot)
    first = _HEAD.unpack_from(piece)
    for at in range(0, size, SECTOR):
        sector = piece[at : at + SECTOR]
        head = _HEAD.unpack_from(sector)
        right = (b"RWSTAMP1", writer, disk, first[3], first[4], offset + at, size)
        crc = zlib.crc32(sector[_HEAD.size :], zlib.crc32(sector[: _HEAD.size - 4]))
        if head[:7] != right or head[7] != crc:
            state.note(f"writer {writer} disk {disk} offset {offset + at}: {head!r}, crc {crc}, wanted {right!r}")
            return -1
    span = boots.setdefault(first[4], [first[3], first[3]])
    span[0] = min(span[0], first[3])
    span[1] = max(span[1], first[3])
    return int(first[3])


def _differing(found: dict[tuple[int, int], int], layout: Layout, writer: int, n: int) -> dict[tuple[int, int], int]:
    """{(disk, slot): the op that is right there}, for the slots that are not as after op n."""
    right: dict[tuple[int, int], int] = {}
    k = n
    while k >= 1 and len(right) < len(found):
        disk, slot, zero = _op(layout, writer, k)
        right.setdefault((disk, slot), 0 if zero else k)
        k -= 1
    return {place: right.get(place, 0) for place, seq in found.items() if seq != right.get(place, 0)}


def _check_boots(boots: dict[int, list[int]], writer: int, state: State) -> None:
    """A later boot wrote only later ops; otherwise a block of an abandoned future is among them."""
    ordered = [boots[gen] for gen in sorted(boots)]
    for earlier, later in itertools.pairwise(ordered):
        if earlier[1] >= later[0]:
            state.note(f"writer {writer}: op {earlier[1]} is from an abandoned future")
