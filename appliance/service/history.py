"""points: what the history of a domain holds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.model import Consistency
from appliance.service.capturing import missing
from appliance.service.naming import uuid_of
from appliance.timeline.catalogue import Gap, Summary
from appliance.timeline.ledger import Ledger

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["History", "history"]


@dataclass(frozen=True, slots=True)
class History:
    """The points of one domain, oldest first, and what is missing between them."""

    domain: str
    uuid: str
    points: list[Summary]
    gaps: list[Gap]


def history(session: Session, name: str, now: datetime | None = None, measure: bool = True) -> History:
    """Everything about one domain; `measure` as for the catalogue's points. Raises as `uuid_of`."""
    uuid, domain = uuid_of(session, name, reading=True)
    record = session.record(uuid)
    found = session.catalogue.points(uuid, measure)
    _tell_tests(session, found)
    every, continuous = (record.every, record.continuous) if record else (None, False)
    spans = Ledger(session.home.ledger(uuid)).spans()
    return History(domain, uuid, found, missing(found, every, spans, continuous, now or datetime.now(UTC)))


def _tell_tests(session: Session, points: list[Summary]) -> None:
    """What test boots showed since: a point itself is never written again."""
    from appliance.service.image import evidence

    marks = evidence.known(session)
    for one in points:
        mark = marks.get(one.id)
        if mark is not None and mark.booted:
            one.consistency = Consistency.BOOTED.value
        elif mark is not None:
            one.notes = (*one.notes, "it did not boot as a test: see `rewind image evidence`")
