"""What an image is made of, as options: a point, a target, a template, the media. The same for each verb."""

from __future__ import annotations

import click

from appliance.cli.params import complete_when
from appliance.errors import AmbiguousPoint, GuestUnreadable, InGap, NoSuchPoint, NotProtected, NotRecoverable, WrongKey

__all__ = ["GUEST", "POINT", "media_option", "target_option", "template_option", "when_option"]

# What may be wrong with the point, and with the guest that is read from it.
POINT = (NotProtected, NoSuchPoint, AmbiguousPoint, InGap, NotRecoverable, WrongKey)
GUEST = (*POINT, GuestUnreadable)

when_option = click.option(
    "--at", "when", required=True, metavar="WHEN", shell_complete=complete_when,
    help="A point, a label, a time, `10m ago`, `latest`, `#81726` (a write).",
)  # fmt: skip
target_option = click.option("--target", required=True, metavar="NAME", help="The hardware that it is for.")
template_option = click.option("--template", default="", metavar="ID", help="The template (default: the newest).")
media_option = click.option(
    "--media", default="iso", show_default=True, metavar="LIST",
    help="What to make, with commas between: uki, esp, iso, usb, pxe, disk.",
)  # fmt: skip
