"""The journals of domains that this home captured continuously and does not any more.

    records older than `journal_keep` ── points stand for them ──► they go, from the spool and from what was shipped

As long as a capture runs its own process does that (`tending`). After `unprotect`, or when every write is not wanted
any more, nobody would: the spool would stay on the host's disk for ever. What is made is a point for each minute, for
each hour of what is older than `minutes_keep`, and the last write of each span. No point is dropped: of a domain that
writes no history any more only a person forgets points.

Only journals that lie in this home's own spool are touched: another home may capture the same domain into the same
repository, and its ledger may be in ours as a copy. Where a point cannot be made no record goes.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.capture import protection, tap
from appliance.capture.ship import retire
from appliance.errors import Locked, RewindError
from appliance.journal import Journal, forget
from appliance.service import tiers

if TYPE_CHECKING:
    from datetime import datetime

    from appliance.service.session import Progress, Session

__all__ = ["Lapsed", "lapse", "spooled"]

# Of one go, after which the domain is free for a moment: somebody may want to protect it.
_BUDGET = 10.0


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
    """Let the records go that no tier keeps, of every domain that this home captured and does not any more. One that
    somebody works on, or of which something cannot be read, is left with a warning; the others go on."""
    names = {one.uuid: one.domain for one in session.catalogue.points(measure=False)}
    found = []
    for uuid in _spools(session):
        domain = names.get(uuid, uuid)
        try:
            found.append(_domain(session, uuid, domain, progress, now))
        except Locked as error:
            session.warn(f"the journal of {domain} is left for the next time: {error.message}")
        except (RewindError, OSError) as error:
            session.warn(f"the journal of {domain} stays as it is: {error}")
    return [one for one in found if one.made or one.segments]


def spooled(session: Session, uuid: str) -> int:
    """Bytes of the recorded writes that lie on this host in sealed segments: an open one is allocated beforehand."""
    spool, total = session.home.spool(uuid), 0
    for path in spool.glob("*.rwj"):
        with suppress(FileNotFoundError):  # a gc lets go of it
            total += path.stat().st_size
    return total


def _spools(session: Session) -> list[str]:
    folder = session.home.spool("UUID").parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _is_over(session: Session, uuid: str) -> bool:
    record = protection.load(session.home, uuid)
    if record is not None and record.continuous or tap.current(session.home, uuid) is not None:
        return False
    return session.home.ledger(uuid).exists()


def _domain(session: Session, uuid: str, domain: str, progress: Progress, now: datetime | None) -> Lapsed:
    """Raises Locked, and what reading the journal and the store raise."""
    made = 0
    while True:
        with session.hold(uuid, domain, f"gc of {domain}'s journal"):
            if not _is_over(session, uuid):
                return Lapsed(domain, uuid, made, 0, 0)
            outcome = tiers.run(session, tiers.Journaled(uuid, domain), _BUDGET, now=now, ended=True)
            made += outcome.made
            if outcome.unmade:
                session.warn(f"the journal of {domain} stays: of {outcome.unmade} no point can be made")
                return Lapsed(domain, uuid, made, 0, 0)
            if not outcome.left:
                return Lapsed(domain, uuid, made, *_let_go(session, uuid, outcome.expired))
        progress(made, made + outcome.left, f"points of {domain}'s journal")


def _let_go(session: Session, uuid: str, expired: dict[str, int]) -> tuple[int, int]:
    """(segments, bytes). The spool last: as long as a journal lies there it is known to be ours."""
    spool, segments, freed = session.home.spool(uuid), 0, 0
    for journal in _journals(session, uuid) & expired.keys():
        far = retire(session.repository, uuid, journal, expired[journal])
        near = forget(spool, journal, expired[journal])
        segments, freed = segments + far[0] + near[0], freed + far[1] + near[1]
    return segments, freed


def _journals(session: Session, uuid: str) -> set[str]:
    spool = session.home.spool(uuid)
    if not spool.is_dir():
        return set()
    with Journal(spool) as journal:
        return {journal.open(part).header.journal.hex() for part in journal.parts}
