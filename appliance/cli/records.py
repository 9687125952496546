"""Every line that `--json` can print, one dataclass each: the machine's side of the command line.

`JSON.md` documents them field by field, and a test compares the two. Fields are only added, never renamed or removed;
a reader ignores those it does not know. Sizes are bytes, durations seconds, times ISO 8601 in UTC.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

__all__ = [
    "Branch", "Bucket", "Capture", "CaptureEvent", "CheckSummary", "DaemonEvent", "Diff", "DiffExtent", "DiskBytes",
    "DoctorCheck", "DoctorSummary", "DomainStatus", "Error", "ExitCode", "Export", "Forget", "ForgetSummary", "Gap",
    "Gc", "ImageBuilt", "ImageDrivers", "ImageEvidence", "ImageFile", "ImagePlan", "ImageProfile", "ImageRemoved",
    "ImageRunning", "ImageServed", "ImageStarted", "ImageStreamed", "ImageTarget", "ImageTemplate", "ImageVerified",
    "Initialised", "Key", "Lane", "LastGap", "Mark", "Paused",
    "Point", "PointsSummary", "Problem", "Progress", "Protected", "Record", "Restored", "RevertPlan", "Reverted",
    "Span", "Status", "Timeline", "Unprotected", "to_json",
]  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Paused(Record):
    type = "paused"
    domain: str
    uuid: str
    paused: bool
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Point(Record):
    type = "point"
    id: str
    domain: str
    uuid: str
    time: datetime
    consistency: str
    reason: str
    label: str
    timeline: str
    parent: str | None
    since: str | None
    changed_bytes: int
    size_bytes: int
    disks: tuple[DiskBytes, ...]
    moved_bytes: int
    stored_bytes: int
    pause_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gap(Record):
    type = "gap"
    domain: str
    start: datetime
    end: datetime
    seconds: float
    reason: str


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
class Bucket(Record):
    type = "bucket"
    domain: str
    start: datetime
    seconds: float
    bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Lane(Record):
    type = "lane"
    domain: str
    timeline: str
    start: datetime
    end: datetime
    parent: str | None
    origin: str | None
    points: int


@dataclass(frozen=True, slots=True)
class Span(Record):
    type = "span"
    domain: str
    journal: str
    first: int
    last: int
    start: datetime
    end: datetime
    since: datetime | None
    timeline: str | None
    bases: tuple[str, ...]
    running: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Branch(Record):
    type = "branch"
    domain: str
    time: datetime
    journal: str
    sequence: int
    point: str
    timeline: str


@dataclass(frozen=True, slots=True)
class Mark(Record):
    type = "mark"
    domain: str
    time: datetime
    label: str
    journal: str
    sequence: int


@dataclass(frozen=True, slots=True)
class CaptureEvent(Record):
    type = "capture-event"
    domain: str
    time: datetime
    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Timeline(Record):
    type = "timeline"
    domain: str
    uuid: str
    since: datetime
    until: datetime
    points: int
    timelines: int
    gaps: int
    gap_seconds: float
    written_bytes: int
    capture: Capture | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PointsSummary(Record):
    type = "points-summary"
    domain: str
    points: int
    gaps: int
    timelines: int


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
class Diff(Record):
    type = "diff"
    domain: str
    disk: str
    older: str
    newer: str
    unit_bytes: int
    extents: int
    changed_bytes: int


@dataclass(frozen=True, slots=True)
class DiffExtent(Record):
    type = "diff-extent"
    disk: str
    offset: int
    length: int


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


@dataclass(frozen=True, slots=True)
class Forget(Record):
    type = "forget"
    point: str
    domain: str
    time: datetime
    keep: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


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


@dataclass(frozen=True, slots=True)
class DaemonEvent(Record):
    type = "daemon-event"
    event: str
    time: datetime
    domain: str | None
    detail: str


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


@dataclass(frozen=True, slots=True)
class ImageTarget(Record):
    type = "image-target"
    name: str
    source: str
    firmware: str
    secure_boot: bool
    devices: int
    macs: tuple[str, ...]
    added: datetime
    inventory: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImageProfile(Record):
    type = "image-profile"
    name: str
    about: str


@dataclass(frozen=True, slots=True)
class ImageTemplate(Record):
    type = "image-template"
    id: str
    created: datetime
    release: str
    packages: Mapping[str, str]
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ImageDrivers(Record):
    type = "image-drivers"
    name: str
    release: str
    digest: str
    modules: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageRemoved(Record):
    type = "image-removed"
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class ImagePlan(Record):
    type = "image-plan"
    domain: str
    point: str
    time: datetime
    template: str
    reader: str
    host: str
    release: str
    target: str
    mode: str
    buildable: bool
    command_line: str
    rename: Mapping[str, str]
    counts: Mapping[str, int]
    load: tuple[str, ...]
    decisions: tuple[Mapping[str, str], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageFile:
    """Part of other lines: one file (or folder) of an image."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageBuilt(Record):
    type = "image-built"
    domain: str
    point: str
    time: datetime
    target: str
    template: str
    folder: Path
    files: tuple[ImageFile, ...]
    modules: tuple[str, ...]
    step_seconds: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageStarted(Record):
    type = "image-started"
    name: str
    uuid: str
    point: str
    target: str
    disks: Mapping[str, Path]
    folder: Path
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageRunning(Record):
    type = "image-running"
    name: str
    point: str
    phase: str
    done_bytes: int
    total_bytes: int
    left: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True)
class ImageServed(Record):
    type = "image-served"
    name: str
    point: str
    target: str
    mode: str
    address: str
    secure: bool
    folder: Path
    files: tuple[ImageFile, ...]
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageStreamed(Record):
    type = "image-streamed"
    name: str
    point: str
    target: str
    mode: str
    phase: str
    done_bytes: int
    total_bytes: int
    read_bytes: int
    written_bytes: int
    boots: int
    service_seconds: int | None
    service_read_bytes: int | None
    left: tuple[str, ...]
    error: str


@dataclass(frozen=True, slots=True)
class ImageVerified(Record):
    type = "image-verified"
    domain: str
    point: str
    time: datetime
    target: str
    booted: bool
    reasons: tuple[str, ...]
    kernels: tuple[str, ...]
    failed: tuple[str, ...]
    differences: tuple[str, ...]
    system: Mapping[str, Any]
    machine: str
    accelerator: str
    seconds: float
    ended: str
    added: tuple[str, ...]
    evidence: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageEvidence(Record):
    type = "image-evidence"
    point: str
    time: datetime
    booted: bool
    name: str
    document: Mapping[str, Any]
    files: tuple[Path, ...]


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
