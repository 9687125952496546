"""From turns of the tap to its figures: medians, paired ratios, goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import GiB, spread

__all__ = ["CELLS", "GOALS", "VARIANTS", "Cell", "Turn", "against", "cells", "goals", "summary"]

VARIANTS = ("none", "floor", "tap")


@dataclass(frozen=True, slots=True)
class Cell:
    """A pattern of writes: fio's name of it, bytes of one, how many at once; within the first `span` bytes (0: all)."""

    name: str
    kind: str
    block: int
    depth: int
    span: int = 0


CELLS = tuple(
    Cell(f"{label}-{depth}", kind, block, depth)
    for label, kind, block in (("4k-random", "randwrite", 4096), ("64k-random", "randwrite", 65536),
                               ("1m-sequential", "write", 1 << 20))
    for depth in (1, 16, 32)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one variant: `p50` and `p99` in microseconds, `qemu` and `sink` in seconds of processor, `others` in
    processors that somebody else kept busy meanwhile. `recorded`: bytes of the journal's files."""

    iops: float
    written: int
    p50: float
    p99: float
    qemu: float
    sink: float
    recorded: int
    others: float


_RATIOS: dict[str, Callable[[Turn], float]] = {
    "p50": lambda one: one.p50,
    "p99": lambda one: one.p99,
    "throughput": lambda one: one.iops,
    "cpu": lambda one: (one.qemu + one.sink) / one.written,
    "sink_cpu": lambda one: one.sink / one.written,
}


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians over the rounds."""

    def middle(what: Callable[[Turn], float]) -> float:
        return statistics.median(map(what, turns))

    found = {
        "iops": round(middle(lambda one: one.iops)), "p50_us": round(middle(lambda one: one.p50), 1),
        "p99_us": round(middle(lambda one: one.p99), 1),
        "cpu_seconds_per_gib": {
            "qemu": round(middle(lambda one: one.qemu / one.written) * GiB, 3),
            "sink": round(middle(lambda one: one.sink / one.written) * GiB, 3),
        },
        "others": round(middle(lambda one: one.others), 2),
    }  # fmt: skip
    if any(one.recorded for one in turns):
        found["journal_bytes_per_byte"] = round(sum(t.recorded for t in turns) / sum(t.written for t in turns), 5)
    return found


def against(mine: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, Any]:
    """Ours divided by theirs, round by round."""
    return {
        name: spread([what(a) / what(b) for a, b in zip(mine, theirs, strict=True) if what(b)])
        for name, what in _RATIOS.items()
    }


def cells(found: Mapping[Cell, Mapping[str, Sequence[Turn]]]) -> list[dict[str, Any]]:
    """One entry for each pattern of writes."""
    return [
        {
            "name": cell.name,
            "variants": {name: summary(each) for name, each in turns.items()},
            "tap_against_floor": against(turns["tap"], turns["floor"]),
            "floor_against_none": against(turns["floor"], turns["none"]),
        }
        for cell, turns in found.items()
    ]


# name → the limit; the second one is a least, the others are a most.
GOALS = {
    "p50 at most 1.10 times the floor's": 1.10,
    "throughput at least 0.9 of the floor's": 0.9,
    "at most 1.03 bytes of journal for a byte at 4 KiB": 1.03,
    "at most 1.02 bytes of journal for a byte at 64 KiB and above": 1.02,
}


def goals(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each goal the worst cell, and all that miss it. Nothing fails by it."""
    p50 = {one["name"]: one["tap_against_floor"]["p50"]["median"] for one in found}
    throughput = {one["name"]: one["tap_against_floor"]["throughput"]["median"] for one in found}
    size = {one["name"]: one["variants"]["tap"]["journal_bytes_per_byte"] for one in found}
    small = {name: value for name, value in size.items() if name.startswith("4k")}
    large = {name: value for name, value in size.items() if name not in small}
    return [
        _goal(name, values, least=values is throughput)
        for name, values in zip(GOALS, (p50, throughput, small, large), strict=True)
        if values
    ]


def _goal(name: str, values: Mapping[str, float], *, least: bool) -> dict[str, Any]:
    limit = GOALS[name]
    worst = (min if least else max)(values, key=values.__getitem__)
    missed = [cell for cell, value in values.items() if (value < limit if least else value > limit)]
    return {"goal": name, "limit": limit, "worst": values[worst], "where": worst, "missed": missed, "met": not missed}
