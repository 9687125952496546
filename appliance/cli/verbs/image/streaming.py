"""image serve: a machine that is no domain of ours boots from a point, and fills its own disks from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import domain_argument, duration_option
from appliance.cli.running import emit_streamed
from appliance.cli.secrets import luks_keys, luks_option
from appliance.cli.verbs.image.options import GUEST, media_option, target_option, template_option, when_option
from appliance.errors import (
    AlreadyExists,
    ConfigError,
    DriversMissing,
    ImageError,
    Locked,
    NoSpace,
    NoSuchTarget,
    NoSuchTemplate,
    NotSigned,
    NotSupported,
    RestoreError,
)
from appliance.units import format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.image.streaming import Served

__all__ = ["serve_command"]

_PATIENCE = 600


def _local(_ctx: click.Context, _param: click.Parameter, values: Any) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if wrong := [disk for disk, device in pairs.items() if not (disk and device)]:
        raise click.BadParameter(f"{wrong[0]!r} is not DISK=DEVICE, like vda=/dev/nvme0n1")
    return pairs


@verb("serve", *GUEST, ConfigError, NoSuchTarget, NoSuchTemplate, DriversMissing, NotSigned, NotSupported,
      AlreadyExists, ImageError, RestoreError, Locked, NoSpace)  # fmt: skip
@domain_argument()
@when_option
@target_option
@click.option("--listen", required=True, metavar="ADDRESS:PORT", help="Where this host answers the machine.")
@click.option("--into", "folder", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="A new folder for the image. It has the secret of the session.")  # fmt: skip
@click.option("--stream/--copy-first", "stream", default=True, show_default=True,
              help="Start at once and fill the local disks meanwhile, or fill them first.")  # fmt: skip
@click.option("--name", metavar="NAME", help="What the session is called (default: as the target).")
@media_option
@template_option
@click.option("--reach", default="", metavar="ADDRESS:PORT", help="How the machine gets here, if not as --listen.")
@click.option("--address", "own", default="dhcp", show_default=True, metavar="ADDRESS/PREFIX",
              help="The machine's address for this alone: one that nobody has, the guest neither.")  # fmt: skip
@click.option("--gateway", default="", metavar="ADDRESS", help="Its way here, when it is in another network.")
@click.option("--nic", "mac", default="", metavar="MAC", help="The card that it uses (default: the first with a link).")
@click.option("--local", multiple=True, metavar="DISK=DEVICE", callback=_local,
              help="Put DISK on this local disk: its node, or a part of its serial number.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Also local disks that are not empty: their content is lost.")
@click.option("--blank", is_flag=True, help="A promise that local disks read as zeros: less is written to them.")
@duration_option("--patience", text="How long its reads and writes wait while nobody answers (default 10m).")
@click.option("--insecure", is_flag=True, help="No encryption, and whoever connects may read and write.")
@click.option("--background", is_flag=True, help="Return as soon as it is served.")
@luks_option
def serve_command(
    context: Context, domain: str, when: str, target: str, folder: Path, name: str | None, media: str, template: str,
    stream: bool, background: bool, patience: float | None, luks_key: tuple[str, ...], **choices: Any,
) -> None:  # fmt: skip
    """Let a machine boot DOMAIN as of WHEN, whatever it is: nothing of it is known but its hardware.

    It starts from the image in DIR. Its root comes from here, encrypted, and what it writes is kept here, until its own
    disks are full; then it needs nobody. While this host does not answer it waits. It may lose its power and start
    again from the same image. The point is not changed.
    """
    from appliance.service.image import streaming

    wanted = [one.strip() for one in media.split(",") if one.strip()]
    chosen = streaming.Choices(mode="stream" if stream else "copy", patience=int(patience or _PATIENCE), **choices)
    with context.session() as session:
        made = streaming.serve(
            session, domain, when, target, name or target, folder, wanted, chosen, template=template,
            keys=luks_keys(luks_key),
        )  # fmt: skip
        _emit_served(context, made)
        if not background:
            with context.output.meter(f"disks of {made.name}") as meter:
                emit_streamed(context, streaming.follow(session, made.name, meter.update))


def _emit_served(context: Context, made: Served) -> None:
    built = made.built
    files = tuple(
        records.ImageFile(name, path, built.sizes[name], built.digests[name]) for name, path in built.files.items()
    )
    record = records.ImageServed(
        made.name, made.point, made.target, made.mode, made.address, made.secure, built.folder, files, made.seconds,
        made.warnings,
    )  # fmt: skip
    lines = [f"{one.name:8} {format_size(one.size_bytes):>9}  {one.path}" for one in files]
    lines += [f"warning: {one}" for one in made.warnings]
    took = format_duration(made.seconds)
    lines.append(f"{made.name} is served at {made.address} after {took}: start the machine from the image")
    context.output.emit(record, "\n".join(lines))
