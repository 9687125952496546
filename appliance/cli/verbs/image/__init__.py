"""image: bootable images of a point for other hardware, and what they are made of.

    targets, templates, drivers, readers     kept beforehand
    making                                   plan, build: a point, a target and a template become an image
    starting, streaming ─► running           a domain, or any machine, runs from a point; how far its disks are
    settled                                  what the guest did to itself then
    verification                             a point is booted as a test, and what that showed
"""

from __future__ import annotations

import click

from appliance.cli.verbs.image.drivers import drivers_command
from appliance.cli.verbs.image.making import build_command, plan_command
from appliance.cli.verbs.image.readers import reader_command
from appliance.cli.verbs.image.running import forget_command, list_command, resume_command
from appliance.cli.verbs.image.settled import settle_command
from appliance.cli.verbs.image.starting import start_command
from appliance.cli.verbs.image.streaming import serve_command
from appliance.cli.verbs.image.targets import target_command
from appliance.cli.verbs.image.templates import template_command
from appliance.cli.verbs.image.verification import evidence_command, verify_command

__all__ = ["image_command"]


@click.group("image", no_args_is_help=False, short_help="Bootable images of a point, for other hardware.")
def image_command() -> None:
    """Bootable images of a point, for other hardware: one boot, of the guest's own kernel.

    Once: `image template build`, and for guests on xfs, btrfs, LUKS or md `image reader build`. For each kind of
    hardware: `image target add`. Then `image plan` tells which drivers an image would have and why, and `image build`
    makes it. The guest and its disks are not touched by any of these.
    """


for _one in (
    target_command, template_command, drivers_command, plan_command, build_command, start_command, serve_command,
    list_command, resume_command, settle_command, forget_command, verify_command, evidence_command, reader_command,
):  # fmt: skip
    image_command.add_command(_one)
