"""A domain that was lost and comes back under its own name and UUID: protection and history go on with it.

Only of a domain that this home protects: elsewhere it may live on, and two domains of one UUID would mix their points.

For its history that is a revert: the next point comes from the one that it was restored from. What a revert does inside
of a disk is not needed, since the disks are new; the next point finds out that the bitmaps are gone, and compares.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.capture import protection
from appliance.errors import DomainNotFound
from appliance.model import Timeline
from appliance.restore import intent

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.model import Point
    from appliance.service.session import Session

__all__ = ["define", "may"]

# A daemon may just be finding out that the domain is gone.
_PATIENCE = 30.0


def may(session: Session, point: Point) -> bool:
    """Whether it is protected here, the hypervisor does not know it any more, and no revert of it has begun and not
    ended, which would go on in the old disks. Raises ConnectError."""
    pending = intent.load(session.home, point.domain_uuid)
    if protection.load(session.home, point.domain_uuid) is None or (pending is not None and not pending.ended):
        return False
    try:
        session.hypervisor(point.uri or None).domain(point.domain_uuid)
    except DomainNotFound:
        return True
    return False


def define(session: Session, point: Point, xml: str) -> None:
    """Define it again, as of the point. Raises Locked, NotProtected, NotSupported; nothing has changed then but a
    timeline without points, which is never shown."""
    name, uuid = point.domain, point.domain_uuid
    with session.hold(uuid, name, f"restore {name}", _PATIENCE):
        record = _going_on(session, point)
        made = session.hypervisor(point.uri or None).define(xml)
        protection.save(session.home, record)
    session.say(f"{name} was gone and is the same domain again, UUID {uuid}: its protection and its history go on")
    if made.managed_save():
        # libvirt keeps it by the name: it was left over from the lost one.
        session.say(
            "libvirt holds memory that was saved before and does not fit these disks:"
            f" `virsh managedsave-remove {name}` before it is started"
        )


def _going_on(session: Session, point: Point) -> Protection:
    """The protection record as of the point."""
    record = protection.require(session.home, point.domain_uuid, point.domain)
    record = protection.settled(session.home, record, session.repository)
    if (record.last_point, record.timeline) == (point.id, point.timeline) and record.parent in (None, point.id):
        return record
    fresh = Timeline(
        secrets.token_hex(8), point.domain_uuid, datetime.now(UTC), parent=point.timeline, origin=point.id
    )  # fmt: skip
    session.repository.put_timeline(fresh)
    return record.moved_to(fresh.id, point.id)
