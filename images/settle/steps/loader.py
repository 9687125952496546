"""A boot loader on the client's own disk that this firmware starts."""

from __future__ import annotations

from images.drivers.settle import unstable_name
from images.model import Plan
from images.settle.step import Step
from images.words import words_of

__all__ = ["STEP"]


def _variables(plan: Plan, _fields: object) -> dict[str, str]:
    return {
        "RW_FIRMWARE": plan.inventory.firmware.value, "RW_SECURE": "1" if plan.inventory.secure_boot else "",
        "RW_BY_NAME": _by_name(plan),
    }  # fmt: skip


def _by_name(plan: Plan) -> str:
    """The root as the client's boot loader names it, where that is the order in which hardware was found."""
    roots = [word[5:] for word in words_of(plan.client.command_line) if word.startswith("root=")]
    return roots[-1] if roots and unstable_name(roots[-1])[0] else ""


STEP = Step(
    name="loader", phase="settle", order=20,
    description="the guest's own boot loader is put where this firmware looks for it, or the boot volume stays",
    variables=_variables,
)  # fmt: skip
