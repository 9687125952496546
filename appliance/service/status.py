"""status: how things stand, without changing anything and without failing because one part is down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.errors import ConnectError, DomainNotFound, RewindError
from appliance.service.capturing import Capturing, capturing
from appliance.service.naming import found, holder, lost
from appliance.service.underway import under_way
from appliance.store.backend.place import NEARLY_NOTHING, free_bytes

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.hypervisor.base import Domain
    from appliance.service.image.starting import Running
    from appliance.service.image.streaming import Streamed
    from appliance.service.session import Session
    from appliance.timeline.catalogue import Summary

__all__ = ["DomainState", "InstanceState", "brought_up", "status"]

# A scheduled point later than this many intervals is worth a word.
_LATE = 2.0


@dataclass(frozen=True, slots=True)
class InstanceState:
    """The repository, and whether a daemon serves this home. `free` are the bytes that a repository in a folder has
    left; None of any other, and where that cannot be told."""

    url: str
    repository_id: str
    encrypted: bool
    points: int
    daemon: bool
    free: int | None = None

    @property
    def nearly_full(self) -> bool:
        return self.free is not None and self.free < NEARLY_NOTHING


@dataclass(frozen=True, slots=True)
class DomainState:
    """One domain. `state` is the hypervisor's word, `gone` when it knows no such domain, `unknown` when it does not
    answer; `revert` names the point of a revert that has not ended, `busy` who works on the domain now, `uncaptured`
    the protected disks that no point can hold as things are."""

    domain: str
    uuid: str | None
    uri: str
    state: str
    protected: bool
    disks: tuple[str, ...]
    every: float | None
    quiesce: str | None
    points: int
    last_point: str | None
    last_time: datetime | None
    age: float | None
    late: bool
    revert: str | None
    busy: str | None
    notes: tuple[str, ...] = ()
    capture: Capturing | None = None
    uncaptured: tuple[str, ...] = ()


def brought_up(session: Session) -> tuple[list[Running], list[Streamed]]:
    """Domains and machines that were brought up from here and whose disks are not their own yet, or that are gone."""
    from appliance.restore import hydrations, streams

    started: list[Running] = []
    served: list[Streamed] = []
    # All that makes images is loaded only where there are any: it takes longer than the rest of `status`.
    if hydrations.names(session.home):
        from appliance.service.image import starting

        started = [one for one in starting.listing(session) if one.phase != "done"]
    if streams.names(session.home):
        from appliance.service.image import streaming

        served = [one for one in streaming.listing(session) if one.phase != "done"]
    return started, served


def status(
    session: Session, only: str | None = None, everything: bool = False, now: datetime | None = None
) -> tuple[InstanceState, list[DomainState]]:
    """The instance and its protected domains (with `everything` all of the hypervisor's). Raises DomainNotFound for an
    `only` that is neither protected nor known to the hypervisor."""
    from appliance.capture import protection

    instance = session.instance
    points = session.catalogue.points(measure=False)
    state = InstanceState(
        instance["url"], session.repository.id, session.repository.encrypted, len(points), session.daemon_runs(),
        free_bytes(str(instance["url"])),
    )
    records = [one for one in protection.all_records(session.home) if only in (None, one.domain, one.uuid)]
    moment = now or datetime.now(UTC)
    found = [_protected(session, one, points, moment) for one in records]
    if everything or (only and not found):
        # The name of one that is gone may be another domain's now.
        known = {one.domain for one in found if one.state != "gone"}
        names = [only] if only else [name for name in session.hypervisor().domains() if name not in known]
        found += [_unprotected(session, str(name), points, moment) for name in names]
    return state, found


def _protected(session: Session, record: Protection, points: list[Summary], now: datetime) -> DomainState:
    pending = next((one.target for one in under_way(session) if one.uuid == record.uuid), None)
    busy = session.busy(record.uuid)
    # A bare QEMU's monitor serves one client, and whoever works on the domain needs it more than we do.
    held = record.uri.startswith("qmp:") and (pending or busy)
    state, notes, missing = ("unknown", (), ()) if held else _state(session, record, bool(pending or busy))
    mine = [one for one in points if one.uuid == record.uuid]
    last = mine[-1] if mine else None
    age = (now - last.time).total_seconds() if last else None
    capture = capturing(session, record, mine, now)
    late = record.every is not None and (age is None or age > _LATE * record.every)
    return DomainState(
        record.domain, record.uuid, record.uri, state, True, tuple(record.disks), record.every, record.quiesce,
        len(mine), last.id if last else None, last.time if last else None, age, late, pending,
        busy, notes + capture.notes, capture, missing,
    )  # fmt: skip


def _state(
    session: Session, record: Protection, worked_on: bool
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:  # fmt: skip
    """(the hypervisor's word, what one should know, the disks that no point can hold)."""
    try:
        domain = session.hypervisor(record.uri).domain(record.uuid)
        state = domain.state().value
    except DomainNotFound:
        return "gone", _successor(session, record), ()
    except (ConnectError, RewindError) as error:
        return "unknown", (error.message,), ()
    return (state, (), ()) if worked_on else (state, *_disks(domain, record))


def _disks(domain: Domain, record: Protection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what of its disks no point holds, and why; those of them that are protected). Not asked while somebody works on
    the domain: its graph is theirs then, and looks like one that cannot be protected."""
    try:
        there = {disk.target: disk for disk in domain.disks()}
    except RewindError as error:
        return (error.message,), ()
    wanted = record.disks or tuple(there)
    refused = {one: there[one].refusal for one in wanted if one in there and there[one].refusal}
    missing = [one for one in wanted if one not in there]
    left = [one for one in there if one not in wanted]
    notes = [f"disk {one} cannot be captured: {why}" for one, why in refused.items()]
    notes += [f"disk {one} is protected and not there any more" for one in missing]
    notes += [f"not protected: {', '.join(left)}"] if left else []
    return tuple(notes), (*refused, *missing)


def _successor(session: Session, record: Protection) -> tuple[str, ...]:
    """Of one that is gone: what to do, also when another domain has its name. Silent when the hypervisor went away
    now."""
    try:
        other = holder(session, record)
    except RewindError:
        return ()
    if other is None:
        return (f"{lost(session, record).hint}; `rewind unprotect {record.domain}` if it is not to come back",)
    return (f"another domain is called {record.domain} now: `rewind protect {record.domain}` protects that one",)


def _unprotected(session: Session, name: str, points: list[Summary], now: datetime) -> DomainState:
    domain = found(session, name)
    mine = [one for one in points if one.uuid == domain.uuid]
    last = mine[-1] if mine else None
    age = (now - last.time).total_seconds() if last else None
    disks = tuple(disk.target for disk in domain.disks())
    return DomainState(
        domain.name, domain.uuid, domain.uri, domain.state().value, False, disks, None, None, len(mine),
        last.id if last else None, last.time if last else None, age, False, None, session.busy(domain.uuid),
    )  # fmt: skip
