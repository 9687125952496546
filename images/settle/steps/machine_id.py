"""A new machine id: systemd takes it from the kernel's command line, so that nobody ever sees the old one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from images.model import Plan
from images.settle.step import Step

__all__ = ["STEP"]


class Fields(BaseModel):
    """`id`: 32 hexadecimal digits, as in machine-id(5)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{32}$", description="32 lower-case hexadecimal digits")


def _words(_plan: Plan, fields: Fields) -> tuple[str, ...]:
    return (f"systemd.machine_id={fields.id}",)


STEP = Step(
    name="machine-id", phase="identity", order=20, description="the machine has an id of its own (machine-id)",
    schema=Fields, variables=lambda _plan, fields: {"RW_ID": fields.id}, words=_words,
)  # fmt: skip
