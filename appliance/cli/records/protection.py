"""What is protected, how its capture stands, and what hinders it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from appliance.cli.records.base import Record


@dataclass(frozen=True, slots=True)
class Initialised(Record):
    type = "initialised"
    home: Path
    repository: str
    repository_id: str
    encrypted: bool
    created: bool
    key_file: Path | None


@dataclass(frozen=True, slots=True)
class Protected(Record):
    type = "protected"
    domain: str
    uuid: str
    uri: str
    disks: tuple[str, ...]
    every_seconds: float | None
    quiesce: str
    already: bool
    continuous: bool
    max_added_latency_seconds: float | None
    warnings: tuple[str, ...] = ()
    verify_every_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Unprotected(Record):
    type = "unprotected"
    domain: str
    uuid: str
    points_kept: int
    journal_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Paused(Record):
    type = "paused"
    domain: str
    uuid: str
    paused: bool
    until: datetime | None


@dataclass(frozen=True, slots=True)
class LastGap:
    """Part of other lines: the newest span that was not captured."""

    start: datetime
    end: datetime
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Capture:
    """Part of other lines: how the capture of a domain stands now."""

    mode: str
    reason: str
    near_seconds: float | None
    far_seconds: float | None
    journal: str | None
    sequence: int | None
    durable: int | None
    added_latency_seconds: float | None
    spool_bytes: int | None
    spool_limit_bytes: int | None
    shipped_bytes: int | None
    last_gap: LastGap | None
    far_reason: str = ""


@dataclass(frozen=True, slots=True)
class Status(Record):
    type = "status"
    home: Path
    repository: str
    repository_id: str
    encrypted: bool
    points: int
    domains: int
    daemon: bool
    images: int
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class DomainStatus(Record):
    type = "domain-status"
    domain: str
    uuid: str | None
    uri: str
    state: str
    protected: bool
    disks: tuple[str, ...]
    every_seconds: float | None
    quiesce: str | None
    points: int
    last_point: str | None
    last_time: datetime | None
    age_seconds: float | None
    late: bool
    revert: str | None
    busy: str | None
    notes: tuple[str, ...] = ()
    capture: Capture | None = None


@dataclass(frozen=True, slots=True)
class DoctorCheck(Record):
    type = "doctor-check"
    name: str
    status: str
    finding: str
    remedy: str


@dataclass(frozen=True, slots=True)
class DoctorSummary(Record):
    type = "doctor-summary"
    ok: int
    warnings: int
    failures: int


@dataclass(frozen=True, slots=True)
class DaemonEvent(Record):
    type = "daemon-event"
    event: str
    time: datetime
    domain: str | None
    detail: str
