"""The repository: checks, retention, collection, keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from appliance.cli.records.base import Record


@dataclass(frozen=True, slots=True)
class Problem(Record):
    type = "problem"
    object: str
    reason: str
    points: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckSummary(Record):
    type = "check-summary"
    read_data: bool
    problems: int
    points: int
    points_affected: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Gc(Record):
    type = "gc-summary"
    dry_run: bool
    details: Mapping[str, Any]
    seconds: float
    lapsed: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Forget(Record):
    type = "forget"
    point: str
    domain: str
    time: datetime
    keep: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True, slots=True)
class ForgetSummary(Record):
    type = "forget-summary"
    dry_run: bool
    kept: int
    forgotten: int


@dataclass(frozen=True, slots=True)
class Key(Record):
    type = "key"
    id: str
    action: str
    key_file: Path | None
    passphrase: bool
