"""From costs to figures: medians, rates, paired ratios, and how the goals were met.

Rounds are paired: what is compared is one round's own ratio, and of these the middle one is told, with the extremes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.measure import Cost

__all__ = ["GOALS", "against", "complete", "goals", "order", "row", "spread", "summary"]

GiB = 1 << 30
MiB = 1 << 20


def order(names: Sequence[str], number: int) -> list[str]:
    """ABBA: every other round backwards, so that a drift of the machine hits the first and the last alike."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def summary(costs: Sequence[Cost], size: int) -> dict[str, Any]:
    """Medians over the rounds, the highest peaks; rates against `size`, the bytes that the work is about."""
    seconds = statistics.median(cost.seconds for cost in costs)
    cpu = statistics.median(cost.cpu for cost in costs)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "mb_per_second": round(size / 1e6 / seconds, 1) if size and seconds else None,
        "cpu_seconds_per_gib": round(cpu / (size / GiB), 2) if size else None,
        "peak_rss_bytes": max(cost.rss for cost in costs),
        "peak_private_bytes": max(cost.private for cost in costs),
        "rounds": [
            {"seconds": round(one.seconds, 3), "cpu_seconds": round(one.cpu, 3), "load": round(one.load, 2),
             "others": one.others}
            for one in costs
        ],
    }  # fmt: skip


def against(mine: Sequence[Cost], theirs: Sequence[Cost]) -> dict[str, Any]:
    """Ours divided by theirs, round by round: below 1 we are ahead."""
    return {
        "seconds": spread([a.seconds / b.seconds for a, b in zip(mine, theirs, strict=True) if b.seconds]),
        "cpu_seconds": spread([a.cpu / b.cpu for a, b in zip(mine, theirs, strict=True) if b.cpu]),
    }


def spread(ratios: Sequence[float]) -> dict[str, float] | None:
    """The middle one and the extremes; None when there are none."""
    if not ratios:
        return None
    return {
        "median": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }  # fmt: skip


def complete(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Sequence[Cost]]:
    """Without those that gave up on the way: their rounds have no partner."""
    most = max(map(len, costs.values()), default=0)
    return {who: found for who, found in costs.items() if len(found) == most}


def row(name: str, costs: Mapping[str, Sequence[Cost]], size: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the document. `rewind` is compared with all others."""
    return {
        "name": name,
        "bytes": size,
        "contenders": {who: summary(found, size) for who, found in costs.items()},
        "rewind_against": {
            who: against(costs["rewind"], found)
            for who, found in costs.items()
            if who != "rewind" and "rewind" in costs
        },
        "facts": dict(facts),
    }


# Peers do the same work; the others are floors and parts of ours.
PEERS = ("virtnbdbackup", "virtnbdbackup-lz4", "restic", "borg")

# name → (what is looked at, the limit)
GOALS = {
    "first full within 1.5 times the slower of nbdcopy and the disk": 1.5,
    "no peer is faster in any row": 1.0,
    "no peer needs less processor in any row": 1.0,
    "an epoch moves at most 1.02 times the dirty bytes": 1.02,
    "a revert moves at most 1.1 times the changed bytes": 1.1,
    "a sparse 8 TiB disk needs less than 300 MiB": 300 * MiB,
    "diff of two 1 TiB instants at 1 % in less than 1 s": 1.0,
    "10 000 points listed in less than 0.2 s": 0.2,
    "the first byte of 99 of 100 instants of a captured day in less than 2 s": 2.0,
}


def goals(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the document says about each goal; those it has no figure for are left out, and those that were measured on
    something smaller than the goal is about. Nothing fails by it."""
    rows = {one["name"]: one for one in document["rows"]}
    scale = document["scale"]
    found = [_first_full(rows), _worst(rows, "seconds"), _worst(rows, "cpu_seconds"),
             _fact(rows, "epoch", "moved_per_dirty"), _reverts(rows),
             _scale(scale, "sparse_8tib", "peak_rss_bytes"), _scale(scale, "diff_1tib", "diff_seconds"),
             _scale(scale, "points_10000", "list_seconds"),
             _scale(scale, "tap_day", "first_byte_p99_seconds")]  # fmt: skip
    return [
        {"goal": name, "limit": limit, "found": value, "where": where, "met": value <= limit}
        for (name, limit), (value, where) in zip(GOALS.items(), found, strict=True)
        if value is not None
    ]


_Found = tuple[float | None, str]


def _first_full(rows: Mapping[str, Any]) -> _Found:
    compared = rows.get("first_full", {}).get("rewind_against", {})
    floors = {who: compared[who]["seconds"]["median"] for who in ("nbdcopy", "disk") if who in compared}
    # The slower floor is the one that we come closest to.
    return (min(floors.values()), min(floors, key=floors.__getitem__)) if floors else (None, "")


def _worst(rows: Mapping[str, Any], what: str) -> _Found:
    ratios = {
        f"{name}: {who}": one[what]["median"]
        for name, found in rows.items()
        for who, one in found["rewind_against"].items()
        if who in PEERS and one[what]
    }
    return (max(ratios.values()), max(ratios, key=ratios.__getitem__)) if ratios else (None, "")


def _fact(rows: Mapping[str, Any], name: str, fact: str) -> _Found:
    return rows.get(name, {}).get("facts", {}).get(fact), name


def _reverts(rows: Mapping[str, Any]) -> _Found:
    found = {name: _fact(rows, name, "moved_per_changed")[0] for name in ("revert_live", "revert_offline")}
    there = {name: value for name, value in found.items() if value is not None}
    return (max(there.values()), max(there, key=there.__getitem__)) if there else (None, "")


def _scale(scale: Mapping[str, Any], name: str, what: str) -> _Found:
    found = scale.get(name, {})
    return (None if found.get("reduced") else found.get(what)), name
