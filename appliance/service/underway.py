"""Reverts that have not ended: which there are, whether anybody drives them, and what else must wait for them."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote
from typing import TYPE_CHECKING

from appliance.errors import RevertUnderWay
from appliance.hypervisor import hostlock
from appliance.restore import intent

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["Pending", "abandoned", "cared_for", "refuse_if_under_way", "under_way"]


@dataclass(frozen=True, slots=True)
class Pending:
    """A revert that has not ended. `points` are those it still needs."""

    domain: str
    uuid: str
    target: str
    points: tuple[str, ...]


def under_way(session: Session) -> list[Pending]:
    """Reverts of this home that have not ended."""
    return [
        Pending(one.domain, one.uuid, one.point, (one.point, one.safety_point)) for one in intent.pending(session.home)
    ]


def abandoned(session: Session) -> list[Pending]:
    """Those of `under_way` that nobody drives: their keeper was killed as well, or the host was started anew."""
    return [one for one in under_way(session) if not cared_for(session, one.uuid)]


def cared_for(session: Session, uuid: str) -> bool:
    """Whether a living process goes on with the revert of that domain."""
    from appliance.restore import keeper

    home = session.home
    return keeper.lives(keeper.state(home, uuid).get("key", "")) or intent.driven(home, uuid)


def refuse_if_under_way(session: Session, uuid: str, domain: str, held: bool = False) -> None:
    """Raises RevertUnderWay with what to do: wait for whoever works on it, or resume it; also when another home began
    it. `held`: we hold the domain, so it is nobody's `rewind`."""
    try:
        intent.refuse_if_under_way(session.home, uuid, domain)
    except RevertUnderWay as error:
        raise RevertUnderWay(**error.fields, hint=_who_ends_it(session, uuid, domain, held)) from None
    # Again when the domain is claimed; here, before its disks are asked for: what they say of the other's job is less.
    session.refuse_half_way(hostlock.names_of(uuid, ()), uuid, domain)


def _who_ends_it(session: Session, uuid: str, domain: str, held: bool) -> str:
    """Empty for the usual hint."""
    who = None if held else session.busy(uuid)
    if who:
        return f"{who} works on it: wait until it has ended"
    if cared_for(session, uuid):
        return (
            f"its keeper goes on with it by itself: `rewind status {quote(domain)}` shows it,"
            f" `rewind resume {quote(domain)}` waits for its end"
        )
    return ""
