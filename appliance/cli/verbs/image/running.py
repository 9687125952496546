"""image list, image resume, image forget: the domains and machines that were brought up."""

from __future__ import annotations

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.running import emit_running, emit_streamed
from appliance.errors import ConfigError, ConnectError, Locked, RestoreError

__all__ = ["forget_command", "list_command", "resume_command"]


@verb("list")
def list_command(context: Context) -> None:
    """List the domains and machines that were brought up, and how far their disks are."""
    from appliance.service.image import starting, streaming

    with context.session() as session:
        session.instance  # noqa: B018  a folder that is no home has brought up nothing either, and must not look the same
        found, served = starting.listing(session), streaming.listing(session)
    for one in found:
        emit_running(context, one)
    for machine in served:
        emit_streamed(context, machine)
    if not found and not served:
        context.output.note("nothing was brought up from here; `rewind image start` and `serve` do it")


@verb("resume", ConfigError, RestoreError, Locked)
@click.argument("name")
def resume_command(context: Context, name: str) -> None:
    """Go on filling the disks of a domain or machine that was brought up, after this host was restarted."""
    from appliance.service.image import starting, streaming

    with context.session() as session, context.output.meter(f"disks of {name}") as meter:
        if streaming.known(session, name):
            streaming.resume(session, name)
            emit_streamed(context, streaming.follow(session, name, meter.update))
        else:
            starting.resume(session, name)
            emit_running(context, starting.follow(session, name, meter.update))


@verb("forget", ConnectError, Locked)
@click.argument("name")
@click.option("--force", is_flag=True, help="Also a machine that still needs it: what it has written is lost.")
def forget_command(context: Context, name: str, force: bool) -> None:
    """Forget a domain or machine that was brought up and needs the repository no more, or is gone."""
    from appliance.service.image import starting, streaming

    with context.session() as session:
        served = streaming.known(session, name)
        if served:
            streaming.forget(session, name, force)
        else:
            starting.forget(session, name)
    context.output.emit(records.ImageRemoved("served" if served else "started", name), f"{name} is forgotten")
