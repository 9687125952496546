"""revert, undo, resume: the same domain taken to another instant of its history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shlex import quote
from typing import TYPE_CHECKING

from appliance.capture import protection
from appliance.errors import HypervisorError, NothingToResume, NothingToUndo
from appliance.restore import intent
from appliance.service.elsewhere import choose
from appliance.service.instant import resolve
from appliance.service.naming import uuid_of
from appliance.service.session import Progress, Session, silent
from appliance.service.underway import Pending, cared_for, refuse_if_under_way, under_way

if TYPE_CHECKING:
    from appliance.model import Point
    from appliance.restore.revert import Plan, Result, Reverter

__all__ = ["plan", "plan_undo", "resume", "revert", "undo"]


def plan(
    session: Session,
    name: str,
    when: str,
    disks: Sequence[str] = (),
    *,
    instant: bool = False,
    rate: int = 0,
    passing: bool = True,
) -> Plan:
    """What a revert would do; nothing is changed. Where only continuous capture has the instant no point is made of it,
    unless `passing` is False: then the revert that is to follow finds it. Raises what finding point and disks raises,
    and RevertUnderWay."""
    point = _target(session, name, when, disks, passing=passing)
    return _reverter(session, uuid=point.domain_uuid).plan(point, disks, instant=instant, rate=rate)


def plan_undo(session: Session, name: str, *, instant: bool = False, rate: int = 0) -> Plan:
    """What `undo` would do; nothing is changed. Raises NothingToUndo, and as `plan`."""
    uuid, domain = _undoable(session, name)
    refuse_if_under_way(session, uuid, domain)
    return _reverter(session, uuid).plan_undo(instant=instant, rate=rate)


def revert(
    session: Session,
    name: str,
    when: str,
    disks: Sequence[str] = (),
    *,
    instant: bool = False,
    background: bool = False,
    rate: int = 0,
    wait: float = 0.0,
    progress: Progress = silent,
) -> Result:
    """Take the domain to the point. Raises before anything is changed, or leaves what `resume` ends."""
    point = _target(session, name, when, disks)
    uuid = point.domain_uuid
    with _told(session, uuid), session.hold(uuid, point.domain, f"revert {point.domain}", wait):
        reverter = _reverter(session, uuid, progress)
        with session.claim(reverter.domain, f"revert {point.domain}", wait):
            return reverter.revert(point, disks, instant=instant, background=background, rate=rate)


def undo(
    session: Session,
    name: str,
    *,
    instant: bool = False,
    background: bool = False,
    rate: int = 0,
    wait: float = 0.0,
    progress: Progress = silent,
) -> Result:
    """Revert to the safety point of the last revert. Raises NothingToUndo, and what `revert` raises."""
    uuid, domain = _undoable(session, name)
    with _told(session, uuid), session.hold(uuid, domain, f"undo {domain}", wait):
        refuse_if_under_way(session, uuid, domain, held=True)
        reverter = _reverter(session, uuid, progress)
        with session.claim(reverter.domain, f"undo {domain}", wait):
            return reverter.undo(instant=instant, background=background, rate=rate)


def _undoable(session: Session, name: str) -> tuple[str, str]:
    uuid, domain = uuid_of(session, name)
    if intent.load(session.home, uuid) is None:
        # Said without asking the hypervisor, which may be down.
        raise NothingToUndo(domain=domain)
    return uuid, domain


def resume(
    session: Session,
    name: str | None = None,
    *,
    roll_back: bool = False,
    wait: float = 0.0,
    progress: Progress = silent,
) -> list[Result]:
    """End the revert of that domain, or every one. Raises NothingToResume when there is none."""
    session.instance  # noqa: B018  raises when this is no home
    pending = under_way(session)
    waiting = [one for one in pending if name in (None, one.domain, one.uuid)]
    if pending and not waiting and name is not None:
        waiting = [one for one in pending if one.uuid == _uuid_now(session, name)]
    if not waiting:
        if name is None:
            raise NothingToResume(domain="any domain")
        uuid, domain = uuid_of(session, name)
        raise NothingToResume(domain=domain, hint=_how_it_ended(session, uuid))
    return [_resume(session, one, roll_back, wait, progress) for one in waiting]


def _how_it_ended(session: Session, uuid: str) -> str:
    """What somebody wants to know whose revert was interrupted and ended without them."""
    last = intent.load(session.home, uuid)
    if last is None:
        return "one that was interrupted before it changed anything is given up by itself"
    reached = last.safety_point if last.rolling_back else last.point
    return f"the last one has ended, at point {reached}; one that had not changed anything is given up by itself"


def _uuid_now(session: Session, name: str) -> str | None:
    """Of a domain that was given this name since its revert began: libvirt's hook tells people the new one."""
    try:
        return session.hypervisor().domain(name).uuid
    except HypervisorError:
        return None


def _resume(session: Session, one: Pending, roll_back: bool, wait: float, progress: Progress) -> Result:
    # As it was found: whoever drives it may come to its end while we wait.
    meant = intent.load(session.home, one.uuid)
    with _told(session, one.uuid), session.hold(one.uuid, one.domain, f"resume {one.domain}", wait):
        return _reverter(session, one.uuid, progress).resume(roll_back=roll_back, wait=wait, meant=meant)


@contextmanager
def _told(session: Session, uuid: str) -> Iterator[None]:
    """Who interrupts a revert is told by a note on the exception what becomes of it."""
    before = intent.load(session.home, uuid)
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(_fate(session, uuid, before))
        raise


def _fate(session: Session, uuid: str, before: intent.Intent | None) -> str:
    now = intent.load(session.home, uuid)
    if now is None or (before is not None and before.ended and now.ended and now.id == before.id):
        return "the revert is given up, and nothing has changed"
    if now.ended:
        return f"the revert of {now.domain} has ended all the same: `rewind undo {quote(now.domain)}` leads back"
    if cared_for(session, uuid):
        return f"the revert of {now.domain} goes on by itself, `rewind status {quote(now.domain)}` shows it"
    return f"the revert of {now.domain} is half-way, and `rewind resume {quote(now.domain)}` ends it"


def _target(session: Session, name: str, when: str, disks: Sequence[str], passing: bool = False) -> Point:
    """The point, with the disks that were named. Raises before the hypervisor is asked."""
    uuid, domain = uuid_of(session, name)
    protection.require(session.home, uuid, domain)
    refuse_if_under_way(session, uuid, domain)
    point = resolve(session, uuid, when, passing=passing)
    choose(point, disks)
    return point


def _reverter(session: Session, uuid: str, progress: Progress = silent) -> Reverter:
    from appliance.restore.revert import Reverter

    domain = session.domain(uuid)
    return Reverter(
        session.home, session.settings, session.spec, session.repository, domain, session.settings_file, progress
    )
