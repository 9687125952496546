"""check, gc, forget: what keeps a repository sound and small."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from appliance.capture import protection
from appliance.errors import ConfigError, NoSuchPoint
from appliance.model import Point
from appliance.restore import hydrations, streams
from appliance.restore.intent import undo_point
from appliance.service.image import evidence
from appliance.service.instant import resolve
from appliance.service.naming import uuid_of
from appliance.service.session import Progress, Session, silent
from appliance.service.underway import Pending, refuse_if_under_way, under_way

if TYPE_CHECKING:
    from appliance.timeline.catalogue import Summary

__all__ = ["Decision", "check", "forget", "gc"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one point, and the rules that keep it. `undoes`: without it the last revert cannot be undone;
    `warnings` say what else goes with it."""

    point: Point | Summary
    keep: bool
    reasons: tuple[str, ...]
    undoes: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def uuid(self) -> str:
        """The domain's."""
        return self.point.domain_uuid if isinstance(self.point, Point) else self.point.uuid


def check(session: Session, read_data: bool = False, progress: Progress = silent) -> Any:
    """Prove the repository: everything that points need is there, and with `read_data` that every byte is right.
    The report names what is wrong; nothing is changed."""
    from appliance.store.check import check as prove

    return prove(session.repository, read_data, lambda what, done, total: progress(done, total, what))


def gc(session: Session, dry_run: bool = False, progress: Progress = silent) -> Any:
    """Remove what no point needs. Safe beside running captures."""
    from appliance.store.gc import gc as collect

    return collect(session.repository, dry_run, lambda what, done, total: progress(done, total, what))


def forget(
    session: Session,
    name: str | None,
    policy: Any | None,
    points: Sequence[str] = (),
    dry_run: bool = False,
    now: datetime | None = None,
    agree: Callable[[Sequence[Decision]], None] = lambda _found: None,
) -> list[Decision]:
    """Delete the points that no rule keeps, or those that are named; space comes back with `gc`.

    Never deleted: what a revert that has not ended needs. Rules also leave the point that the next one continues from;
    without it that one would read the whole disks. They leave those that writes of continuous capture are counted from,
    and the point that `undo` goes to. `agree` is called before anything is deleted; nothing has changed if it raises.
    Without rules or names nothing is done: ConfigError.
    """
    decisions = _named(session, name, points) if points else _planned(session, name, policy, now or datetime.now(UTC))
    pinned = _pinned(session)
    decisions = [_guard(session, one, pinned, bool(points)) for one in decisions]
    if not dry_run:
        agree(decisions)
        for one in decisions:
            if not one.keep:
                session.repository.delete_point(one.point.id)
        evidence.drop_orphans(session, {point for _uuid, point in session.repository.point_ids()})
        session.catalogue.refresh()
    return decisions


def _planned(session: Session, name: str | None, policy: Any | None, now: datetime) -> list[Decision]:
    """Each domain by itself: a policy of seven days means seven days of each."""
    from appliance.timeline import retention

    if policy is None or policy.empty:
        raise ConfigError(
            reason="no rule says what to keep", hint="give --keep-last, --keep-daily …, or name the points to forget"
        )
    uuids = [uuid_of(session, name)[0]] if name else sorted(session.catalogue.count())
    found: list[Decision] = []
    continued = {one.last_point for one in protection.all_records(session.home)}
    for uuid in uuids:
        points = session.catalogue.points(uuid, measure=False)
        plan, counted = retention.plan(points, policy, now), _counted(session, uuid, points, now)
        undo = undo_point(session.home, uuid)
        for one in plan:
            reason = _needed(one.point.id, continued, counted, undo) if not one.keep else ""
            found.append(Decision(one.point, one.keep or bool(reason), (reason,) if reason else tuple(one.reasons)))
    return found


def _needed(point: str, continued: Collection[str | None], counted: Collection[str], undo: str | None) -> str:
    """Why a point stays that no rule keeps; empty when it does not."""
    if point == undo:
        return "`rewind undo` leads back to it"
    if point in continued:
        return "the next point continues from it"
    return "later writes are counted from it" if point in counted else ""


def _counted(session: Session, uuid: str, points: Sequence[Summary], now: datetime) -> set[str]:
    """Points that the journal of a domain needs as long as every write is kept."""
    from appliance.capture import tiers
    from appliance.timeline.ledger import Ledger

    settings = session.settings
    kept = tiers.Tiers(settings.journal_keep, settings.minutes_keep, settings.hours_keep)
    return tiers.counted_from(points, Ledger(session.home.ledger(uuid)).spans(), kept, now)


def _named(session: Session, name: str | None, points: Sequence[str]) -> list[Decision]:
    if name is None:
        raise NoSuchPoint(domain="?", when=points[0], hint="name the domain before its points")
    uuid, _domain = uuid_of(session, name)  # never of a domain that only had the name before
    named = {point.id: point for point in (resolve(session, uuid, one, taken=True) for one in points)}
    continued = {one.last_point for one in protection.all_records(session.home)}
    return [_told(session, point, point.id in continued) for point in named.values()]


def _told(session: Session, point: Point, continued: bool) -> Decision:
    """What goes with a point that somebody names."""
    undoes = point.id == undo_point(session.home, point.domain_uuid)
    undo = f"`rewind undo {point.domain}` leads back to it: the last revert cannot be undone any more"
    found = [undo] if undoes else []
    found += ["the next point continues from it: that one reads the whole disks then"] if continued else []
    return Decision(point, False, (), undoes, tuple(found))


def _pinned(session: Session) -> dict[str, Pending]:
    """Points that reverts under way still need → the revert."""
    return {point: one for one in under_way(session) for point in one.points}


def _guard(session: Session, one: Decision, pinned: dict[str, Pending], asked: bool) -> Decision:
    if one.keep:
        return one
    if (reader := (hydrations.needed(session.home) | streams.needed(session.home)).get(one.point.id)) is not None:
        if asked:
            reason = f"{reader!r} still reads its disks from {one.point.id}"
            raise ConfigError(reason=reason, hint="`rewind image list` tells when it does not any more")
        return Decision(one.point, True, (f"needed by {reader!r}",))
    if one.point.id not in pinned:
        return one
    if asked:
        needed = pinned[one.point.id]
        refuse_if_under_way(session, needed.uuid, needed.domain)
    return Decision(one.point, True, ("needed by a revert under way",))
