"""protect, unprotect, point: which domains are protected, and taking their points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.errors import (
    ConfigError,
    DiskNotFound,
    DomainBusy,
    DomainNotFound,
    FenceError,
    NotSupported,
)
from appliance.hypervisor.base import DomainState
from appliance.restore import fence
from appliance.service import tap
from appliance.service.naming import earlier, holder, not_protected
from appliance.service.session import Progress, Session, silent
from appliance.service.underway import refuse_if_under_way
from appliance.timeline.instant import number_of
from appliance.timeline.ledger import Ledger
from appliance.timeline.when import reading

if TYPE_CHECKING:
    from appliance.hypervisor.base import Domain
    from appliance.model import Point

__all__ = ["Protected", "point", "protect", "unprotect"]

# Reasons of points that no person asked for at that moment.
_UNASKED = ("schedule", "baseline")
_UNPAUSE = "`rewind pause DOMAIN --end` ends the pause"


@dataclass(frozen=True, slots=True)
class Protected:
    """`targets` are the disks that are protected now, `already` whether the domain was protected before."""

    record: Protection
    targets: tuple[str, ...]
    already: bool


def protect(
    session: Session,
    name: str,
    every: float | None = None,
    disks: Sequence[str] = (),
    quiesce: str | None = None,
    wait: float = 0.0,
    *,
    continuous: bool | None = None,
    max_added_latency: float | None = None,
    verify_every: float | None = None,
) -> Protected:
    """Begin, or change what is given. Without `disks` the whole domain is protected, disks added later included. With
    `continuous` every write is recorded from now on by a process of its own, which also takes the first point;
    `max_added_latency` is in seconds, 0 for none; so is `verify_every`, how often the daemon boots the newest point.

    A protected domain that is gone and had the name before is not protected any more then; its points stay.

    Raises DiskNotFound; NotSupported with the reason when a disk cannot be protected; nothing has changed then. Nothing
    is copied: that is the first point's work.
    """
    domain, lost = _named(session, name)
    with session.hold(domain.uuid, domain.name, f"protect {domain.name}", wait):
        refuse_if_under_way(session, domain.uuid, domain.name, held=True)
        found = protection.load(session.home, domain.uuid)
        chosen = tuple(disks) or (found.disks if found else ())
        targets = _protectable(domain, chosen)
        if found is None:
            made = protection.new(session.repository, domain, chosen, every=_whole(every), quiesce=quiesce or "auto")
        else:
            made = replace(
                found, domain=domain.name, disks=chosen, every=_whole(every) if every else found.every,
                quiesce=quiesce or found.quiesce,
            )  # fmt: skip
        made = replace(
            made,
            continuous=made.continuous if continuous is None else continuous,
            max_added_latency=made.max_added_latency if max_added_latency is None else max_added_latency or None,
            verify_every=made.verify_every if verify_every is None else _whole(verify_every or None),
        )
        protection.save(session.home, made)
    if lost is not None:
        # Only now: had the new one been refused, nothing would have changed.
        unprotect(session, lost.uuid, wait)
    if found is None and (before := earlier(session, domain.name, domain.uuid)):
        session.say(f"{domain.name} begins a history of its own; of the domain called so before there are {before}")
    _fence(session, domain)
    # Its process needs the domain's lock, to attach as to let go.
    if made.continuous:
        begins = found is None or not found.continuous
        if begins:
            _tell_dangers(session, domain, targets)  # as long as a bare QEMU's monitor is ours
        tap.ensure(session, made)
        if begins:
            session.warn(
                "while every write is recorded QEMU drops the guest's discards: trim its disks in a `rewind pause`"
            )
    elif found is not None and found.continuous:
        tap.stop(session, made)
    return Protected(made, targets, found is not None)


def _named(session: Session, name: str) -> tuple[Domain, Protection | None]:
    """The domain that has the name now; and the record of a protected one that had it before and is gone, whose
    protection ends with this. Raises DomainNotFound, RevertUnderWay when a revert of the lost one has not ended."""
    record = session.record(name)
    other = None if record is None or name == record.uuid else holder(session, record)
    if record is None or other is None:
        return session.domain(name), None
    refuse_if_under_way(session, record.uuid, record.domain)
    return other, record


def _fence(session: Session, domain: Domain) -> None:
    """Install the hook now: libvirt notices its first one only when it starts, so a revert would be too late."""
    if not domain.uri.startswith("qemu"):
        return
    try:
        remedy = fence.install(session.home, Path(session.settings.hook_directory)).remedy
    except FenceError as error:
        remedy = error.message
    if remedy:
        session.warn(f"before a revert: {remedy}")


def _protectable(domain: Domain, wanted: Sequence[str]) -> tuple[str, ...]:
    """The targets, in the order of the domain. Raises DiskNotFound, NotSupported."""
    there = {disk.target: disk for disk in domain.disks()}
    for target in wanted:
        if target not in there:
            raise DiskNotFound(domain=domain.name, disk=target, disks=", ".join(there) or "none")
    chosen = [disk for disk in there.values() if not wanted or disk.target in wanted]
    if not chosen:
        raise NotSupported(object=f"domain {domain.name!r}", reason="it has no disk that could be protected")
    refused = next((disk for disk in chosen if disk.refusal), None)
    if refused is not None:
        fine = [disk.target for disk in there.values() if not disk.refusal]
        others = " ".join(f"--disk {target}" for target in fine)
        raise NotSupported(
            object=f"disk {refused.target!r} of {domain.name!r}", reason=refused.refusal,
            hint=f"`rewind protect {quote(domain.name)} {others}` protects the others" if fine else "",
        )  # fmt: skip
    return tuple(disk.target for disk in chosen)


def _whole(every: float | None) -> int | None:
    """The record keeps whole seconds; rounding up promises no more than is kept."""
    return None if every is None else max(1, math.ceil(every))


def _tell_dangers(session: Session, domain: Domain, targets: Sequence[str]) -> None:
    """What this QEMU is known for, where continuous capture brings it about or is refused for it."""
    from appliance.service.doctor import known

    if domain.state() is DomainState.SHUTOFF:
        return
    version = domain.process().version
    iothread = any(disk.iothread for disk in domain.disks() if disk.target in targets)
    for one in known.defects(version, iothread):
        if one.mirror or one.others:
            session.warn(f"QEMU {'.'.join(map(str, version))}: {one.what}; {one.remedy}")


def unprotect(session: Session, name: str, wait: float = 0.0) -> tuple[Protection, int]:
    """(the record that was, points that stay). Our bitmaps are removed from the images when the domain can be reached;
    a domain that is gone has none any more, and where a disk cannot be opened they stay, with a warning: they only
    record. Raises NotProtected."""
    record = session.protected(name)
    _end_tap(session, record, wait)
    with session.hold(record.uuid, record.domain, f"unprotect {record.domain}", wait):
        refuse_if_under_way(session, record.uuid, record.domain, held=True)
        try:
            domain = session.hypervisor(record.uri).domain(record.uuid)
        except DomainNotFound:
            pass  # gone, and its images with it
        else:
            from appliance.capture.release import release

            try:
                with session.claim(domain, f"unprotect {record.domain}", wait):
                    release(domain, record)
            except NotSupported as error:
                if domain.state() is not DomainState.SHUTOFF:
                    raise  # in the graph of a running guest nothing of ours is left behind
                session.warn(f"our bitmaps stay in the images of {record.domain}, where they do no harm: {error}")
        protection.remove(session.home, record.uuid)
    return record, session.catalogue.count().get(record.uuid, 0)


def _end_tap(session: Session, record: Protection, wait: float) -> None:
    if not record.continuous:
        return
    with session.hold(record.uuid, record.domain, f"unprotect {record.domain}", wait):
        refuse_if_under_way(session, record.uuid, record.domain, held=True)
        now = protection.require(session.home, record.uuid, record.domain)
        protection.save(session.home, replace(now, continuous=False))
    tap.stop(session, record)


def point(
    session: Session,
    name: str,
    *,
    label: str = "",
    reason: str = "manual",
    quiesce: str | None = None,
    rate: int | None = None,
    wait: float = 0.0,
    progress: Progress = silent,
) -> Point:
    """Take one point now. Raises ConfigError for a label that means something else already, NotProtected,
    RevertUnderWay, DomainBusy in a pause when no person asked for it, and what the epoch raises: the guest is unharmed
    then, and what it wrote is in the next point."""
    from appliance.capture import epoch
    from appliance.store.merge import tidy

    _need_free(label)
    record = session.record(name)
    if record is None:
        raise not_protected(session, name)
    _warn_of_label(session, record, label)
    with session.hold(record.uuid, record.domain, f"point {record.domain}", wait):
        refuse_if_under_way(session, record.uuid, record.domain, held=True)
        if reason in _UNASKED and tap.paused_until(session.home, record.uuid) is not None:
            # It may have waited for the domain since before the pause.
            raise DomainBusy(domain=record.domain, reason="we were asked to step aside", hint=_UNPAUSE)
        domain = session.domain(record.uuid)
        if reason == "baseline" and domain.state() is DomainState.SHUTOFF:
            # It has waited too long: nothing counts from it any more, and its write lock is in the way of a start.
            raise DomainBusy(domain=record.domain, reason="it was shut off before the capture had its first point")
        settings = session.settings if rate is None else replace(session.settings, rate_limit=rate)
        with session.claim(domain, f"point {record.domain}", wait):
            taken = epoch.take(
                domain, session.spec, session.home, settings, protection.require(session.home, record.uuid, name),
                session.repository, label=label, reason=reason, quiesce=quiesce,
                progress=lambda done, total, _rate, _left: progress(done, total, ""),
            )  # fmt: skip
    tidy(session.repository)
    return taken.point


def _need_free(label: str) -> None:
    """A revert to `latest` or to a time must never go to what somebody has called so, and a list of points has a line
    for each. Raises ConfigError."""
    if not label.isprintable():
        raise ConfigError(
            reason=f"{label!r} cannot be a label: it has characters that cannot be printed",
            hint="one line of text: `--label 'before upgrade'`",
        )
    if meaning := reading(label):
        raise ConfigError(
            reason=f"{label!r} cannot be a label: `--to {label}` means {meaning}",
            hint=f"add a word to it: `--label 'at {label.strip()}'`",
        )


def _warn_of_label(session: Session, record: Protection, label: str) -> None:
    """Not refused: a script that gives every night's point the same label shall not lose the second night."""
    if not label:
        return
    # What was captured once stays in the ledger, and its writes can be named also when capture is off.
    counted = record.continuous or Ledger(session.home.ledger(record.uuid)).spans()
    if counted and number_of(label.removesuffix("?")) is not None:
        session.warn(
            f"the label {label!r} is the number of a write, too: once its point is forgotten `--to {label}` means that"
        )
    same = [one for one in session.catalogue.points(record.uuid, measure=False) if one.label == label]
    if same:
        when = same[-1].time.astimezone().isoformat(sep=" ", timespec="seconds")
        session.warn(
            f"the label {label!r} has point {same[-1].id} of {when} already: from now on"
            f" `--to {label}` is ambiguous, and only ids tell the {len(same) + 1} points apart"
        )
