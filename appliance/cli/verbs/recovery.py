"""revert, undo, resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, confirm, domain_argument, rate_option, wait_option
from appliance.cli.text import clock, counted, of_disks
from appliance.errors import (
    AmbiguousPoint,
    ConnectError,
    DiskNotFound,
    DomainBusy,
    DomainLost,
    DomainNotFound,
    FenceError,
    InGap,
    Locked,
    MonitorError,
    NoSpace,
    NoSuchPoint,
    NotConfirmed,
    NothingToResume,
    NothingToUndo,
    NotProtected,
    NotRecoverable,
    NotSupported,
    PushFailed,
    RevertUnderWay,
    WrongKey,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.restore.revert import Plan, Result

__all__ = ["resume_command", "revert_command", "undo_command"]

_MANY = (
    ConnectError, DomainNotFound, DiskNotFound, NotSupported, MonitorError, DomainBusy, DomainLost, PushFailed,
    NotProtected, Locked, WrongKey, NoSpace, NoSuchPoint, InGap, AmbiguousPoint, NotRecoverable, RevertUnderWay,
    FenceError, NotConfirmed,
)  # fmt: skip
_RATE = rate_option("Write at most this much a second (50M).")
_YES = click.option("--yes", "-y", is_flag=True, help="Do it without asking.")
_DRY_RUN = click.option(
    "--dry-run",
    is_flag=True,
    help="Only tell what would be done: bytes, extents, expected time, files touched. No point is made.",
)
_INSTANT = click.option(
    "--instant", is_flag=True, help="Let the guest run at once; blocks it has not touched follow behind."
)
_BACKGROUND = click.option("--background", is_flag=True, help="With --instant: return as soon as the guest runs.")


@verb("revert", *_MANY)
@domain_argument()
@click.option(
    "--to",
    "when",
    required=True,
    metavar="WHEN",
    shell_complete=complete_when,
    help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).",
)
@click.option("--disk", "disks", multiple=True, metavar="TARGET", help="Only this disk; may be repeated. Default: all.")
@_DRY_RUN
@_INSTANT
@_BACKGROUND
@_RATE
@_YES
@wait_option()
def revert_command(
    context: Context, domain: str, when: str, disks: tuple[str, ...], dry_run: bool, instant: bool, background: bool,
    rate: int | None, yes: bool, wait: float,
) -> None:  # fmt: skip
    """Take DOMAIN back (or forward) to WHEN by rewriting only the blocks that differ.

    The present is kept as a recovery point first, so `rewind undo` leads back. The guest is reset. Killed at any
    instant, `rewind resume` ends it; until then the domain cannot be started on a half-way disk. A guest that a
    plain revert holds may be let go on by hand (`virsh resume`): its disks read as WHEN, and what has not been moved
    yet waits while the process that serves it is dead.
    """
    from appliance.service import recovery

    if background and not instant:
        raise click.UsageError("--background needs --instant: a plain revert keeps the guest waiting to its end")
    action = f"revert of {domain} to {when}"
    with context.session() as session:
        with _untouched():
            # Who says no, too, leaves no point behind; with --yes the revert follows and finds what was made.
            passing = dry_run or not yes
            planned = recovery.plan(session, domain, when, disks, instant=instant, rate=rate or 0, passing=passing)
            _show_plan(context, planned, always=dry_run, warnings=session.warnings)
            if dry_run:
                return
            _confirm(action, planned, yes)
        with context.output.meter(f"revert of {domain}") as meter:
            result = recovery.revert(
                session, domain, when, disks, instant=instant, background=background, rate=rate or 0, wait=wait,
                progress=meter.update,
            )  # fmt: skip
    _show_result(context, result, session.warnings)


@verb("undo", *_MANY, NothingToUndo)
@domain_argument()
@_DRY_RUN
@_INSTANT
@_BACKGROUND
@_RATE
@_YES
@wait_option()
def undo_command(
    context: Context, domain: str, dry_run: bool, instant: bool, background: bool, rate: int | None, yes: bool,
    wait: float,
) -> None:  # fmt: skip
    """Undo the last revert of DOMAIN: a revert to the point that was taken just before it."""
    from appliance.service import recovery

    if background and not instant:
        raise click.UsageError("--background needs --instant: a plain revert keeps the guest waiting to its end")
    with context.session() as session:
        if dry_run or not yes:
            with _untouched():
                planned = recovery.plan_undo(session, domain, instant=instant, rate=rate or 0)
                _show_plan(context, planned, always=dry_run)
                if dry_run:
                    return
                _confirm(f"undo of the last revert of {domain}", planned, yes)
        with context.output.meter(f"undo of {domain}") as meter:
            result = recovery.undo(
                session,
                domain,
                instant=instant,
                background=background,
                rate=rate or 0,
                wait=wait,
                progress=meter.update,
            )
    _show_result(context, result)


@verb("resume", *_MANY, NothingToResume)
@domain_argument(required=False)
@click.option("--roll-back", is_flag=True, help="Give the revert up: back to the point taken before it.")
@wait_option()
def resume_command(context: Context, domain: str | None, roll_back: bool, wait: float) -> None:
    """End a revert that was interrupted: of DOMAIN, or every one there is."""
    from appliance.service import recovery

    with context.session() as session, context.output.meter("resume") as meter:
        results = recovery.resume(session, domain, roll_back=roll_back, wait=wait, progress=meter.update)
    for result in results:
        _show_result(context, result)


@contextmanager
def _untouched() -> Iterator[None]:
    """Who interrupts the planning or the question is told that nothing has begun."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as stop:
        stop.add_note("nothing has changed")
        raise


def _confirm(action: str, planned: Plan, yes: bool) -> None:
    """Raises NotConfirmed."""
    if yes:
        return
    size = format_size(planned.changed_bytes)
    known = f"{size} and what was written since the newest point are rewritten"
    then = "" if planned.mode == "offline" else ", and the guest is reset"
    question = (
        f"{action}: {known if planned.compared else f'what differs (at most {size} is moved) is rewritten'} as"
        f" of point {planned.point} of {clock(planned.time)}{then}. Go on?"
    )
    confirm(question, action)


def _show_plan(context: Context, planned: Plan, always: bool, warnings: Sequence[str] = ()) -> None:
    disks = tuple(records.DiskBytes(*one) for one in planned.disks)
    record = records.RevertPlan(
        planned.domain, planned.uuid, planned.point, planned.time, planned.mode, disks, planned.changed_bytes,
        planned.extents, planned.expected_seconds, planned.files,
        (*planned.notes, *warnings), planned.compared,
    )  # fmt: skip
    expected = f", about {format_duration(planned.expected_seconds)}" if planned.expected_seconds is not None else ""
    lines = [f"{planned.domain} to {planned.point} of {clock(planned.time)}, {planned.mode}{expected}"]
    size = f"{format_size(planned.changed_bytes)} in {counted(planned.extents, 'extent')}"
    if planned.compared:
        lines.append(f"  {size} differ from the newest point ({of_disks(disks)}), and what was written since")
    else:
        lines.append(f"  at most {size} are moved ({of_disks(disks)}): the revert finds out what differs")
    lines += [f"  {file}" for file in planned.files]
    lines += [f"  {note}" for note in planned.notes]
    if always or not context.output.json:
        context.output.emit(record, "\n".join(lines))


def _show_result(context: Context, result: Result, warnings: Sequence[str] = ()) -> None:
    """`warnings` were told to a person before."""
    told = replace(result, notes=(*result.notes, *warnings))
    record = records.Reverted(**{name: getattr(told, name) for name in _FIELDS})
    lines = [_STATES[result.state].format(domain=result.domain, point=result.point)]
    less = result.state == "done" and result.moved_bytes < result.changed_bytes
    why = " (zeroes and what the guest overwrote move nothing)" if less else ""
    lines[0] += (
        f" ({result.mode}): {format_size(result.changed_bytes)} differed, {format_size(result.moved_bytes)} moved"
        f"{why}, guest paused {format_duration(result.pause_seconds)}, {format_duration(result.seconds)} in all"
    )
    lines += [f"  {note}" for note in result.notes]
    if result.safety_point and result.state != "rolled-back":
        lines.append(f"the present was kept as {result.safety_point}; `rewind undo {quote(result.domain)}` leads back")
    context.output.emit(record, "\n".join(lines))


_STATES = {
    "done": "{domain} is at {point}",
    "pending": "{domain} is on {point}, blocks that it has not touched follow",
    "rolled-back": "{domain} is back at its safety point",
    "given-up": "the revert of {domain} had not begun and was given up",
}
_FIELDS: Any = (
    "domain", "uuid", "verb", "point", "safety_point", "timeline", "mode", "state", "changed_bytes", "moved_bytes",
    "pause_seconds", "seconds", "notes",
)  # fmt: skip
