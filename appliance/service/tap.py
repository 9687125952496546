"""Continuous capture seen from the verbs: start its process, end it, make it step aside for a while.

    HOME/run/UUID/pause.json   {"until": seconds since 1970 or null}: nobody of ours works in the domain's block graph

The process itself is `service.tapper`; what it does at this moment is in `capture.tap.current`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.capture import tap
from appliance.config import Home, write_json
from appliance.errors import CaptureError, DomainBusy, DomainNotFound
from appliance.hypervisor.base import DomainState
from appliance.process import Child, signal_process, wait_gone
from appliance.service.underway import refuse_if_under_way

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.service.session import Session

__all__ = ["Pause", "ensure", "missing", "pause", "paused_until", "stop", "unpause"]

_START = 20.0
# To take the tap out it needs the domain's lock, which a point may hold for as long as it is pushed.
_STEP_ASIDE = 60.0
_FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Pause:
    """`until` is seconds since 1970, None without an end. `continuous`: whether anything was recorded before."""

    domain: str
    uuid: str
    until: float | None
    continuous: bool


def missing(home: Home, record: Protection) -> bool:
    """Whether the domain should have a tap process and has none."""
    return record.continuous and tap.current(home, record.uuid) is None


def ensure(session: Session, record: Protection) -> None:
    """Return when the domain's tap process lives; start one where there is none. It attaches by itself.

    Raises CaptureError with its last words when it does not start.
    """
    home = session.home
    if tap.current(home, record.uuid) is not None:
        return
    home.run(record.uuid).mkdir(parents=True, exist_ok=True)
    key_fd = session.spec.key_fd
    if key_fd is not None:
        os.lseek(key_fd, 0, os.SEEK_SET)  # whoever had it before has read it to its end
    places = [str(Path(__file__).resolve().parents[2]), *(place for place in sys.path if place)]
    child = Child(
        [sys.executable, "-m", "appliance.service.tapper", home.path, record.uuid, session.settings_file,
         *([] if key_fd is None else [str(key_fd)])],
        name="tap",
        log=home.log / f"tap-{record.uuid}.log",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))},
        pass_fds=() if key_fd is None else (key_fd,),
        die_with_parent=False,
    )  # fmt: skip
    try:
        _await_start(home, record, child)
    finally:
        child.leave()


def _await_start(home: Home, record: Protection, child: Child) -> None:
    deadline = time.monotonic() + _START
    while tap.current(home, record.uuid) is None:
        if not child.alive() or time.monotonic() > deadline:
            raise CaptureError(reason=f"the tap of {record.domain!r} does not start: {child.tail()}")
        time.sleep(0.02)


def stop(session: Session, record: Protection) -> None:
    """End the domain's tap process for good; the devices are on their own nodes afterwards. The caller does not hold
    the domain: the process needs it. Raises what talking to the hypervisor raises."""
    home = session.home
    running = tap.current(home, record.uuid)
    if running is not None:
        signal_process(running.process, signal.SIGTERM)
        if not wait_gone(running.process, _STEP_ASIDE):
            signal_process(running.process, signal.SIGKILL)
            wait_gone(running.process, 5)
    tap.ledger_of(home, record.uuid).stopped(datetime.now(UTC))
    clean(session, record, elsewhere=True)
    home.run(record.uuid).joinpath("pause.json").unlink(missing_ok=True)


def clean(session: Session, record: Protection, elsewhere: bool = False) -> None:
    """Take away what a tap process that has died left in the domain's block graph. Another home's tap that lives is
    left alone: DomainBusy, unless what is `elsewhere` is none of our business."""
    from appliance.hypervisor.graph import tap as graph

    try:
        domain = session.hypervisor(record.uri).domain(record.uuid)
        if domain.state() is DomainState.SHUTOFF:
            return
    except DomainNotFound:
        return
    home, purpose = session.home, f"end the tap of {record.domain}"
    with session.hold(record.uuid, record.domain, purpose, _STEP_ASIDE):
        refuse_if_under_way(session, record.uuid, record.domain, held=True)
        with session.claim(domain, purpose, _STEP_ASIDE):
            if not (other := tap.elsewhere(home, domain)):
                graph.clean(domain.monitor())
            elif not elsewhere:
                reason, hint = f"another home captures it continuously, at {other}", "let that home step aside"
                raise DomainBusy(domain=record.domain, reason=reason, hint=hint)


# --- stepping aside -------------------------------------------------------------------------------------------------


def _pause_file(home: Home, uuid: str) -> Path:
    return home.run(uuid) / "pause.json"


def paused_until(home: Home, uuid: str) -> float | None:
    """Until when nobody of ours may work on the domain, infinite for a pause without an end; None: there is none."""
    try:
        until = json.loads(_pause_file(home, uuid).read_text())["until"]
        moment = _FOREVER if until is None else float(until)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return moment if moment > time.time() else None


def pause(session: Session, name: str, seconds: float | None = None, wait: float = 0.0) -> Pause:
    """Step aside: the tap is taken out, the daemon takes no points, until `seconds` are over or `unpause`. When it
    returns nothing of ours is in the domain's block graph, and its admin may commit, copy or resize its disks.

    Raises NotProtected, RevertUnderWay, Locked, CaptureError when the tap does not step aside in time.
    """
    record = session.protected(name)
    home = session.home
    refuse_if_under_way(session, record.uuid, record.domain)
    until = None if seconds is None else time.time() + seconds
    home.run(record.uuid).mkdir(parents=True, exist_ok=True)
    write_json(_pause_file(home, record.uuid), {"until": until})
    try:
        _step_aside(session, record, wait)
    except BaseException:  # also Ctrl-C: what was not paused must not be noted as paused
        _pause_file(home, record.uuid).unlink(missing_ok=True)
        raise
    return Pause(record.domain, record.uuid, until, record.continuous)


def _step_aside(session: Session, record: Protection, wait: float) -> None:
    home = session.home
    running = tap.current(home, record.uuid)
    if running is not None:
        signal_process(running.process, signal.SIGUSR1)
        limit = time.monotonic() + max(wait, _STEP_ASIDE)
        while (now := tap.current(home, record.uuid)) is not None and now.state != "paused":
            if time.monotonic() > limit:
                reason = f"the tap of {record.domain!r} does not step aside"
                raise CaptureError(reason=reason, hint=f"see {home.log}/tap-{record.uuid}.log")
            time.sleep(0.05)
    # Also waits for a point that is being taken, and for a tap that was just about to begin; and the process may have
    # died instead.
    clean(session, record)


def unpause(session: Session, name: str) -> Pause:
    """End a pause before its time. Raises NotProtected; nothing happens when there was none."""
    record = session.protected(name)
    _pause_file(session.home, record.uuid).unlink(missing_ok=True)
    running = tap.current(session.home, record.uuid)
    if running is not None:
        signal_process(running.process, signal.SIGUSR1)
    return Pause(record.domain, record.uuid, time.time(), record.continuous)
