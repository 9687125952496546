"""timeline: the past of a domain as a drawing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.convert import capture_record, gap_record, summary_record
from appliance.cli.params import domain_argument
from appliance.errors import NotProtected, WrongKey

if TYPE_CHECKING:
    from appliance.timeline.story import Story

__all__ = ["timeline_command"]


@verb("timeline", NotProtected, WrongKey)
@domain_argument()
@click.option("--since", metavar="TIME",
              help="From when on: a time, or a duration before now (2h). Default: the last day.")  # fmt: skip
@click.option("--until", metavar="TIME", help="Until when, in the same way. Default: now.")
@click.option("--width", type=click.IntRange(30, 1000), metavar="COLUMNS", help="Default: the terminal's, else 80.")
def timeline_command(context: Context, domain: str, since: str | None, until: str | None, width: int | None) -> None:
    """Draw the past of DOMAIN: how much was written when, its points, and what was not captured.

    Each timeline has a line of its own: a revert ends the present one and begins another. `x` is a gap: no instant in
    it can be reached, only its two ends. Works while libvirt is down, and for domains that are gone.
    """
    from appliance.cli.chart import columns_of, draw, plain, remarks, standing
    from appliance.service.timeline import timeline

    count = columns_of(width or shutil.get_terminal_size((80, 24)).columns)
    with context.session() as session:
        found = timeline(session, domain, since, until, count)
    story, now = found.story, capture_record(found.now)
    if context.output.json:
        for record in _records(found.domain, story):
            context.output.emit(record)
    text = "\n".join([draw(story), *remarks(story), *standing(now), *found.notes])
    encoding = sys.stdout.encoding or "ascii"
    summary = records.Timeline(
        found.domain, found.uuid, story.since, story.until, len(story.points), len(story.lanes), len(story.gaps),
        story.gap_seconds, sum(one.bytes for one in story.buckets), now, found.notes,
    )  # fmt: skip
    context.output.emit(summary, text if encoding.lower().replace("-", "").startswith("utf") else plain(text))


def _records(domain: str, story: Story) -> Iterator[records.Record]:
    """Everything that the drawing shows, by kinds."""
    for bucket in story.buckets:
        yield records.Bucket(domain, bucket.start, bucket.seconds, bucket.bytes, bucket.exact)
    for lane in story.lanes:
        yield records.Lane(domain, lane.timeline, lane.start, lane.end, lane.parent, lane.origin, len(lane.points))
    yield from map(summary_record, story.points)
    for span in story.spans:
        yield records.Span(
            domain, span.journal, span.first, span.last, span.start, span.end, span.since, span.timeline or None,
            span.base_points, span.open, span.reason_ended,
        )  # fmt: skip
    for gap in story.gaps:
        yield gap_record(domain, gap)
    for branch in story.branches:
        yield records.Branch(domain, branch.time, branch.journal, branch.sequence, branch.point, branch.timeline)
    for mark in story.marks:
        yield records.Mark(domain, mark.time, mark.label, mark.journal, mark.sequence)
    for event in story.events:
        yield records.CaptureEvent(domain, event.time, event.kind, event.detail)
