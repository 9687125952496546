"""image verify, image evidence: a point is booted as a test, and what that showed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import complete_when, domain_argument, duration_option
from appliance.cli.text import clock, counted
from appliance.cli.verbs.image.options import GUEST, POINT, template_option, when_option
from appliance.errors import (
    DriversMissing,
    ImageError,
    NoSpace,
    NoSuchTarget,
    NoSuchTemplate,
    NotBooted,
    NotSigned,
    NotSupported,
    ObjectNotFound,
    TargetExists,
    ToolFailed,
)
from appliance.units import format_duration, format_size, parse_size

if TYPE_CHECKING:
    from appliance.service.image.evidence import Mark
    from appliance.service.image.verifying import Verified

__all__ = ["evidence_command", "verify_command"]

_SHOWN = 10
_WRITTEN = {
    "console.log": "what its serial line said", "screen.png": "its screen at the end",
    "report.txt": "what the system that came up told of itself",
    "evidence.json": "the verdict, and all else that is known of the test",
}  # fmt: skip


def _size(ctx: click.Context, param: click.Parameter, value: Any) -> int:
    try:
        size = parse_size(str(value))
    except ValueError:
        size = 0
    if not 128 << 20 <= size <= 1 << 40:
        raise click.BadParameter(f"{value!r} is not the memory of a machine; 1G is", ctx, param)
    return size


@verb("verify", *GUEST, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, NotSupported,
      ImageError, NotBooted, ToolFailed, NoSpace)  # fmt: skip
@domain_argument()
@when_option
@click.option("--target", default="", metavar="NAME", help="The hardware (default: what the domain had).")
@template_option
@duration_option("--timeout", text="How long the boot may take (default 10m).")
@click.option("--memory", default="1G", show_default=True, metavar="BYTES", callback=_size,
              help="What the machine gets; the host must have it free.")  # fmt: skip
def verify_command(
    context: Context, domain: str, when: str, target: str, template: str, timeout: float | None, memory: int
) -> None:
    """Prove that DOMAIN as of WHEN boots, by booting it where it can harm nobody.

    A machine of its own reads the point and writes to layers that are thrown away; nothing gets out of it by the
    network. DOMAIN is not touched. Console, screen and what the system says of itself are kept beside the point, which
    is `booted` in lists from then on.
    """
    from appliance.service.image import verifying

    with context.session() as session, context.output.meter(f"test of {domain}") as meter:
        found = verifying.verify(
            session, domain, when, target, timeout=timeout or verifying.TIMEOUT, memory=memory, template=template,
            progress=meter.update,
        )  # fmt: skip
    context.output.emit(_record(found), "\n".join(_lines(found)))
    if not found.verdict.booted:
        raise NotBooted(domain=found.domain, point=found.point, reason="; ".join(found.verdict.reasons))


def _record(found: Verified) -> records.ImageVerified:
    verdict = found.verdict
    return records.ImageVerified(
        found.domain, found.point, found.time, found.target, verdict.booted, verdict.reasons, verdict.kernels,
        verdict.failed, verdict.differences, found.manifest, found.machine, found.accelerator, found.seconds,
        found.ended, found.command_line, found.mark.name, found.warnings,
    )  # fmt: skip


def _lines(found: Verified) -> list[str]:
    verdict, system = found.verdict, found.manifest
    lines = [f"warning: {one}" for one in found.warnings]
    took = format_duration(found.seconds)
    lines.append(f"{found.point} of {clock(found.time)} on {found.target}: {found.ended} after {took}")
    if not verdict.booted:
        return [*lines, *(f"  | {line}" for line in found.last_words)]
    if system.get("complete"):
        name = system.get("system_name") or "the system"
        lines.append(f"  {name}, kernel {', '.join(verdict.kernels)}, {system.get('packages', '?')} packages,"
                     f" {counted(len(system.get('listening', ())), 'open port')}")  # fmt: skip
    lines += _shown("failed unit ", verdict.failed) + _shown("", verdict.differences)
    return [*lines, f"{found.domain} boots from {found.point}"]


def _shown(kind: str, found: Sequence[str]) -> list[str]:
    """The first of them, a line each."""
    more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return [*(f"  {kind}{one}" for one in found[:_SHOWN]), *more]


@verb("evidence", *POINT, ObjectNotFound, TargetExists)
@domain_argument()
@click.option("--at", "when", metavar="WHEN", shell_complete=complete_when, help="Only of this point.")
@click.option("--into", "folder", type=click.Path(path_type=Path), metavar="DIR",
              help="Put console, screen, report and verdict into this new folder, for this user alone.")  # fmt: skip
def evidence_command(context: Context, domain: str, when: str | None, folder: Path | None) -> None:
    """Show which points of DOMAIN were booted as a test, and what it showed."""
    from appliance.service.history import history
    from appliance.service.image import evidence
    from appliance.service.instant import resolve

    if folder is not None and when is None:
        raise click.UsageError("--into takes the evidence of one point: name it with --at")
    with context.session() as session:
        if when is None:
            points = {one.id for one in history(session, domain, measure=False).points}
            marks = sorted(
                (one for one in evidence.known(session).values() if one.point in points), key=lambda one: one.time
            )
        else:
            marks = [evidence.of(session, resolve(session, domain, when, taken=True).id)]
        for mark in marks:
            document = evidence.load(session, mark)
            files = tuple(evidence.fetch(session, mark, folder)) if folder is not None else ()
            _emit(context, mark, document, files)
    if not marks:
        context.output.note(f"no point of {domain} was booted as a test; `rewind image verify` does it")


def _emit(context: Context, mark: Mark, document: dict[str, Any], files: tuple[Path, ...]) -> None:
    record = records.ImageEvidence(mark.point, mark.time, mark.booted, mark.name, document, files)
    said = "booted" if mark.booted else "did not boot: " + "; ".join(map(str, document.get("reasons", ())))
    lines = [f"{mark.point}  {clock(mark.time)}  {document.get('target', '')}  {said}"]
    lines += _shown("failed unit ", document.get("failed", ())) + _shown("", document.get("differences", ()))
    lines += [f"  {format_size(path.stat().st_size):>9}  {path}: {_WRITTEN.get(path.name, '')}" for path in files]
    lines += ["  written for this user alone: they may show what the guest keeps from others"] if files else []
    context.output.emit(record, "\n".join(lines))
