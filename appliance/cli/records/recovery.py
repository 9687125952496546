"""The ways out of a point onto disks: reverts, exports, restores."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from appliance.cli.records.base import DiskBytes, Record


@dataclass(frozen=True, slots=True)
class RevertPlan(Record):
    type = "revert-plan"
    domain: str
    uuid: str
    point: str
    time: datetime
    mode: str
    disks: tuple[DiskBytes, ...]
    changed_bytes: int
    extents: int
    expected_seconds: float | None
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    compared: bool = True


@dataclass(frozen=True, slots=True)
class Reverted(Record):
    type = "reverted"
    domain: str
    uuid: str
    verb: str
    point: str
    safety_point: str | None
    timeline: str | None
    mode: str
    state: str
    changed_bytes: int
    moved_bytes: int
    pause_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Export(Record):
    type = "export"
    domain: str
    point: str
    time: datetime
    disk: str
    size_bytes: int
    uri: str
    writable: bool


@dataclass(frozen=True, slots=True)
class Restored(Record):
    type = "restored"
    domain: str
    point: str
    time: datetime
    name: str
    defined: bool
    definition: Path | None
    files: tuple[Path, ...]
    written_bytes: int
    seconds: float
    left_out: tuple[str, ...]
