"""daemon: points by the clock, in the foreground."""

from __future__ import annotations

from datetime import datetime

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.text import clock
from appliance.errors import ConfigError, Locked, WrongKey

__all__ = ["daemon_command"]


@verb("daemon", Locked, WrongKey, ConfigError)
@click.option("--once", is_flag=True, help="Take what is due now and return.")
def daemon_command(context: Context, once: bool) -> None:
    """Take the points of every domain that was protected with --every, until SIGTERM or Ctrl-C.

    Stays in the foreground. `rewind help systemd` prints a unit of systemd for it; in one of your own
    KillMode=process is needed, or what records every write and what guests read from would be killed with the
    daemon. A domain that fails is told and tried again, the others go on. A revert that was interrupted and that
    nobody drives any more is resumed, and so are domains and machines that were brought up and whose disks are not
    their own yet. SIGHUP reads settings and protection again at once; so does every round.
    """
    from appliance.daemon import Daemon, Event

    def tell(event: Event) -> None:
        record = records.DaemonEvent(event.kind, event.time, event.domain, event.detail)
        where = f" {event.domain}" if event.domain else ""
        context.output.emit(record, f"{_stamp(event.time)} {event.kind}{where}: {event.detail}")

    with context.session() as session:
        session.repository.id  # noqa: B018  opens it: a missing key or repository is said now, not every interval
        daemon = Daemon(session, tell)
        if once:
            daemon.round()
        else:
            daemon.run()


def _stamp(moment: datetime) -> str:
    return clock(moment)
