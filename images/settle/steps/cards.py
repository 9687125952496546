"""Configuration that knows network cards by the addresses of the old hardware is told those of the new."""

from __future__ import annotations

from images.model import Plan
from images.settle.step import Step

__all__ = ["STEP"]


def _variables(plan: Plan, _fields: object) -> dict[str, str]:
    """`RW_MACS`: words OLD=NEW, for each card that has its name from one with another address."""
    pairs = ((plan.client.nics.get(name, "").lower(), mac.lower()) for mac, name in sorted(plan.rename.items()))
    return {"RW_MACS": " ".join(f"{old}={new}" for old, new in pairs if old and old != new)}


STEP = Step(
    name="cards", phase="identity", order=3,
    description="netplan, networkd, NetworkManager and udev find a card by its new address where they knew the old one",
    variables=_variables,
)  # fmt: skip
