"""Network cards keep the names that the client's configuration speaks of, also when it starts without the image."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="nics", phase="settle", order=5,
    description="the names that the image gives to network cards become part of the guest's own configuration",
)  # fmt: skip
