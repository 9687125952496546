"""The base of all lines, what several of them hold, and how a line becomes JSON."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Record:
    """Base of all lines. `type` names the kind of line and comes first in it."""

    type: ClassVar[str]


@dataclass(frozen=True, slots=True)
class DiskBytes:
    """Part of other lines: one disk and the bytes in which it changed."""

    disk: str
    size_bytes: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class ExitCode(Record):
    type = "exit-code"
    code: int
    id: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Progress(Record):
    type = "progress"
    what: str
    done: int
    total: int
    per_second: float
    left_seconds: float | None


@dataclass(frozen=True, slots=True)
class Error(Record):
    type = "error"
    id: str
    message: str
    hint: str
    exit_code: int
    fields: Mapping[str, Any] = field(default_factory=dict)


def to_json(record: Record) -> dict[str, Any]:
    """The line as JSON values, `type` first."""
    names = (one.name for one in dataclasses.fields(record))
    return {"type": record.type} | {name: _value(getattr(record, name)) for name in names}


def _value(value: Any) -> Any:
    """JSON has no times, paths or tuples; anything unknown becomes its text, since a line must never fail to print."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _value(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(item) for item in value]
    return str(value)
