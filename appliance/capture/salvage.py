"""What is left when the host is lost: the newest instant that the repository alone can prove.

    copy of the ledger ── its newest span that a point is in ──► base
    shipped segments   ── as far as there is no hole ─────────► upto        then  consolidate(repo, base, journal, upto)

Nothing is shipped that the ledger had not confirmed, and the end of a span is in the copy before any record behind it
is (ship.py). So every shipped record that follows from a base of the copy counts, also those after its last line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.capture import ship
from appliance.errors import NoSuchPoint
from appliance.journal import Journal
from appliance.journal.layout import FOOTER
from appliance.model import Point
from appliance.timeline import instant
from appliance.timeline.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.store import Repository
    from appliance.timeline.spans import CapturedSpan

__all__ = ["Salvage", "adopt", "newest"]


# Its place in a footer.
_WALL_LAST: Final = 5


@dataclass(frozen=True, slots=True)
class Salvage:
    """The state of `base` and the records of `journal` up to `upto`; without a journal it is the base itself. `reason`
    says why nothing later is claimed, empty when nothing later is known of."""

    base: Point
    journal: Journal | None
    upto: int
    reason: str = ""


def adopt(repo: Repository, domain_uuid: str, path: Path) -> bool:
    """Make the repository's copy the ledger at `path`, and confirm in it what was shipped since. False when there is no
    copy, or a ledger already. Raises what the store raises; without the copy's folder FileNotFoundError."""
    copy = repo.ledger(domain_uuid)
    ledger = Ledger(path)
    if not copy or not ledger.adopt(copy):
        return False
    spans = ledger.spans()
    if spans and spans[-1].open:
        span = spans[-1]
        last = _shipped(repo, domain_uuid, span.journal, span.last)
        if last > span.last:
            ledger.confirmed(span.journal, last, _ended(repo, domain_uuid, span.journal, last))
    return True


def newest(repo: Repository, domain_uuid: str, folder: Path) -> Salvage:
    """Fetches what is needed into `folder`. Raises NoSuchPoint when there is no point at all, and what the store and
    `ship.fetch` raise."""
    points = repo.points(domain_uuid)
    if not points:
        raise NoSuchPoint(domain=domain_uuid, when="latest")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ledger.jsonl", "ledger.at"):
        (folder / name).unlink(missing_ok=True)  # of an earlier call: more may have been shipped since
    adopt(repo, domain_uuid, folder / "ledger.jsonl")
    spans = Ledger(folder / "ledger.jsonl").spans()
    chosen = next(((span, found[-1]) for span in reversed(spans) if (found := instant.starts(span, points))), None)
    if chosen is None:
        return Salvage(points[-1], None, points[-1].sequence or 0, "" if spans else "no ledger was shipped")
    span, start = chosen
    last = min(_shipped(repo, domain_uuid, span.journal, start.sequence), max(span.last, start.sequence))
    base = replace(
        repo.point(start.point), journal=start.journal, sequence=start.sequence, timeline=start.timeline
    )  # fmt: skip
    reached = _reached(repo, domain_uuid, base, folder, last, _reason(span, last))
    if points[-1].time > _time(reached, start.time):
        return Salvage(points[-1], None, points[-1].sequence or 0)
    return reached


def _reached(repo: Repository, uuid: str, base: Point, folder: Path, last: int, reason: str) -> Salvage:
    start = base.sequence or 0
    if last == start:
        return Salvage(base, None, start, reason)
    journal = ship.fetch(repo, uuid, base.journal, folder / base.journal, start, last)
    for lost in journal.lost(start, last):
        return Salvage(base, journal, lost.sequence - 1, f"write {lost.sequence} was refused by the journal")
    return Salvage(base, journal, last, reason)


def _reason(span: CapturedSpan, last: int) -> str:
    if last < span.last:
        return "what follows was not shipped"
    return span.reason_ended


def _time(found: Salvage, otherwise: datetime) -> datetime:
    if found.journal is None or found.upto == found.base.sequence:
        return otherwise
    return next(found.journal.records(found.upto, found.upto + 1)).time


def _shipped(repo: Repository, uuid: str, journal: str, after: int) -> int:
    """The last number that was shipped without a hole behind that one; that one when there is none."""
    runs: Sequence[tuple[int, int]] = ship.held(repo, uuid, journal)
    return next((last for first, last in runs if first <= after + 1 <= last), after)


def _ended(repo: Repository, uuid: str, journal: str, last: int) -> datetime:
    """When that record was made, the last one of its segment."""
    ref = next(ref for ref in repo.segments(uuid) if (ref.journal, ref.last) == (journal, last))
    wall_ns = FOOTER.unpack(repo.read_segment(ref, -FOOTER.size))[_WALL_LAST]
    return datetime.fromtimestamp(wall_ns / 1e9, UTC)
