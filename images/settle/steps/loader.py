"""A boot loader on the client's own disk that this firmware starts."""

from __future__ import annotations

from images.model import Plan
from images.settle.step import Step

__all__ = ["STEP"]


def _variables(plan: Plan, _fields: object) -> dict[str, str]:
    return {"RW_FIRMWARE": plan.inventory.firmware.value, "RW_SECURE": "1" if plan.inventory.secure_boot else ""}


STEP = Step(
    name="loader", phase="settle", order=20,
    description="the guest's own boot loader is put where this firmware looks for it, or the boot volume stays",
    variables=_variables,
)  # fmt: skip
