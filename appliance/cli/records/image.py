"""Bootable images: targets, templates, drivers, plans, builds and what runs from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from appliance.cli.records.base import Record


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
class ImageReader(Record):
    type = "image-reader"
    path: Path
    created: datetime
    kernel: str
    qemu: str
    size_bytes: int
    unfit: str


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
class ImageWindowsPlan(Record):
    type = "image-windows-plan"
    domain: str
    point: str
    time: datetime
    target: str
    host: str
    product: str
    version: str
    build: str
    arch: str
    firmware: str
    volume: str
    control_set: str
    buildable: bool
    experimental: bool
    drivers: tuple[Mapping[str, str], ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


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
class ImageStep:
    """Part of other lines: one step of settling."""

    name: str
    outcome: str
    said: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImageSettled(Record):
    type = "image-settled"
    name: str
    alone: bool
    steps: tuple[ImageStep, ...]
    medium: Path | None


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
    left_bytes: int
    rate: int
    answers: bool
    silent_seconds: float | None
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
