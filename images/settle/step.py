"""A step: a module of `steps/` with a `STEP`, and beside it a shell script of the same name. A new one is these two."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import images.settle.steps
from appliance.errors import ImageError
from images.model import Plan

__all__ = ["NoFields", "Phase", "Step", "steps", "validated"]

Phase = Literal["identity", "settle"]


class NoFields(BaseModel):
    """The schema of a step that is only chosen or not."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Step:
    """`order` among those of its phase, the lowest first. `description` is one sentence for lists. `schema` are its
    fields, each that has a pattern with a description of it; `variables` what the script is told (`RW_NAME` → text),
    `words` what the kernel's command line needs."""

    name: str
    phase: Phase
    order: int
    description: str
    schema: type[BaseModel] = NoFields
    variables: Callable[[Plan, Any], Mapping[str, str]] = lambda _plan, _fields: {}
    words: Callable[[Plan, Any], tuple[str, ...]] = lambda _plan, _fields: ()

    @property
    def script(self) -> str:
        """Of the client's shell (POSIX), sourced after `lib.sh`."""
        return (files("images.settle.steps") / f"{self.name.replace('-', '_')}.sh").read_text(encoding="utf-8")


def steps() -> dict[str, Step]:
    """All by name, in the order in which they run."""
    found: list[Step] = []
    for module in pkgutil.iter_modules(images.settle.steps.__path__):
        one = getattr(importlib.import_module(f"images.settle.steps.{module.name}"), "STEP", None)
        if isinstance(one, Step):
            found.append(one)
    return {one.name: one for one in sorted(found, key=lambda one: (one.phase, one.order, one.name))}


def validated(name: str, fields: Mapping[str, Any]) -> tuple[Step, BaseModel]:
    """The step of that name and its fields. Raises ImageError that names the field."""
    known = steps()
    if name not in known:
        raise ImageError(reason=f"there is no step {name!r}", hint=f"there are {', '.join(known)}")
    try:
        return known[name], known[name].schema.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "fields"
        reason = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] == "string_pattern_mismatch":  # a pattern is for programs
            words = known[name].schema.model_fields[field].description
            reason = f"it has to be {words}, not {str(first['input'])[:80]!r}"
        raise ImageError(reason=f"step {name!r}: {field}: {reason}") from error
