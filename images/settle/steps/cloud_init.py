"""cloud-init, which would give a machine its identity anew when it finds itself on other hardware, leaves it alone."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="cloud-init", phase="identity", order=2,
    description="cloud-init neither takes the machine for a new one nor undoes what is chosen here",
)  # fmt: skip
