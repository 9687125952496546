"""The journals of domains that nobody captures continuously any more.

    records older than `journal_keep` ── a point for each minute stands for them ──► they go, here and in the repository

As long as a capture runs its own process does that (`tending`). After `unprotect`, or when every write is not wanted
any more, nobody would: the spool would stay on the host's disk for ever. Points are made and none is dropped: of a
domain that writes no history any more only a person forgets points.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.capture import protection, tap
from appliance.capture.ship import retire
from appliance.errors import Locked
from appliance.journal import forget
from appliance.service import tiers

if TYPE_CHECKING:
    from datetime import datetime

    from appliance.service.session import Progress, Session

__all__ = ["Lapsed", "lapse", "spooled"]

# Of one go; a store that answers slowly shall not keep a person from ending it.
_BUDGET = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lapsed:
    """What went of one domain: points that were made first, then segments and bytes, of the spool and of the
    repository."""

    domain: str
    uuid: str
    made: int
    segments: int
    bytes: int


def lapse(session: Session, progress: Progress, now: datetime | None = None) -> list[Lapsed]:
    """Let the records go that no tier keeps, of every domain of this home that has a journal and no capture. One that
    somebody works on is left for the next time. Raises what the store raises; what has gone was replaced before."""
    found = []
    for uuid, domain in _left(session):
        try:
            with session.hold(uuid, domain, f"gc of {domain}'s journal"):
                if _is_left(session, uuid):
                    found.append(_domain(session, uuid, domain, progress, now))
        except Locked as error:
            _log.info("the journal of %s is left for the next time: %s", domain, error.message)
    return [one for one in found if one.made or one.segments]


def spooled(session: Session, uuid: str) -> int:
    """Bytes of the recorded writes that lie on this host."""
    spool = session.home.spool(uuid)
    return sum(path.stat().st_size for path in spool.iterdir()) if spool.is_dir() else 0


def _left(session: Session) -> list[tuple[str, str]]:
    """(UUID, name) of those that have points: without one no record can be reached, or replaced."""
    names = {one.uuid: one.domain for one in session.catalogue.points(measure=False)}
    return [(uuid, name) for uuid, name in sorted(names.items()) if _is_left(session, uuid)]


def _is_left(session: Session, uuid: str) -> bool:
    record = protection.load(session.home, uuid)
    if record is not None and record.continuous or tap.current(session.home, uuid) is not None:
        return False
    return session.home.ledger(uuid).exists()


def _domain(session: Session, uuid: str, domain: str, progress: Progress, now: datetime | None) -> Lapsed:
    made, left = 0, 1
    while left:
        outcome = tiers.run(session, tiers.Journaled(uuid, domain), _BUDGET, now=now, drop=False)
        made, left = made + outcome.made, outcome.left
        progress(made, made + left, f"points of {domain}'s journal")
    spool, segments, freed = session.home.spool(uuid), 0, 0
    for journal, number in outcome.expired.items():
        for count, size in (forget(spool, journal, number), retire(session.repository, uuid, journal, number)):
            segments, freed = segments + count, freed + size
    return Lapsed(domain, uuid, made, segments, freed)
