"""points, diff."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.convert import gap_record, summary_record
from appliance.cli.params import complete_when, domain_argument
from appliance.cli.text import clock, counted
from appliance.errors import AmbiguousPoint, DiskNotFound, InGap, NoSuchPoint, NotProtected, WrongKey
from appliance.timeline.catalogue import Gap, Summary
from appliance.units import CHUNK, format_duration, format_size

__all__ = ["diff_command", "points_command"]


@verb("points", NotProtected, WrongKey)
@domain_argument()
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--timeline", metavar="ID", help="Only this timeline (or enough of its id).")
@click.option("--since", metavar="TIME", help="Only what is newer than a time, or than a duration before now (2h).")
def points_command(
    context: Context, domain: str, last: int | None, timeline: str | None, since: str | None
) -> None:  # fmt: skip
    """List the recovery points of DOMAIN, oldest first, and the gaps between them.

    `changed` is what differs from the point before it on its timeline, in whole chunks of 64 KiB: the bytes that a
    revert from one to the other moves at most. Works while libvirt is down, and for domains that are gone.
    """
    from appliance.cli.ui import table
    from appliance.service.history import history
    from appliance.timeline.when import bound

    with context.session() as session:
        found = history(session, domain)
    start = bound(since, datetime.now(UTC)) if since else None
    points = [
        one for one in found.points
        if (start is None or one.time > start) and (timeline is None or one.timeline.startswith(timeline))
    ][-last if last else 0 :]  # fmt: skip
    first = points[0].time if points else None
    gaps = [one for one in found.gaps if first is not None and one.end > first]
    rows: list[Summary | Gap] = [*points, *gaps]
    # A gap begins with the last point before it, or later: it stands behind that.
    rows.sort(key=lambda one: (one.time, False) if isinstance(one, Summary) else (one.start, True))
    if context.output.json:
        for row in rows:
            context.output.emit(_record(found.domain, row))
    else:
        context.output.tell(table(_COLUMNS, [_line(row) for row in rows], right=("changed", "stored", "pause")))
    timelines = len({one.timeline for one in found.points})
    context.output.emit(
        records.PointsSummary(found.domain, len(points), len(gaps), timelines),
        "" if points else f"{domain} has no {'such ' if found.points else ''}points",
    )


_COLUMNS = ("point", "time", "consistency", "reason", "timeline", "changed", "stored", "pause", "label")


def _record(domain: str, row: Summary | Gap) -> records.Point | records.Gap:
    if isinstance(row, Summary):
        return summary_record(row)
    return gap_record(domain, row)


def _line(row: Summary | Gap) -> tuple[str, ...]:
    if isinstance(row, Gap):
        length = format_duration((row.end - row.start).total_seconds())
        return ("gap", clock(row.start), "", "", "", "", "", "", f"from then on {length} not captured: {row.reason}")
    said = "; ".join((row.label, *row.notes)).strip("; ")
    return (
        row.id, clock(row.time), row.consistency, row.reason, row.timeline[:8], format_size(row.changed_bytes),
        format_size(row.stored_bytes), format_duration(row.pause_seconds), said,
    )  # fmt: skip


@verb("diff", NotProtected, NoSuchPoint, AmbiguousPoint, InGap, DiskNotFound, WrongKey)
@domain_argument()
@click.argument("older", metavar="WHEN", shell_complete=complete_when)
@click.argument("newer", metavar="WHEN", shell_complete=complete_when)
@click.option("--disk", metavar="TARGET", help="Only this disk.")
@click.option("--extents", is_flag=True, help="List each extent, not only the totals.")
@click.option("--exact", is_flag=True, help="Compare inside the 64 KiB chunks, to 4 KiB: reads both sides of each.")
def diff_command(
    context: Context, domain: str, older: str, newer: str, disk: str | None, extents: bool, exact: bool
) -> None:
    """Tell in which bytes two instants of DOMAIN differ.

    Equal parts of the two are skipped unread, so this takes time by what differs, not by the disk's size. No point is
    made of an instant that only continuous capture has: the id that is shown is the one that a revert to it would make.
    """
    from appliance.service.difference import diff

    with context.session() as session:
        a, b, disks = diff(session, domain, older, newer, disk, 4096 if exact else CHUNK)
        for one in disks:
            count = changed = 0
            for extent in one.extents:
                count, changed = count + 1, changed + extent.length
                if extents:
                    text = f"{one.disk}  {extent.offset:>16}  {extent.length:>12}"
                    context.output.emit(records.DiffExtent(one.disk, extent.offset, extent.length), text)
            record = records.Diff(domain, one.disk, a.id, b.id, one.unit, count, changed)
            text = (
                f"{one.disk}: {format_size(changed)} of {format_size(one.size)} differ, in {counted(count, 'extent')}"
            )
            context.output.emit(record, text)
