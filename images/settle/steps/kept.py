"""What stays as it was in the point is told."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from images.model import Plan
from images.settle.step import Step

__all__ = ["PARTS", "STEP"]

# Of what an identity is made; the steps that give a new one have these names.
PARTS = ("host-name", "machine-id", "ssh-keys", "addresses")


class Fields(BaseModel):
    """`parts`: those of `PARTS` that are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[str, ...]


def _variables(_plan: Plan, fields: Fields) -> Mapping[str, str]:
    return {"RW_KEPT": " ".join(fields.parts)}


STEP = Step(
    name="kept", phase="identity", order=90, description="what the machine keeps of its identity is told",
    schema=Fields, variables=_variables,
)  # fmt: skip
