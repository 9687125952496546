"""Whether recording makes a guest's writes wait for longer than it may, from the journal's own statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Latency"]

# An interval with fewer requests than this says nothing, and one that is over the limit may be chance.
_ENOUGH = 20
_IN_A_ROW = 5
_SHARE = 0.99


class Latency:
    """`limit` is in seconds, None for none. One thread.

    What is measured is the journal's part of a write: from the request's arrival until its record is in the kernel.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.p99 = 0.0  # of the last interval that had requests enough, in seconds
        self._before: dict[int, int] = {}
        self._over = 0

    def measure(self, stats: Mapping[str, Any]) -> None:
        """`stats` is the journal's answer, with counts since its process began."""
        now = {int(below): int(count) for below, count in stats["latency"]["histogram"]}
        new = {below: count - self._before.get(below, 0) for below, count in now.items()}
        total = sum(new.values())
        if total < _ENOUGH and self._before:
            return
        self._before = now
        if total < _ENOUGH:
            return
        self.p99 = _quantile(new, total) / 1e6
        self._over = self._over + 1 if self.limit is not None and self.p99 > self.limit else 0

    def verdict(self) -> str:
        """Why it is too much, in words; empty while it is not."""
        if self.limit is None or self._over < _IN_A_ROW:
            return ""
        return (
            f"recording adds {self.p99 * 1000:.3g} ms to one write of a hundred, and {self.limit * 1000:.3g} ms are"
            " allowed"
        )


def _quantile(counts: Mapping[int, int], total: int) -> int:
    """The upper bound of the step that this share of the requests does not exceed, in microseconds."""
    seen = 0
    for below in sorted(counts):
        seen += counts[below]
        if seen >= _SHARE * total:
            return below
    return 0
