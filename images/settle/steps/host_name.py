"""A new host name."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from images.settle.step import Step

__all__ = ["STEP", "fits"]

_NAME = r"^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$"


class Fields(BaseModel):
    """`name`: what a host may be called (RFC 1123, 2.1), without a domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=_NAME, description="letters, digits and `-` (at neither end), at most 63")


def fits(name: str) -> bool:
    return re.fullmatch(_NAME, name) is not None


STEP = Step(
    name="host-name", phase="identity", order=10, description="the host is called NAME, also in its own hosts file",
    schema=Fields, variables=lambda _plan, fields: {"RW_NAME": fields.name},
)  # fmt: skip
