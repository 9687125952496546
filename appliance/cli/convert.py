"""From the service's values to records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from appliance.cli import records
from appliance.model import DiskKind, DiskPoint, Point
from appliance.timeline.catalogue import Gap, Summary

if TYPE_CHECKING:
    from appliance.service.capturing import Capturing

__all__ = ["capture_record", "disk_bytes", "gap_record", "point_record", "summary_record"]


def disk_bytes(disks: Iterable[DiskPoint]) -> tuple[records.DiskBytes, ...]:
    """The guest's disks; NVRAM and TPM state count in the totals only."""
    return tuple(records.DiskBytes(one.disk, one.size, one.changed_bytes) for one in disks if one.kind is DiskKind.DISK)


def point_record(point: Point) -> records.Point:
    """A point that was just taken."""
    stats = point.stats
    return records.Point(
        id=point.id, domain=point.domain, uuid=point.domain_uuid, time=point.time, consistency=point.consistency.value,
        reason=point.reason, label=point.label, timeline=point.timeline, parent=point.parent, since=point.parent,
        changed_bytes=sum(one.changed_bytes for one in point.disks),
        size_bytes=sum(one.size for one in point.disks if one.kind is DiskKind.DISK), disks=disk_bytes(point.disks),
        moved_bytes=stats.moved_bytes, stored_bytes=stats.stored_bytes, pause_seconds=stats.pause_seconds,
        seconds=stats.seconds, notes=point.notes,
    )  # fmt: skip


def summary_record(one: Summary) -> records.Point:
    """A point in a list."""
    return records.Point(
        id=one.id, domain=one.domain, uuid=one.uuid, time=one.time, consistency=one.consistency, reason=one.reason,
        label=one.label, timeline=one.timeline, parent=one.parent, since=one.since, changed_bytes=one.changed_bytes,
        size_bytes=one.size_bytes, disks=disk_bytes(one.disks), moved_bytes=one.moved_bytes,
        stored_bytes=one.stored_bytes, pause_seconds=one.pause_seconds, seconds=one.seconds, notes=one.notes,
    )  # fmt: skip


def gap_record(domain: str, gap: Gap) -> records.Gap:
    return records.Gap(domain, gap.start, gap.end, (gap.end - gap.start).total_seconds(), gap.reason)


def capture_record(one: Capturing | None) -> records.Capture | None:
    """How capture stands; None for a domain that is not protected."""
    if one is None:
        return None
    gap = one.last_gap
    last = records.LastGap(gap.start, gap.end, (gap.end - gap.start).total_seconds(), gap.reason) if gap else None
    return records.Capture(
        one.mode, one.reason, one.near, one.far, one.journal, one.sequence, one.durable, one.latency, one.spool_bytes,
        one.spool_limit, one.shipped_bytes, last, one.far_reason,
    )  # fmt: skip
