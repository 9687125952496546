"""What is due now: a pure function of the tasks and the clock, which is passed in.

A task that is late runs once, not once for every interval it missed. After a failure the next try comes after a minute
(after half an interval, where that is shorter), then after twice as long and so on up to an hour: long enough to leave
a broken host alone, short enough that a libvirt that was away for a moment costs no interval. A clock that was set back
makes everything due instead of silent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Task", "due", "next_time"]

_FIRST_BACKOFF, _LONGEST_BACKOFF = 60.0, 3600.0


@dataclass(frozen=True, slots=True)
class Task:
    """One domain with an interval. Times are seconds since the epoch; `last` is the newest point's, `tried` when the
    last attempt began, `failures` how many attempts in a row have failed."""

    uuid: str
    domain: str
    every: float
    last: float | None = None
    tried: float | None = None
    failures: int = 0


def next_time(task: Task, now: float) -> float:
    """When the task is to run next; in the past means it is late."""
    if task.failures and task.tried is not None and task.tried <= now:
        first = min(task.every / 2, _FIRST_BACKOFF)
        # After a thousand failures the power itself would be beyond what a number can hold.
        return task.tried + min(first * 2.0 ** min(task.failures - 1, 60), _LONGEST_BACKOFF)
    if task.last is None or task.last > now:
        return now
    return task.last + task.every


def due(tasks: Iterable[Task], now: float) -> list[Task]:
    """Those that are to run, the one that waits longest first."""
    late = [(next_time(task, now), task.uuid, task) for task in tasks]
    return [task for when, _uuid, task in sorted(late, key=lambda one: one[:2]) if when <= now]
