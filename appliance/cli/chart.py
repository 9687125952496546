"""A domain's story as a drawing of characters, as wide as it is told to be; no colour, so it can be kept and compared.

rate      ▁▂▂▇█▁    12.4 MiB at most in 1 m 30 s
3f9c01aa  ●──●──●──xxx●──◆
77b0e2d4                 ╰─●───●
          10:00       11:00       12:00
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from appliance.cli import records
from appliance.cli.text import clock, counted
from appliance.timeline.catalogue import Gap
from appliance.timeline.story import Bucket, Lane, Story
from appliance.units import format_duration, format_size

__all__ = ["MARGIN", "columns_of", "draw", "costs", "plain", "remarks", "standing"]

# The lanes' names and the blanks behind them.
MARGIN = 10
_LEAST = 20
_BLOCKS = " ▁▂▃▄▅▆▇█"
_POINT, _LABELLED, _TAPPED, _BETWEEN, _GAP, _BEGIN, _MARK = "●◆─·x╰▾"
_LEGEND = (
    (_POINT, "point"), (_LABELLED, "labelled"), (_MARK, "mark"), (_TAPPED, "every write"), (_BETWEEN, "points only"),
    (_GAP, "gap"), (_BEGIN, "revert"),
)  # fmt: skip
# Of each kind, the newest so many are told; `--json` has them all.
_TOLD = 8
# For a terminal or a file that cannot take more: the shape stays.
_ASCII = str.maketrans(" ▁▂▃▄▅▆▇█●◆─·x╰▾…", " ..:-=+*#o@-.x`v~")


def columns_of(width: int) -> int:
    """How many parts the time is cut into on a terminal of that width."""
    return max(_LEAST, width - MARGIN)


def plain(text: str) -> str:
    """The same in ASCII."""
    return text.translate(_ASCII)


def draw(story: Story) -> str:
    """Rate, a lane for each timeline, the clock, and what the signs mean."""
    count = len(story.buckets)
    rows = [_row("rate", _rate(story.buckets))]
    marks = _put([one.time for one in story.marks], story, [" "] * count, _MARK)
    if story.marks:
        rows.append(_row("", marks))
    rows += [_row(lane.timeline[:8], _lane(story, lane, count)) for lane in story.lanes]
    rows.append(_row("", _axis(story, count)))
    signs = {sign for row in rows[1:-1] for sign in row[MARGIN:]}
    legend = "  ".join(f"{sign} {word}" for sign, word in _LEGEND if sign in signs)
    return "\n".join([_head(story), *rows, *([f"{'':{MARGIN}}{legend}"] if legend else [])])


def _head(story: Story) -> str:
    """The window, and the highest column of the rate."""
    length = (story.until - story.since).total_seconds()
    most = max(story.buckets, key=lambda one: one.bytes)
    said = f"{clock(story.since)} to {clock(story.until)} ({format_duration(length)})"
    if most.bytes:
        said += f", up to {format_size(most.bytes / most.seconds)}/s {'written' if most.exact else 'differ'}"
    return f"{said}, {counted(len(story.points), 'point')}"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{MARGIN}}{''.join(cells)}".rstrip()


def _rate(buckets: Sequence[Bucket]) -> list[str]:
    """Linear from nothing to the highest; what is little but not nothing is seen."""
    most = max((one.bytes for one in buckets), default=0)
    return [_BLOCKS[max(1, round(one.bytes / most * (len(_BLOCKS) - 1)))] if one.bytes else " " for one in buckets]


def _lane(story: Story, lane: Lane, count: int) -> list[str]:
    """What captured the time in which it was the present, gaps over that, points over all."""
    cells = [" "] * count
    low = _column(story, lane.start, count)
    if lane.points:
        _fill(cells, low, _column(story, lane.points[-1].time, count), _BETWEEN)
    covered = [(one.since, one.end, _TAPPED) for one in story.spans if one.since is not None]
    for start, end, sign in (*covered, *((one.start, one.end, _GAP) for one in story.gaps)):
        if start <= lane.end and end >= lane.start:
            first, last = _column(story, max(start, lane.start), count), _column(story, min(end, lane.end), count)
            _fill(cells, first, last, sign)
    if lane.origin is not None and lane.start > story.since:
        cells[low] = _BEGIN
    _put([one.time for one in lane.points], story, cells, _POINT)
    return _put([one.time for one in lane.points if one.label], story, cells, _LABELLED)


def _fill(cells: list[str], low: int, high: int, sign: str) -> None:
    for column in range(low, high + 1):
        cells[column] = sign


def _put(times: Sequence[datetime], story: Story, cells: list[str], sign: str) -> list[str]:
    for time in times:
        cells[_column(story, time, len(cells))] = sign
    return cells


def _column(story: Story, time: datetime, count: int) -> int:
    place = int((time - story.since) / (story.until - story.since) * count)
    return min(max(place, 0), count - 1)


def _axis(story: Story, count: int) -> list[str]:
    """Local times, each beginning at the column that it names, as many as fit."""
    cells = [" "] * count
    length = story.until - story.since
    form = "%H:%M:%S" if length < timedelta(minutes=10) else "%H:%M" if length < timedelta(days=2) else "%m-%d"
    parts = max(1, min(6, count // 14))
    for part in range(parts):
        text = (story.since + length * part / parts).astimezone().strftime(form)
        low = round(count * part / parts)
        cells[low : low + len(text)] = list(text)
    return cells[:count]


def remarks(story: Story) -> list[str]:
    """Labels, marks, reverts, gaps and what else happened, by time; the newest of each kind."""
    kinds = {
        "labels": [(one.time, f"point {one.id} {one.label!r}") for one in story.points if one.label],
        "marks": [(one.time, f"mark {one.label!r} at write {one.sequence}") for one in story.marks],
        "reverts": [(one.time, f"revert to point {one.point}, at write {one.sequence}") for one in story.branches],
        "gaps": [(one.start, f"gap of {_length(one)}: {one.reason}") for one in story.gaps],
        "events": [(one.time, f"{one.kind}: {one.detail}") for one in story.events],
    }
    lines = sorted(line for told in kinds.values() for line in told[-_TOLD:])
    left = [f"{len(told) - _TOLD} {name}" for name, told in kinds.items() if len(told) > _TOLD]
    more = [f"and earlier in this time: {', '.join(left)} (--json has them)"] if left else []
    return [*more, *(f"{clock(time)}  {text}" for time, text in lines)]


def _length(gap: Gap) -> str:
    return format_duration((gap.end - gap.start).total_seconds())


_MODES = {
    "manual": "points are taken by hand", "epochs": "points are taken by the clock", "tap": "every write is captured",
    "behind": "every write is captured, but hardly kept up with", "waiting": "writes are not captured now",
    "paused": "paused",
}  # fmt: skip


def standing(now: records.Capture | None) -> list[str]:
    """How it stands, in one sentence; nothing for a domain that is not protected."""
    if now is None:
        return []
    return [
        "now: " + ", ".join([_MODES.get(now.mode, now.mode) + (f" ({now.reason})" if now.reason else ""), *costs(now)])
    ]


def costs(now: records.Capture) -> list[str]:
    """What would be lost now, and what the capture takes; only what is known."""
    parts = []
    if now.near_seconds is not None and now.far_seconds == now.near_seconds:
        parts.append(f"{format_duration(now.near_seconds)} would be lost")
    elif now.far_reason:
        how = " in a power cut" if now.journal else ""
        parts += [] if now.near_seconds is None else [f"{format_duration(now.near_seconds)} would be lost{how}"]
        parts.append(now.far_reason)
    else:
        lost = ((now.near_seconds, "in a power cut"), (now.far_seconds, "with the host"))
        parts += [f"{format_duration(seconds)} would be lost {how}" for seconds, how in lost if seconds is not None]
    if now.added_latency_seconds is not None:
        parts.append(f"{_short(now.added_latency_seconds)} added to a write")
    if now.spool_bytes is not None:
        limit = f" of {format_size(now.spool_limit_bytes)}" if now.spool_limit_bytes else ""
        parts.append(f"journal {format_size(now.spool_bytes)}{limit}")
    if now.shipped_bytes is not None:
        parts.append(f"{format_size(now.shipped_bytes)} in the repository")
    return parts


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 0.001 else format_duration(seconds)
