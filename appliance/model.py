"""The nouns: what a recovery point is made of. Frozen values without behaviour; any thread may share them.

    Point ── domain, instant, consistency, reason, timeline, parent
      └─ DiskPoint per disk ── size, MapRef, how the disk was attached, what changed since the parent
           └─ MapRef ── the root of the map: proves every byte below it

Times are aware UTC datetimes. Ids are lower-case hexadecimal text wherever a person can meet them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

__all__ = ["Consistency", "DiskKind", "DiskPoint", "MapRef", "Point", "PointStats", "Timeline"]


class Consistency(Enum):
    """How good a point is, by evidence, worst first. `CRASH`: as after a power cut at one instant over all disks.
    `FILESYSTEM`: the guest agent had frozen the file systems. `APPLICATION`: the agent's hooks had quiesced the
    services too. `OFFLINE`: the domain was shut off cleanly. `CHECKED`, `BOOTED`: proven afterwards.
    """

    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"
    OFFLINE = "offline"
    CHECKED = "checked"
    BOOTED = "booted"


class DiskKind(Enum):
    """`DISK` is the guest's; `NVRAM` and `TPM` are host files that belong to the point and are stored the same way."""

    DISK = "disk"
    NVRAM = "nvram"
    TPM = "tpm"


@dataclass(frozen=True, slots=True)
class MapRef:
    """A map in a repository: its root id (16 bytes; empty for a disk of only zeroes) and where the root node lies.

    `place` is a hint that speeds the first read up; the id alone is the truth. `size` is the disk's in bytes.
    """

    root: bytes
    size: int
    place: int = 0


@dataclass(frozen=True, slots=True)
class DiskPoint:
    """One disk at the point's instant.

    `changed_bytes` is what differs from the same disk of the parent point, in whole chunks; `changed` is the sorted
    list of those chunk indexes, or None when there was no parent to compare with. `source` is the path that the
    domain used, `format` the image format, `attributes` free text facts needed to attach it again (bus, alias).
    """

    disk: str
    size: int
    map: MapRef
    kind: DiskKind = DiskKind.DISK
    changed_bytes: int = 0
    changed: tuple[int, ...] | None = None
    source: str = ""
    format: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PointStats:
    """What taking the point cost: bytes read from the guest's disks, bytes stored new (maps included), chunks that the
    repository did not have, the guest's pause and the whole in seconds."""

    moved_bytes: int = 0
    stored_bytes: int = 0
    new_chunks: int = 0
    pause_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """A domain at one instant. `parent` is the point before it on its timeline (None for the first of a history).

    `journal` and `sequence` say where in a journal of continuous capture the instant is: the point is the state of all
    its disks after that record and before the next one. Empty and None for a point taken without one.
    """

    id: str
    domain: str
    domain_uuid: str
    uri: str
    time: datetime
    timeline: str
    parent: str | None
    disks: tuple[DiskPoint, ...]
    consistency: Consistency = Consistency.CRASH
    reason: str = "manual"
    label: str = ""
    xml: str = ""
    stats: PointStats = PointStats()
    notes: tuple[str, ...] = ()
    journal: str = ""
    sequence: int | None = None

    def disk(self, name: str) -> DiskPoint:
        """The disk of that target name. Raises KeyError."""
        for disk in self.disks:
            if disk.disk == name:
                return disk
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A history. A revert begins a new one: `parent` is the timeline left, `origin` the point it continues from."""

    id: str
    domain_uuid: str
    created: datetime
    parent: str | None = None
    origin: str | None = None
