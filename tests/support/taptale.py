"""What a guest did, one write after the other, so that the state after each of them is known for ever.

step        one write, or a revert: `Tale.state(k)` is what the disks held after the first k steps
number      of a record in the journal; known where the test has seen it given out
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

__all__ = ["Packed", "Tale"]

# As many steps are done again at most for one state.
_KEY = 64


class Packed(Mapping[str, bytes]):
    """Target → content. Guests of tests write repeated bytes, so hundreds of these take no memory."""

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self._held = {target: zlib.compress(bytes(one), 1) for target, one in content.items()}

    def __getitem__(self, target: str) -> bytes:
        return zlib.decompress(self._held[target])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(slots=True)
class Step:
    """`time` is when it had ended. Either a write, or the state that a revert or a larger disk left."""

    time: datetime
    target: str = ""
    offset: int = 0
    length: int = 0
    byte: int = 0
    whole: Packed | None = None


@dataclass(slots=True)
class Tale:
    """`numbers`: that of a record → how many steps it comes after. Of a number that was the newest for longer, because
    nothing was recorded meanwhile, it is the first time that counts."""

    steps: list[Step] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    _keys: dict[int, Packed] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.steps)

    def wrote(self, target: str, offset: int, length: int, byte: int) -> None:
        self.steps.append(Step(datetime.now(UTC), target, offset, length, byte))
        if self.length % _KEY == 0:
            self._keys[self.length] = Packed(self.state(self.length))

    def became(self, content: Mapping[str, bytes], time: datetime | None = None) -> None:
        self.steps.append(Step(time or datetime.now(UTC), whole=Packed(content)))

    def number(self, number: int) -> None:
        """The newest record there is."""
        self.numbers.setdefault(number, self.length)

    def at(self, time: datetime) -> int:
        """How many steps had ended by then."""
        return bisect_right(self.steps, time, key=lambda one: one.time)

    def state(self, length: int) -> dict[str, bytes]:
        begin, key = length, None
        while key is None:
            assert begin, "the tale has no beginning"
            key = self._keys.get(begin) or self.steps[begin - 1].whole
            begin -= key is None
        content = {target: bytearray(one) for target, one in key.items()}
        for one in self.steps[begin:length]:
            content[one.target][one.offset : one.offset + one.length] = bytes([one.byte]) * one.length
        return {target: bytes(one) for target, one in content.items()}
