"""What was captured: points, gaps and the timeline."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from appliance.cli.records.base import DiskBytes, Record
from appliance.cli.records.protection import Capture


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
