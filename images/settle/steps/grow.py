"""A root that takes the room of a larger disk."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="grow", phase="settle", order=30,
    description="the root's partition and file system take the room that a larger disk has behind them",
)  # fmt: skip
