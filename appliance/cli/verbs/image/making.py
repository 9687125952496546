"""image plan, image build: a bootable image of a point, looked at or made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import domain_argument
from appliance.cli.secrets import luks_keys, luks_option
from appliance.cli.settling import after_options, chosen
from appliance.cli.text import clock, counted
from appliance.cli.verbs.image.options import GUEST, media_option, target_option, template_option, when_option
from appliance.errors import (
    DriversMissing,
    ImageError,
    NoSpace,
    NoSuchTarget,
    NoSuchTemplate,
    NotForWindows,
    NotSigned,
    TargetExists,
)
from appliance.units import format_size

if TYPE_CHECKING:
    from appliance.service.image.making import Planned
    from appliance.service.image.windows import PlannedWindows

__all__ = ["build_command", "plan_command"]


@verb("plan", *GUEST, NoSuchTarget, NoSuchTemplate, DriversMissing, NotForWindows)
@domain_argument()
@when_option
@target_option
@template_option
@luks_option
@click.option("--all", "all_of", is_flag=True, help="Also list each default driver that is left out.")
@after_options
def plan_command(
    context: Context, domain: str, when: str, target: str, template: str, luks_key: tuple[str, ...], all_of: bool,
    after: Any,
) -> None:  # fmt: skip
    """Tell which drivers an image of DOMAIN for a target would have, and why. Nothing is written.

    With --settle and its like also what the guest lacks for that.

    Where a driver is missing that has to be there the plan ends as `build` would: refused, with the list.

    Of a Windows it tells which of its own drivers would start at boot, for `image start`: an experiment.
    """
    from appliance.service.image import making, windows
    from images.drivers.plan import refuse_if_missing
    from images.drivers.windows import refuse
    from images.guest.windows import IsWindows

    with context.session() as session:
        keys = luks_keys(luks_key)
        try:
            planned = making.plan(session, domain, when, target, template, keys, after=chosen(after))
        except IsWindows as found:
            other = windows.planned(session, domain, when, target, found, chosen(after))
            _emit_windows(context, other)
            refuse(other.plan)
            return
    _emit_plan(context, planned, all_of)
    refuse_if_missing(planned.plan)


def _emit_windows(context: Context, planned: PlannedWindows) -> None:
    plan, it = planned.plan, planned.plan.windows
    rows = [(row.driver or "-", row.answer.value, row.reason) for row in plan.rows]
    wide = max((len(row[0]) for row in rows), default=0)
    system = " ".join(word for word in (it.name, it.version, it.build and f"build {it.build}", it.arch) if word)
    lines = [f"{it.host or planned.domain} at {clock(planned.time)}: {system}, for {plan.inventory.name}"]
    lines += [f"  {name:{wide}}  {answer:8}  {reason}" for name, answer, reason in rows]
    lines += [f"refused: {one}" for one in plan.reasons]
    lines += [f"warning: {one}" for one in plan.warnings]
    drivers = tuple(
        {"driver": row.driver, "verdict": row.answer.value, "device": row.device, "reason": row.reason}
        for row in plan.rows
    )
    record = records.ImageWindowsPlan(
        planned.domain, planned.point, planned.time, plan.inventory.name, it.host, it.name, it.version, it.build,
        it.arch, plan.firmware.value, it.volume, it.control_set, not plan.reasons, True, drivers, plan.reasons,
        plan.warnings,
    )  # fmt: skip
    context.output.emit(record, "\n".join(lines))


def _emit_plan(context: Context, planned: Planned, all_of: bool) -> None:
    from images.drivers import report

    document = report.document(planned.plan)
    rows = list(report.rows(planned.plan, all_of=all_of))
    wide = max((len(row[0]) for row in rows), default=0)
    client = planned.plan.client
    lines = [
        f"{client.host} at {clock(planned.time)}: {client.os_name}, kernel {client.release}, for {document['target']}"
    ]
    lines += [f"  {name:{wide}}  {verdict:8}  {role:10}  {reason}" for name, verdict, role, reason in rows]
    lines += report.summary(planned.plan)
    lines += [f"warning: {one}" for one in planned.plan.warnings]
    record = records.ImagePlan(
        planned.domain, planned.point, planned.time, planned.template, planned.reader, client.host, client.release,
        document["target"], document["mode"], document["buildable"], document["command_line"], document["rename"],
        document["counts"], tuple(document["load"]), tuple(document["decisions"]), tuple(document["warnings"]),
    )  # fmt: skip
    context.output.emit(record, "\n".join(lines))


@verb("build", *GUEST, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, TargetExists, ImageError, NoSpace)
@domain_argument()
@when_option
@target_option
@template_option
@media_option
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for the image.")  # fmt: skip
@luks_option
@after_options
def build_command(
    context: Context, domain: str, when: str, target: str, template: str, media: str, folder: Path,
    luks_key: tuple[str, ...], after: Any,
) -> None:  # fmt: skip
    """Make a bootable image of DOMAIN as of WHEN for a target.

    It has the guest's own kernel and exactly the drivers that this hardware needs. It starts the guest from its disks,
    restored or served, wherever they are attached. A driver that nobody has is told before anything is written.
    """
    from appliance.service.image import making

    wanted = [one.strip() for one in media.split(",") if one.strip()]
    with context.session() as session:
        keys = luks_keys(luks_key)
        made = making.build(session, domain, when, target, wanted, folder, template, keys, after=chosen(after))
    built = made.built
    files = tuple(
        records.ImageFile(name, path, built.sizes[name], built.digests[name]) for name, path in built.files.items()
    )
    record = records.ImageBuilt(
        made.planned.domain, made.planned.point, made.planned.time, target, built.template, built.folder, files,
        built.modules, dict(built.seconds), made.planned.plan.warnings,
    )  # fmt: skip
    lines = [f"{one.name:8} {format_size(one.size_bytes):>9}  {one.path}" for one in files]
    lines += [f"warning: {one}" for one in made.planned.plan.warnings]
    lines.append(f"{counted(len(built.modules), 'driver')} of kernel {made.planned.plan.client.release}")
    context.output.emit(record, "\n".join(lines))
