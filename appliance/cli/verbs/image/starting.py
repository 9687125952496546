"""image start: a new domain on other hardware runs from a point at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import domain_argument, rate_option
from appliance.cli.running import emit_running
from appliance.cli.secrets import luks_keys, luks_option
from appliance.cli.settling import after_options, chosen, sizes_of
from appliance.cli.verbs.image.options import GUEST, target_option, template_option, when_option
from appliance.errors import (
    AlreadyExists,
    ConnectError,
    DriversMissing,
    ImageError,
    Locked,
    NoSpace,
    NoSuchTarget,
    NoSuchTemplate,
    NotForWindows,
    NotSigned,
    NotSupported,
    RestoreError,
    TargetExists,
)
from appliance.units import format_duration

__all__ = ["start_command"]


@verb("start", *GUEST, ConnectError, NoSuchTarget, NoSuchTemplate, DriversMissing, NotForWindows, NotSigned,
      AlreadyExists, TargetExists, NotSupported, ImageError, RestoreError, Locked, NoSpace)  # fmt: skip
@domain_argument()
@when_option
@target_option
@template_option
@click.option("--name", required=True, metavar="NEW", help="What the new domain is called.")
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for its disks and its boot medium.")  # fmt: skip
@click.option("--new-macs", is_flag=True, help="Give its network cards new addresses instead of the target's own.")
@click.option("--background", is_flag=True, help="Return as soon as it runs; its disks are filled all the same.")
@rate_option("Fill its disks with at most this much a second (50M).")
@click.option("--size", "sizes", multiple=True, metavar="DISK=BYTES", callback=sizes_of,
              help="Make the guest's DISK (vda) this large (20G): smaller as far as its partitions allow.")  # fmt: skip
@luks_option
@after_options
def start_command(
    context: Context, domain: str, when: str, target: str, template: str, name: str, folder: Path, new_macs: bool,
    background: bool, rate: int | None, sizes: dict[str, int], luks_key: tuple[str, ...], after: Any,
) -> None:  # fmt: skip
    """Start DOMAIN as of WHEN as a new domain on a target's hardware, at once.

    What it reads comes from the repository until its own disks are filled, which goes on beside it. DOMAIN itself is
    not touched and need not exist any more. It starts from the medium in DIR.

    A Windows starts from its own new disk, where those of its drivers that the target needs start at boot. This is an
    experiment and never promised: `image plan` tells what of it would be refused.
    """
    from appliance.service.image import starting

    with context.session() as session:
        made = starting.start(
            session, domain, when, target, name, folder, template=template, keys=luks_keys(luks_key), rate=rate or 0,
            new_macs=new_macs, after=chosen(after), sizes=sizes,
            warned=lambda them: context.output.tell("\n".join(f"warning: {one}" for one in them)),
        )  # fmt: skip
        record = records.ImageStarted(
            made.name, made.uuid, made.point, made.target, made.disks, made.image, made.seconds, made.warnings
        )
        took = format_duration(made.seconds)
        context.output.emit(record, f"{name} runs after {took}; `rewind image list` tells how far its disks are")
        if not background:
            with context.output.meter(f"disks of {name}") as meter:
                emit_running(context, starting.follow(session, name, meter.update))
