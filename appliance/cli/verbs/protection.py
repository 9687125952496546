"""protect, unprotect, point, status."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from shlex import quote
from typing import TYPE_CHECKING

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.convert import capture_record, point_record
from appliance.cli.params import domain_argument, duration_option, rate_option, wait_option
from appliance.cli.running import emit_running, emit_streamed
from appliance.cli.text import clock, counted, since
from appliance.errors import (
    AgentUnavailable,
    CaptureError,
    ConnectError,
    DiskNotFound,
    DomainBusy,
    DomainLost,
    DomainNotFound,
    Locked,
    MonitorError,
    NoSpace,
    NotProtected,
    NotSupported,
    PushFailed,
    RevertUnderWay,
    WrongKey,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.status import DomainState

__all__ = ["pause_command", "point_command", "protect_command", "status_command", "unprotect_command"]

_QUIESCE = click.Choice(["auto", "require", "never"])


@verb("protect", ConnectError, DomainNotFound, DiskNotFound, NotSupported, DomainBusy, Locked, RevertUnderWay, WrongKey)
@domain_argument()
@duration_option("--every", text="`rewind daemon` takes a point this often (15m, 1h).")
@click.option(
    "--disk", "disks", multiple=True, metavar="TARGET", help="Only this disk (vda); may be repeated. Default: all."
)
@click.option("--quiesce", type=_QUIESCE, help="Freeze the guest's file systems through its agent (default auto).")
@click.option(
    "--continuous/--no-continuous", default=None,
    help="Record every write, so that each is a recovery point; or end that. --every goes on beside it.",
)  # fmt: skip
@duration_option(
    "--max-added-latency", zero=True,
    text="When recording adds more than this to one write of a hundred, it stops for a while (5ms; 0: never).",
)  # fmt: skip
@duration_option(
    "--verify-every", zero=True, text="`rewind daemon` boots the newest point as a test this often (1d; 0: never)."
)
@wait_option()
def protect_command(
    context: Context, domain: str, every: float | None, disks: tuple[str, ...], quiesce: str | None,
    continuous: bool | None, max_added_latency: float | None, verify_every: float | None, wait: float,
) -> None:  # fmt: skip
    """Begin to protect DOMAIN, or change how it is protected.

    Nothing is copied yet: the first `rewind point` takes the whole disks, every later one what has changed. A disk that
    cannot be protected is refused with the reason.

    With --continuous a process of its own records every write of all protected disks from now on, and takes the first
    point by itself. It ends with `--no-continuous` or `unprotect`; `rewind pause` makes it step aside for a while.
    """
    from appliance.service.protection import protect

    with context.session() as session:
        made = protect(
            session, domain, every, disks, quiesce, wait, continuous=continuous, max_added_latency=max_added_latency,
            verify_every=verify_every,
        )  # fmt: skip
    record = made.record
    result = records.Protected(
        record.domain, record.uuid, record.uri, made.targets, record.every, record.quiesce, made.already,
        record.continuous, record.max_added_latency, tuple(session.warnings), record.verify_every,
    )  # fmt: skip
    when = f"every {format_duration(record.every)}, by `rewind daemon`" if record.every else "when asked"
    recorded = "every write recorded, " if record.continuous else ""
    context.output.emit(result, f"{record.domain}: {', '.join(made.targets)} protected, {recorded}a point {when}")


@verb("pause", ConnectError, DomainNotFound, NotProtected, RevertUnderWay, Locked, CaptureError, DomainBusy, WrongKey)
@domain_argument()
@duration_option("--for", text="End it by itself after this time (10m). Default: `rewind pause DOMAIN --end` ends it.")
@click.option("--end", is_flag=True, help="Go on now.")
@wait_option("up to a minute, for a point or a tap under way")
def pause_command(context: Context, domain: str, end: bool, wait: float, **given: float | None) -> None:
    """Let the disks of DOMAIN alone for a while, so that its admin can commit, copy or resize them.

    Nothing of rewind is in the domain's block graph when it returns, and the daemon takes no points. What is written
    meanwhile cannot be reached write by write; it is in the first point after it, which reads only what changed.
    """
    from appliance.service.tap import pause, unpause

    seconds = given["for"]
    if end and seconds is not None:
        raise click.UsageError("--end and --for exclude each other")
    with context.session() as session:
        made = unpause(session, domain) if end else pause(session, domain, seconds, wait)
    until = None if end or made.until is None else datetime.fromtimestamp(made.until, UTC)
    context.output.emit(records.Paused(made.domain, made.uuid, not end, until), _paused(made.domain, end, until))


def _paused(domain: str, end: bool, until: datetime | None) -> str:
    if end:
        return f"{domain}: protection goes on"
    last = f"until {clock(until)}" if until else f"until `rewind pause {quote(domain)} --end`"
    return f"{domain}: its disks are left alone {last}"


@verb("unprotect", ConnectError, NotProtected, Locked, RevertUnderWay)
@domain_argument()
@wait_option()
def unprotect_command(context: Context, domain: str, wait: float) -> None:
    """End the protection of DOMAIN: its bitmaps of ours are removed, its points stay.

    Works as well when the domain is gone. `rewind forget` deletes points. Writes that were recorded stay, too: each can
    be restored or exported for as long as `journal_keep` says, and `rewind gc` lets go of those that are older.
    """
    from appliance.service.lapse import spooled
    from appliance.service.protection import unprotect

    with context.session() as session:
        record, kept = unprotect(session, domain, wait)
        journal = spooled(session, record.uuid)
    text = f"{record.domain} is no longer protected; {counted(kept, 'recovery point')} kept"
    if journal:
        text += f", and {format_size(journal)} of its journal: `rewind gc` lets go of what is old enough"
    context.output.emit(records.Unprotected(record.domain, record.uuid, kept, journal), text)


def _label(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """An empty one comes of a variable that is not set: the point would have no name, and nobody would notice."""
    if value is not None and not value.strip():
        raise click.BadParameter(f"{value!r} is no label; without --label the point has none", ctx, param)
    return value or ""


@verb(
    "point", ConnectError, DomainNotFound, AgentUnavailable, NotSupported, MonitorError, DomainBusy, DomainLost,
    PushFailed, NotProtected, Locked, WrongKey, NoSpace, RevertUnderWay,
)  # fmt: skip
@domain_argument()
@click.option("--label", callback=_label, metavar="TEXT",
              help="A name to find it by; `latest`, times, ages, ids and `#5` are none.")  # fmt: skip
@click.option("--quiesce", type=_QUIESCE, help="As for `protect`, for this point only.")
@rate_option("Read at most this much a second (50M).")
@wait_option()
def point_command(
    context: Context, domain: str, label: str, quiesce: str | None, rate: int | None, wait: float
) -> None:
    """Take a recovery point of DOMAIN now.

    All its protected disks at one instant. Only what changed since the last point is read. The guest pauses for
    milliseconds and never sees an error of ours.
    """
    from appliance.service.protection import point

    with context.session() as session, context.output.meter(f"point of {domain}") as meter:
        taken = point(session, domain, label=label, quiesce=quiesce, rate=rate, wait=wait, progress=meter.update)
    record = point_record(taken)
    # A person has read the warnings already.
    told = replace(record, notes=(*record.notes, *session.warnings))
    context.output.emit(told, _taken(record))


def _taken(record: records.Point) -> str:
    parts = [
        record.id, clock(record.time), record.consistency, f"{format_size(record.changed_bytes)} changed",
        f"{format_size(record.stored_bytes)} stored", f"guest paused {format_duration(record.pause_seconds)}",
    ]  # fmt: skip
    lines = ["  ".join(parts)]
    return "\n".join([*lines, *(f"  {note}" for note in record.notes)])


@verb("status", ConnectError, DomainNotFound, WrongKey, codes={1: "done, and something deserves a look"})
@domain_argument(required=False)
@click.option("--all", "everything", is_flag=True, help="Domains that are not protected, too.")
def status_command(context: Context, domain: str | None, everything: bool) -> int:
    """Tell how things stand: the repository, each domain, its newest point, what is under way.

    Captured are `epochs` (what changed between two points) or, with --continuous, by a `tap` every write.

    Exit code 1 when hardly any room is left for the repository, a domain is late, a revert has not ended, the
    hypervisor does not answer, a protected domain or disk is not there or cannot be captured, every write of a running
    domain is wanted and is not captured, no daemon runs though a domain is protected with --every, or nobody serves a
    domain or machine that was brought up and whose disks are not its own yet.
    """
    from appliance.cli.ui import table
    from appliance.service.status import brought_up, status

    with context.session() as session:
        instance, domains = status(session, domain, everything)
        started, served = ([], []) if domain else brought_up(session)
    found = [_domain(one) for one in domains]
    orphans = [] if instance.daemon else [one.domain for one in domains if one.every]
    context.output.emit(
        records.Status(
            context.home_path,
            instance.url,
            instance.repository_id,
            instance.encrypted,
            instance.points,
            len(found),
            instance.daemon,
            len(started) + len(served),
            instance.free,
        ),
        f"repository {instance.url}: {counted(instance.points, 'point')}, "
        f"{'' if instance.encrypted else 'not '}encrypted",
    )
    columns = ("domain", "state", "protected", "capture", "every", "points", "newest", "remark")
    context.output.emit_all(found, lambda rows: table(columns, [_cells(row) for row in rows], right=("points",)))
    for running in started:
        emit_running(context, running)
    for machine in served:
        emit_streamed(context, machine)
    if orphans:
        context.output.tell(f"no `rewind daemon` runs, so nobody takes the points of {', '.join(orphans)} by the clock")
    if instance.nearly_full:
        context.output.tell(f"the repository has only {format_size(instance.free or 0)} left: the next point may fail")
    blind = any(one.capture and one.capture.mode in ("waiting", "behind") and one.state == "running" for one in found)
    silent = any(one.state == "unknown" and one.notes for one in found)
    lost = any(one.uncaptured or one.state == "gone" for one in domains)
    alone = "stopped" in [*(one.phase for one in started), *(one.phase for one in served)]
    late = any(one.late or one.revert for one in found)
    return 1 if instance.nearly_full or orphans or silent or blind or lost or alone or late else 0


def _domain(one: DomainState) -> records.DomainStatus:
    return records.DomainStatus(
        one.domain, one.uuid, one.uri, one.state, one.protected, one.disks, one.every, one.quiesce, one.points,
        one.last_point, one.last_time, one.age, one.late, one.revert, one.busy, one.notes,
        capture_record(one.capture),
    )  # fmt: skip


def _cells(row: records.DomainStatus) -> tuple[str, ...]:
    from appliance.cli.chart import costs

    now = row.capture
    tapped = now is not None and now.mode in ("tap", "behind")
    remarks = [f"revert to {row.revert} has not ended" if row.revert else "", row.busy or "", *row.notes]
    remarks += [now.reason, *(costs(now) if tapped else ())] if now else []
    return (
        row.domain, row.state, ",".join(row.disks) or "all" if row.protected else "no", now.mode if now else "-",
        format_duration(row.every_seconds) if row.every_seconds else "-", str(row.points), since(row.age_seconds),
        "; ".join(["late"] * row.late + [one for one in remarks if one]),
    )  # fmt: skip
