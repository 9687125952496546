"""check, gc, forget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, confirm, domain_argument, duration_option
from appliance.cli.text import clock, counted
from appliance.errors import (
    IntegrityError,
    Locked,
    NoSpace,
    NoSuchPoint,
    NotConfirmed,
    NotProtected,
    PermissionDenied,
    RevertUnderWay,
    WrongKey,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.lapse import Lapsed
    from appliance.service.upkeep import Decision

__all__ = ["check_command", "forget_command", "gc_command"]


@verb("check", IntegrityError, WrongKey, Locked)
@click.option("--read-data", is_flag=True, help="Read every byte back and compare it with its hash, too.")
def check_command(context: Context, read_data: bool) -> int:
    """Prove that everything that points need is in the repository, and name exactly what is not.

    Nothing is changed. Exit code 32 when something is wrong.
    """
    from appliance.service.upkeep import check

    began = time.monotonic()
    with context.session() as session, context.output.meter("check") as meter:
        report = check(session, read_data, meter.update)
        points = sum(session.catalogue.count().values())
    for one in report.problems:
        problem = records.Problem(one.object, one.reason, tuple(one.points))
        context.output.emit(problem, f"{one.object}: {one.reason}" + _affects(problem.points))
    affected = len(report.points_affected)
    record = records.CheckSummary(read_data, len(report.problems), points, affected, time.monotonic() - began)
    verdict = (
        f"{record.problems} problems, {affected} of {points} points affected"
        if record.problems
        else f"{points} points, nothing wrong"
    )
    context.output.emit(
        record, f"{verdict} ({format_duration(record.seconds)}{'' if read_data else ', data not read'})"
    )
    return IntegrityError.exit_code if record.problems else 0


def _affects(points: tuple[str, ...]) -> str:
    return f"  (points {', '.join(points[:5])}{', …' if len(points) > 5 else ''})" if points else ""


@verb("gc", Locked, WrongKey, IntegrityError, PermissionDenied, NoSpace)
@click.option("--dry-run", is_flag=True, help="Only tell what would be freed; of journals nothing is told then.")
def gc_command(context: Context, dry_run: bool) -> None:
    """Free what no point needs any more. Safe beside running captures, and at any crash.

    Of a domain that this home captured continuously and does not any more, the recorded writes older than
    `journal_keep` go, when points stand for them: each minute, each hour of what is older than `minutes_keep`, and the
    last write.
    """
    import dataclasses

    from appliance.service.lapse import lapse
    from appliance.service.upkeep import gc

    began = time.monotonic()
    with context.session() as session, context.output.meter("gc") as meter:
        lapsed = [] if dry_run else lapse(session, lambda done, total, what: meter.update(done, total, what))
        report: Any = gc(session, dry_run, meter.update)
    details = {one.name: getattr(report, one.name) for one in dataclasses.fields(report)}
    told = tuple(dataclasses.asdict(one) for one in lapsed)
    record = records.Gc(dry_run, details, time.monotonic() - began, told)
    context.output.emit(record, "\n".join([*map(_lapsed, lapsed), _freed(report)]))


def _lapsed(one: Lapsed) -> str:
    return (
        f"journal of {one.domain}, which is not captured any more: {counted(one.made, 'point')} made of it,"
        f" {format_size(one.bytes)} in {counted(one.segments, 'segment')} let go"
    )


def _freed(report: Any) -> str:
    """What a person wants to know of a gc."""
    lines = [f"{report.points} points need {format_size(report.live_bytes)} in {report.packs} packs"]
    if report.segments:
        lines[0] += f", journals {format_size(report.segment_bytes)} in {report.segments} segments"
    if report.dry_run:
        lines.append(f"would free about {format_size(report.condemned_bytes)}")
    else:
        copied = f", copied {format_size(report.copied_bytes)}" if report.copied_bytes else ""
        lines.append(f"freed {format_size(report.freed_bytes)} in {report.deleted_packs} packs{copied}")
    if report.missing_chunks:
        lines.append(f"{report.missing_chunks} chunks are missing: `rewind check` tells which points they belong to")
    lines += [f"more can go when this has ended: {one}" for one in report.waiting]
    return "\n".join(lines)


_KEEP = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def _keep_options(function: Any) -> Any:
    function = duration_option("--keep-within", text="Keep all that are younger.")(function)
    for name in reversed(_KEEP):
        text = "Keep the newest N." if name == "last" else f"Keep the newest of each of the last N {_span(name)}."
        function = click.option(f"--keep-{name}", type=click.IntRange(min=0), default=0, metavar="N", help=text)(
            function
        )
    return function


def _span(name: str) -> str:
    return {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years"}[name]


@verb("forget", NotProtected, NoSuchPoint, RevertUnderWay, NotConfirmed, Locked, WrongKey, PermissionDenied)
@domain_argument(required=False)
@click.argument("points", nargs=-1, metavar="[WHEN]...", shell_complete=complete_when)
@_keep_options
@click.option(
    "--keep-labelled/--no-keep-labelled", default=True,
    help="Keep what has a label whatever the rules say (default); or only what a rule keeps.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only tell what would be kept and why.")
@click.option("--yes", "-y", is_flag=True, help="Forget also a point by name that `rewind undo` needs, without asking.")
def forget_command(
    context: Context, domain: str | None, points: tuple[str, ...], dry_run: bool, yes: bool,
    keep_labelled: bool, keep_within: float | None, **keep: int,
) -> None:  # fmt: skip
    """Delete the points of DOMAIN (of every domain, without one) that no --keep rule keeps, or those that are named.

    Every point is complete in itself: any can go, the others stay recoverable. `rewind gc` frees the space. Rules leave
    a point that has a label, and for 7 days the state before each revert. The point that `rewind undo` leads back to
    goes by name only, and after a question.
    """
    from appliance.cli.ui import table
    from appliance.service.upkeep import forget
    from appliance.timeline.retention import Policy

    counts = {name: keep[f"keep_{name}"] for name in _KEEP}
    policy = Policy(**counts, within=keep_within or 0.0, labelled=keep_labelled)
    if points and not policy.empty:
        raise click.UsageError("name points or give --keep rules, not both")
    with context.session() as session:
        decisions = forget(session, domain, policy, points, dry_run, agree=lambda found: _agree(found, yes))
        # Named points are all that is decided on; those that stay are counted, or it would seem that none do.
        left = session.catalogue.count().get(decisions[0].uuid, 0) if points else None
    found = [
        records.Forget(one.id, one.domain, one.time, d.keep, d.reasons, d.warnings, one.label)
        for d in decisions for one in (d.point,)
    ]  # fmt: skip
    context.output.emit_all(
        found, lambda rows: table(("point", "domain", "time", "label", "", "why"), [_row(row) for row in rows])
    )
    gone = sum(not one.keep for one in found)
    kept = len(found) - gone if left is None else left - gone * dry_run
    summary = records.ForgetSummary(dry_run, kept, gone)
    context.output.emit(summary, f"{kept} kept, {summary.forgotten} {'would be ' if dry_run else ''}forgotten")


def _agree(found: Sequence[Decision], yes: bool) -> None:
    """Ask for each point without which the last revert cannot be undone. Raises NotConfirmed."""
    for one in found if not yes else ():
        if one.undoes and not one.keep:
            point, name = one.point, one.point.domain
            what = f"`rewind undo {name}` leads back to point {point.id} of {clock(point.time)}"
            action = f"forget of point {point.id}, which `rewind undo {name}` leads back to,"
            confirm(f"{what}. Forget it all the same?", action)


def _row(row: records.Forget) -> tuple[str, ...]:
    what = "keep" if row.keep else "forget"
    why = "; ".join((", ".join(row.reasons), *row.warnings)).strip("; ")
    return row.point, row.domain, clock(row.time), row.label, what, why
