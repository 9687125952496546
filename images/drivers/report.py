"""A plan for a person and for a program.

    summary    a few sentences: how many, and what matters      rows      the table: driver, verdict, role, reason
    document   a JSON document
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from images.model import Decision, Plan, Verdict

__all__ = ["document", "rows", "summary"]

_DESCRIPTION = {
    Verdict.MISSING: "missing: {count}; no image can be built",
    Verdict.IN: "in: {count} of the guest's modules, as they are inserted",
    Verdict.BUILT_IN: "built-in: {count} parts of the guest's kernel",
    Verdict.LATER: "later: {count} that the system loads from its root disk",
    Verdict.OUT: "out: {count} defaults that this target has no use for",
}


def document(plan: Plan) -> dict[str, Any]:
    """Fields:

    - `version`: 1; a reader refuses a higher one
    - `host`, `release`: the client's name and kernel;  `target`, `firmware`: the inventory's name, `bios` or `uefi`
    - `mode`: `template` or `append`;  `command_line`: the kernel's;  `rename`: MAC address → interface name
    - `buildable`: false when a driver is missing
    - `counts`: verdict → number of decisions, each of `in`, `out`, `built-in`, `later`, `missing`
    - `load`: paths below the release's folder, in the order in which they are inserted
    - `decisions`: in the order of the plan, each with `module`, `verdict`, `role`, `reason`, and where they are not
      empty `path`, `origin` (`client` or the name in the driver store), `alias` (the device that asked)
    - `warnings`: sentences
    """
    return {
        "version": 1,
        "host": plan.client.host,
        "release": plan.client.release,
        "target": plan.inventory.name,
        "firmware": plan.inventory.firmware.value,
        "mode": plan.mode,
        "command_line": plan.command_line,
        "rename": dict(plan.rename),
        "buildable": not plan.missing,
        "counts": _counts(plan),
        "load": list(plan.load),
        "decisions": [_decision(one) for one in plan.decisions],
        "warnings": list(plan.warnings),
    }


def rows(plan: Plan, *, all_of: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """(driver, verdict, role, reason) in the order of the plan. Of what is OUT only what the old hardware needed: the
    template's defaults are thousands, and `summary` counts them. `all_of`: these too."""
    for one in plan.decisions:
        if all_of or one.verdict is not Verdict.OUT or one.alias:
            yield one.module, one.verdict.value, one.role.value, one.reason


def summary(plan: Plan) -> tuple[str, ...]:
    """Lines: what is missing or goes in first. A verdict that nothing has is left out."""
    counts = _counts(plan)
    told = [(counts[verdict.value], text) for verdict, text in _DESCRIPTION.items()]
    lines = [text.format(count=count) for count, text in told if count]
    origins = Counter(one.origin for one in plan.decisions if one.verdict is Verdict.IN and one.origin != "client")
    lines += [f"from the driver store, {origin}: {count}" for origin, count in sorted(origins.items())]
    return tuple(lines)


def _counts(plan: Plan) -> dict[str, int]:
    counts = Counter(one.verdict for one in plan.decisions)
    return {verdict.value: counts[verdict] for verdict in Verdict}


def _decision(one: Decision) -> dict[str, str]:
    always = {"module": one.module, "verdict": one.verdict.value, "role": one.role.value, "reason": one.reason}
    more = {"path": one.path, "origin": one.origin, "alias": one.alias}
    return {**always, **{key: value for key, value in more.items() if value}}
