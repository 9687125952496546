"""What has to be inserted for some drivers to work, in an order in which it can be.

Hard dependencies (modules.dep) come before who needs them, always. Soft ones (modules.softdep) are taken where the
kernel has them and come before or behind, as they say, unless a hard one forbids. A circle is cut where it was met
first: the kernel could not insert it either, but a plan is made all the same. No recursion: a chain may be long.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.errors import GuestUnreadable
from images.drivers.glob import Budget
from images.drivers.tables import Module, Tables

__all__ = ["Closure", "close"]

# All modules that one machine's hardware needs are some 200.
_MOST = 2000


@dataclass(frozen=True, slots=True)
class Closure:
    """`load` in the order to insert. `wanted_by`: who asked for a module or built-in first, empty for those that were
    asked for themselves. `missing`: (name, who needs it), of names that are hard dependencies or asked for."""

    load: tuple[Module, ...]
    built_in: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]
    wanted_by: dict[str, str]


@dataclass
class _Graph:
    """`before[x]` must be inserted before x; `softly[x]` should be. The keys are in the order of discovery."""

    before: dict[str, set[str]] = field(default_factory=dict)
    softly: dict[str, set[str]] = field(default_factory=dict)
    built_in: dict[str, None] = field(default_factory=dict)
    missing: dict[tuple[str, str], None] = field(default_factory=dict)
    wanted_by: dict[str, str] = field(default_factory=dict)


def close(tables: Tables, names: Sequence[str], budget: Budget | None = None) -> Closure:
    """Everything for the modules `names` (with `_`; built-in ones cost nothing). Raises GuestUnreadable when there are
    more than 2000 modules, which no kernel's tables lead to, or when the budget is used up."""
    graph = _discover(tables, names, budget or Budget())
    order = _order(graph)
    load = tuple(tables.modules[name] for name in order)
    return Closure(load, tuple(graph.built_in), tuple(graph.missing), graph.wanted_by)


def _discover(tables: Tables, names: Sequence[str], budget: Budget) -> _Graph:
    graph = _Graph()
    waiting = [(name, "") for name in reversed(names)]
    while waiting:
        name, by = waiting.pop()
        if name not in tables.modules:
            _without_module(tables, graph, name, by)
            continue
        if name in graph.before:
            continue
        graph.wanted_by.setdefault(name, by)
        module = tables.modules[name]
        graph.before[name] = {one for one in module.depends if one in tables.modules and one != name}
        graph.softly.setdefault(name, set())
        if len(graph.before) > _MOST:
            raise GuestUnreadable(
                what=f"the tables of kernel {tables.release}", reason=f"{names[0]} and others need over {_MOST} modules"
            )
        before, behind = _soft(tables, name, budget)
        graph.softly[name] |= set(before) - {name}
        for one in behind:
            if one != name:
                graph.softly.setdefault(one, set()).add(name)
        # The last is taken up first.
        waiting += [(one, name) for one in (*reversed(behind), *reversed(before), *reversed(module.depends))]
    return graph


def _without_module(tables: Tables, graph: _Graph, name: str, by: str) -> None:
    if name in tables.builtin:
        graph.built_in.setdefault(name)
        graph.wanted_by.setdefault(name, by)
    else:
        graph.missing.setdefault((name, by))


def _soft(tables: Tables, name: str, budget: Budget) -> tuple[list[str], list[str]]:
    """The modules before and behind, by name; what the kernel does not have or has built in is left out."""
    soft = tables.soft.get(name)
    if soft is None:
        return [], []

    def resolved(words: tuple[str, ...]) -> list[str]:
        found = [one for word in words for one in tables.resolve(word, budget)]
        return [one for one in dict.fromkeys(found) if one in tables.modules]

    return resolved(soft.before), resolved(soft.behind)


def _order(graph: _Graph) -> list[str]:
    """Each name when all before it are done; of those, the one that was discovered first."""
    rank = {name: number for number, name in enumerate(graph.before)}
    hard = {name: set(before) for name, before in graph.before.items()}
    all_of = {name: hard[name] | (graph.softly[name] & rank.keys()) for name in rank}
    behind: dict[str, list[str]] = {name: [] for name in rank}
    for name, before in all_of.items():
        for one in before:
            behind[one].append(name)
    ready = [rank[name] for name in rank if not all_of[name]]
    heapq.heapify(ready)
    names = list(rank)
    order: list[str] = []
    left = dict.fromkeys(names)
    while left:
        name = names[heapq.heappop(ready)] if ready else _cut(left, hard)
        if name not in left:
            continue
        del left[name]
        order.append(name)
        for one in behind[name]:
            all_of[one].discard(name)
            hard[one].discard(name)
            if one in left and not all_of[one]:
                heapq.heappush(ready, rank[one])
    return order


def _cut(left: dict[str, None], hard: dict[str, set[str]]) -> str:
    """Out of a circle: a soft wish is dropped before a hard need is."""
    return next((name for name in left if not hard[name]), next(iter(left)))
