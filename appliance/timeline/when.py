"""From what a person types to a recovery point.

    latest                       the newest one
    3f0c9a12…                    a point's id, or its beginning (4 characters or more) if no other begins so
    before-upgrade               a label, if only one point has it
    2026-11-24T10:15:30.25Z      a time of any precision down from the month, with Z, +01:00, a zone's name, or none
    2026-11-24 10:15             the same with a blank
    10:15, 10:15:30.25           the last time the clock showed that
    10m ago, 1h30m ago
    #81726, 81726                a write of continuous capture, by its number: see `instant`

A time means the newest point that is not younger: the domain as it was at that instant, on whichever timeline it then
was. Where continuous capture covers the time, it means the last write before it (`instant`). A time without a zone is
local. Fields that are left out are zero, so `10:15` is 10:15:00.000 and not the whole minute, which might already hold
the damage. One exception: with seconds given, a point of that very second (or fraction) is meant, because times are
shown to the second and what was read from a list must lead back to its line.

When clocks are set back and a local time comes twice, the earlier one is meant: going back too far loses less than
going back too little. `Z` or an offset tells them apart.

`latest`, ages, times, `#N` and exact ids mean themselves, whatever labels there are: who types a time wants that time,
and a revert to something else destroys. So no new point is given such a label (`reading`), and the point of one that
was given before this rule is named by its id. Over plain digits a label wins; where a label and the beginning of
another point's id are the same, both are shown.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from difflib import get_close_matches
from shlex import quote
from typing import Final, Protocol, TypeVar
from zoneinfo import ZoneInfo

from appliance.errors import AmbiguousPoint, ConfigError, InGap, NoSuchPoint
from appliance.units import parse_duration

__all__ = [
    "Instant", "Kept", "Span", "bound", "described", "listed", "named", "outdone", "parse_time", "reading", "resolve",
]  # fmt: skip

# Shorter ones are more often a slip than an id.
SHORTEST_PREFIX: Final = 4

_TIME = re.compile(
    r"(?:(?P<year>\d{4})-(?P<month>\d\d)(?:-(?P<day>\d\d))?)?"
    r"(?:(?:^|[tT ]\s*)(?P<hour>\d\d?):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r"\s*(?P<zone>[zZ]|[+-]\d\d(?::?\d\d)?|[A-Za-z]+(?:/[A-Za-z0-9_+-]+)*)?"
)
_AGO = re.compile(r"(?P<duration>.*\S)\s+ago", re.IGNORECASE)
_WRITE = re.compile(r"#\d{1,19}\??")
# Ids begin with their time in milliseconds: those of the years 2004 to 2039 with 01.
_ID = re.compile(r"[0-9a-f]{20}|01[0-9a-f]{2,18}", re.IGNORECASE)


class Kept(Protocol):
    """What is asked of a point; model.Point and the catalogue's summaries have it."""

    @property
    def id(self) -> str: ...
    @property
    def time(self) -> datetime: ...
    @property
    def label(self) -> str: ...


class Span(Protocol):
    """A gap of the catalogue: nothing was captured after `start` and before `end`."""

    @property
    def start(self) -> datetime: ...
    @property
    def end(self) -> datetime: ...
    @property
    def reason(self) -> str: ...


P = TypeVar("P", bound=Kept)

_ANY: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Instant:
    """`time` (UTC); points up to `time` + `unit` were possibly shown as this time. `unit` 0: exactly this time."""

    time: datetime
    unit: timedelta = timedelta()


def resolve(
    points: Iterable[P],
    text: str,
    now: datetime,
    domain: str,
    *,
    gaps: Sequence[Span] = (),
    zone: tzinfo | None = None,
) -> P:
    """The one of a domain's points that `text` names. `zone` None: the system's; `gaps`: times to refuse.

    Raises NoSuchPoint, AmbiguousPoint, or InGap when nothing was captured then; each names the nearest points.
    """
    ordered = sorted(points, key=lambda point: (point.time, point.id))
    wanted = text.strip()
    if not ordered:
        raise NoSuchPoint(domain=domain, when=text, hint=f"`rewind point {quote(domain)}` takes the first one")
    found = _with_id(ordered, wanted)
    if not found and wanted.lower() == "latest":
        return ordered[-1]
    if not found:
        instant = parse_time(wanted, now, zone)
        if instant is not None:
            return _at(ordered, instant, text, now, domain, gaps, zone)
        found = _called(ordered, wanted)
    if len(found) > 1:
        raise AmbiguousPoint(domain=domain, when=text, count=len(found), candidates=_some(found, zone))
    if not found:
        raise NoSuchPoint(domain=domain, when=text, hint=_hint(ordered, wanted, zone, domain))
    return found[0]


def named(points: Sequence[P], text: str) -> bool:
    """Whether `resolve` takes the text for an id, its beginning, a label or `latest`, and not for a time."""
    wanted = text.strip()
    if wanted.lower() == "latest" or _with_id(points, wanted):
        return True
    # Whether a time makes sense does not depend on when it is asked.
    return parse_time(wanted, _ANY) is None and bool(_called(points, wanted))


def reading(text: str) -> str:
    """What `resolve` takes the text for whatever labels there are, in words; empty when it is free to be a label."""
    wanted = text.strip()
    if wanted.lower() == "latest":
        return "the newest point"
    if _WRITE.fullmatch(wanted):
        return "the number of a write"
    if parse_time(wanted, _ANY) is not None:
        return "a time"
    return "the id of a point" if _ID.fullmatch(wanted) else ""


def outdone(points: Iterable[P], text: str) -> list[P]:
    """Those that have the text for a label which `resolve` takes for something else."""
    wanted = text.strip()
    same = [point for point in points if point.label == wanted and point.id != wanted.lower()]
    return same if same and reading(wanted) else []


def listed(points: Iterable[P], instant: Instant) -> list[P]:
    """Those that a list may have shown with this time."""
    return [point for point in points if instant.time <= point.time < instant.time + instant.unit]


def parse_time(text: str, now: datetime, zone: tzinfo | None = None) -> Instant | None:
    """The instant that a time or `… ago` means, None if the text is neither. Nothing is known of points here."""
    ago = _AGO.fullmatch(text.strip())
    try:
        if ago is not None:
            return Instant((now - timedelta(seconds=parse_duration(ago["duration"]))).astimezone(UTC))
        return _clock_time(text.strip(), now, zone)
    except (ValueError, OverflowError):
        return None  # 25:00, 30 February, a zone that does not exist


def bound(text: str, now: datetime) -> datetime:
    """The instant that an end of a window means: a time, `… ago`, or a duration before now. Raises ConfigError."""
    try:
        return now - timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        found = parse_time(text, now)
    if found is None:
        raise ConfigError(reason=f"{text!r} is neither a time nor a duration", hint="14:02, 2026-03-01T14:02 or 2h")
    return found.time


def _clock_time(text: str, now: datetime, local: tzinfo | None) -> Instant | None:
    match = _TIME.fullmatch(text)
    if match is None or not (match["year"] or match["hour"]) or (match["hour"] and match["month"] and not match["day"]):
        return None
    zone = _zone(match["zone"]) if match["zone"] else local
    fraction = (match["fraction"] or "")[:6]
    unit = timedelta(microseconds=10 ** (6 - len(fraction))) if match["second"] else timedelta()
    clock = time(
        int(match["hour"] or 0), int(match["minute"] or 0), int(match["second"] or 0), int(fraction.ljust(6, "0"))
    )
    if match["year"]:
        day = date(int(match["year"]), int(match["month"]), int(match["day"] or 1))
        return Instant(_utc(day, clock, zone), unit)
    today = now.astimezone(zone).date()
    found = _utc(today, clock, zone)
    return Instant(found if found <= now else _utc(today - timedelta(days=1), clock, zone), unit)


def _utc(day: date, clock: time, zone: tzinfo | None) -> datetime:
    return datetime.combine(day, clock, zone).astimezone(UTC)


def _zone(name: str) -> tzinfo:
    """Raises ValueError if there is none."""
    if name in {"Z", "z"}:
        return UTC
    if name[0] in "+-":
        digits = name[1:].replace(":", "").ljust(4, "0")
        offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        return timezone(-offset if name[0] == "-" else offset)
    try:
        return ZoneInfo(name)
    except (OSError, KeyError) as error:
        raise ValueError(name) from error


def _at(
    points: Sequence[P], instant: Instant, text: str, now: datetime, domain: str, gaps: Sequence[Span],
    zone: tzinfo | None,
) -> P:  # fmt: skip
    """The newest point not younger than `instant`, which is not in a gap; `points` ascend and are not empty."""
    if shown := listed(points, instant):
        return shown[-1]
    after = bisect_right(points, instant.time, key=lambda point: point.time)
    if instant.time > now:
        raise InGap(domain=domain, when=text, reason="it is still to come", nearest=described(points[-1], zone))
    if after == 0:
        raise InGap(domain=domain, when=text, reason="the first point is younger", nearest=described(points[0], zone))
    for gap in gaps:
        if gap.start < instant.time < gap.end:
            nearest = " and ".join(described(point, zone) for point in points[after - 1 : after + 1])
            raise InGap(domain=domain, when=text, reason=gap.reason, nearest=nearest)
    return points[after - 1]


def _with_id(points: Sequence[P], text: str) -> list[P]:
    return [point for point in points if point.id == text.lower()]


def _called(points: Sequence[P], text: str) -> list[P]:
    """Those with that label, or with an id that begins so."""
    if _WRITE.fullmatch(text):
        return []
    begin = text.lower() if len(text) >= SHORTEST_PREFIX else None
    return [one for one in points if (one.label and one.label == text) or (begin and one.id.startswith(begin))]


def described(point: Kept, zone: tzinfo | None) -> str:
    """In the zone that a typed time is taken in, so that it agrees with the lists and can be typed."""
    label = f" {point.label!r}" if point.label else ""
    return f"{point.id}{label} of {point.time.astimezone(zone).isoformat(sep=' ', timespec='milliseconds')}"


def _some(points: Sequence[Kept], zone: tzinfo | None) -> str:
    """The newest of them."""
    more = len(points) - 3
    return ", ".join(described(point, zone) for point in points[-3:]) + (f" and {more} more" if more > 0 else "")


def _hint(points: Sequence[Kept], text: str, zone: tzinfo | None, domain: str) -> str:
    labels = {point.label: point for point in points if point.label}
    close = get_close_matches(text, labels, n=2) or get_close_matches(text, [point.id for point in points], n=1)
    if close:
        return "did you mean " + " or ".join(repr(one) for one in close) + "?"
    if _WRITE.fullmatch(text) or text.isdecimal():
        return f"numbers are of recorded writes, and none are recorded here: `rewind protect {domain} --continuous`"
    if ago := _meant_ago(text):
        return f"did you mean '{ago}'?"
    return f"a time, a label, `10m ago`, `latest`, or an id; the newest point is {described(points[-1], zone)}"


def _meant_ago(text: str) -> str:
    """Of a duration without its `ago`, or one that was meant to lead back by its sign; empty of anything else."""
    duration = re.sub(r"^(-\s*|in\s+)", "", text, flags=re.IGNORECASE)
    found = f"{duration} ago"
    return found if parse_time(found, _ANY) is not None else ""
