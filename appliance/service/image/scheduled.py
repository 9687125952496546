"""Which point is to be booted as a test by itself: the newest of a domain, once in an interval.

What was tested and when is known by the evidence alone: a daemon that was killed, or one of another host, goes on from
there. A point is not tested twice; a domain without a new point is looked at again later.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.capture.protection import Protection
from appliance.service.image import evidence
from appliance.service.session import Session

__all__ = ["Due", "due"]

# Seconds after which a domain that has nothing to test is looked at again, at the latest.
_LOOK = 600.0


@dataclass(frozen=True, slots=True)
class Due:
    """`point` is to be tested now; empty: none is. `again` is when to look the next time, in seconds since 1970."""

    point: str
    again: float


def due(session: Session, record: Protection, now: float) -> Due:
    """For a domain with `verify_every`. One listing of points and one of evidence. Raises what the store raises."""
    every = float(record.verify_every or 0)
    points = session.catalogue.points(record.uuid, measure=False)
    marks = evidence.known(session)
    last = max((marks[one.id].time.timestamp() for one in points if one.id in marks), default=None)
    if last is not None and last <= now < last + every:  # a clock that was set back makes it due instead of silent
        return Due("", last + every)
    if not points or points[-1].id in marks:
        return Due("", now + min(every, _LOOK))
    return Due(points[-1].id, now + every)
