"""Text for a person from records: sentences and cells, without knowing a terminal."""

from __future__ import annotations

from datetime import datetime

from appliance.cli import records
from appliance.units import format_duration, format_size

__all__ = ["clock", "counted", "of_disks", "progress_line", "since"]


def clock(moment: datetime | None) -> str:
    """Local time to the second: what an admin compares with the clock on the wall."""
    return "-" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def since(seconds: float | None) -> str:
    """`3 m 20 s ago`, or `never`."""
    return "never" if seconds is None else f"{format_duration(max(seconds, 0))} ago"


def counted(number: int, noun: str) -> str:
    """`1 extent`, `2 extents`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def of_disks(disks: tuple[records.DiskBytes, ...]) -> str:
    """`vda 1.2 MiB, vdb 0 B`."""
    return ", ".join(f"{disk.disk} {format_size(disk.changed_bytes)}" for disk in disks)


def progress_line(progress: records.Progress) -> str:
    """`first full of web: 1.2 GiB of 8 GiB, 180 MiB/s, 38 s left`; the step alone where nothing is counted."""
    if not progress.done and not progress.total:
        return progress.what
    parts = [format_size(progress.done)]
    if progress.total:
        parts[0] += f" of {format_size(progress.total)}"
    parts.append(f"{format_size(progress.per_second)}/s")
    if progress.left_seconds is not None:
        parts.append(f"{format_duration(progress.left_seconds)} left")
    return f"{progress.what}: " + ", ".join(parts)
