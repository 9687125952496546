"""A boot loader on the client's own disk that this firmware starts."""

from __future__ import annotations

from images.drivers.settle import disk_names, unstable_name
from images.model import Plan
from images.settle.step import Step
from images.words import words_of

__all__ = ["STEP"]


def _variables(plan: Plan, _fields: object) -> dict[str, str]:
    return {
        "RW_FIRMWARE": plan.inventory.firmware.value, "RW_SECURE": "1" if plan.inventory.secure_boot else "",
        "RW_UNSTABLE": _unstable(plan),
    }  # fmt: skip


def _unstable(plan: Plan) -> str:
    """The root as the client's boot loader names it, where the target's hardware has another name for it."""
    roots = [word[5:] for word in words_of(plan.client.command_line) if word.startswith("root=")]
    spec = roots[-1] if roots else ""
    family = unstable_name(spec)[0]
    return spec if family and family not in disk_names(plan.inventory) else ""


STEP = Step(
    name="loader", phase="settle", order=20,
    description="the guest's own boot loader is put where this firmware looks for it, or the boot volume stays",
    variables=_variables,
)  # fmt: skip
