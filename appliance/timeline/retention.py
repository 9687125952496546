"""Which recovery points to keep: rules by count and by calendar, as admins know them from restic and borg.

    last N                    the newest N points
    hourly, daily, weekly,    of each of the last N hours, days … in which there is a point: the newest one
    monthly, yearly N
    within SECONDS            all that are at most so much older than the newest one

A point stays if any rule keeps it. Hours, days and weeks are those of the local calendar (weeks begin on Monday). As
long as a calendar rule has not used up its N, it keeps the oldest point too, so that a young history does not lose
its beginning. `within` counts from the newest point, not from now: after a month of standstill it does not drop all.

A point that has a label stays: whoever gave a name to an instant means to come back to it, and must not lose it to a
rule by count that somebody runs by the clock. `labelled` False takes that back.

The state before a revert is kept for a protection window whatever the rules say: `undo` leads back to the last one,
and `revert` to any of them. Points are complete in themselves: dropping one touches no other. Nothing here deletes;
the plan is shown or carried out by the caller. All functions are pure, but for the system's time zone where none is
given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, tzinfo
from typing import Final, Generic, Protocol, TypeVar

from appliance.errors import ConfigError
from appliance.units import format_duration

__all__ = ["Decision", "Policy", "is_safety", "plan"]

SAFETY_SECONDS: Final = 7 * 86400.0
# First words of a point's reason that say: taken so that a revert can be undone.
_SAFETY_WORDS = frozenset({"safety", "undo", "revert"})
# Fields that keep something beside the rules, and that are no rule.
_BESIDE = frozenset({"protect", "labelled"})


class Kept(Protocol):
    """What is asked of a point; model.Point and the catalogue's summaries have it."""

    @property
    def id(self) -> str: ...
    @property
    def time(self) -> datetime: ...
    @property
    def reason(self) -> str: ...
    @property
    def label(self) -> str: ...


P = TypeVar("P", bound=Kept)


@dataclass(frozen=True, slots=True)
class Policy:
    """Counts, 0: the rule does not exist; `within` and `protect` in seconds. Raises ConfigError for negative ones.

    `protect` is the window in which what a revert left behind is never dropped; `labelled`: what has a label stays.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float = 0.0
    protect: float = SAFETY_SECONDS
    labelled: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(reason=f"cannot keep {getattr(self, field.name)} of {field.name}")

    @property
    def empty(self) -> bool:
        """No rule keeps anything."""
        return not any(getattr(self, field.name) for field in fields(self) if field.name not in _BESIDE)


@dataclass(frozen=True, slots=True)
class Decision(Generic[P]):
    """`reasons` says which rules keep the point; for one that goes, that none does."""

    point: P
    keep: bool
    reasons: tuple[str, ...]


def plan(points: Iterable[P], policy: Policy, now: datetime, zone: tzinfo | None = None) -> list[Decision[P]]:
    """A decision for each point of one domain, oldest first. `zone` None: the system's.

    A policy without rules keeps everything: whoever forgot to say what to keep does not mean nothing.
    """
    newest_first = sorted(points, key=lambda point: (point.time, point.id), reverse=True)
    reasons: dict[str, list[str]] = {point.id: [] for point in newest_first}
    for keeps in (_by_count, _by_calendar, _by_age, _by_label, _by_safety):
        for point, reason in keeps(newest_first, policy, now, zone):
            reasons[point.id].append(reason)
    default = ("there is no rule",) if policy.empty else ()
    return [
        Decision(point, bool(found), found or ("no rule keeps it",))
        for point in reversed(newest_first)
        for found in [tuple(reasons[point.id]) or default]
    ]


def is_safety(point: Kept) -> bool:
    """Whether the point was taken so that a revert can be undone."""
    words = re.findall("[a-z]+", point.reason.lower())
    return bool(words) and words[0] in _SAFETY_WORDS


_Found = Iterable[tuple[P, str]]


def _by_count(points: Sequence[P], policy: Policy, now: datetime, zone: tzinfo | None) -> _Found[P]:
    return [(point, "last") for point in points[: policy.last]]


def _by_calendar(points: Sequence[P], policy: Policy, now: datetime, zone: tzinfo | None) -> _Found[P]:
    local = [point.time.astimezone(zone) for point in points]
    for rule, span_of in _SPANS.items():
        left: int = getattr(policy, rule)
        before = None
        for number, (point, time) in enumerate(zip(points, local, strict=True)):
            span = span_of(time)
            oldest = number == len(points) - 1
            if left and (span != before or oldest):
                left -= 1
                yield point, f"{rule} {span}" if span != before else f"oldest for {rule}"
            before = span


def _by_age(points: Sequence[P], policy: Policy, now: datetime, zone: tzinfo | None) -> _Found[P]:
    if not policy.within or not points:
        return []
    # A point of the future, from a clock that was wrong, must not make all others old.
    start = min(now, points[0].time) - timedelta(seconds=policy.within)
    return [(point, f"within {format_duration(policy.within)}") for point in points if point.time >= start]


def _by_label(points: Sequence[P], policy: Policy, now: datetime, zone: tzinfo | None) -> _Found[P]:
    # Without a rule everything stays, for that one reason; and what a revert calls its points nobody gave a name.
    wanted = policy.labelled and not policy.empty
    return [(point, "it has a label") for point in points if wanted and point.label and not is_safety(point)]


def _by_safety(points: Sequence[P], policy: Policy, now: datetime, zone: tzinfo | None) -> _Found[P]:
    start = now - timedelta(seconds=policy.protect)
    reason = f"the state before a revert stays {format_duration(policy.protect)}"
    return [(point, reason) for point in points if policy.protect and point.time >= start and is_safety(point)]


def _week(time: datetime) -> str:
    year, week, _ = time.isocalendar()
    return f"{year}-W{week:02d}"


# The hour has its offset in it: when clocks are set back the same hour comes twice.
_SPANS: dict[str, Callable[[datetime], str]] = {
    "hourly": lambda time: time.strftime("%Y-%m-%d %H:00%z"),
    "daily": lambda time: time.strftime("%Y-%m-%d"),
    "weekly": _week,
    "monthly": lambda time: time.strftime("%Y-%m"),
    "yearly": lambda time: time.strftime("%Y"),
}
