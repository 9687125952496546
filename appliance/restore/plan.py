"""What a revert is going to do, before it does anything: disks, bytes, files, time, and what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from appliance.capture.protection import Protection
from appliance.config import Home
from appliance.errors import DiskNotFound, NoSuchPoint, NotRecoverable, NotSupported
from appliance.extents import merge, of_chunks
from appliance.hypervisor.base import Disk, Domain, DomainState
from appliance.model import DiskKind, DiskPoint, MapRef, Point
from appliance.restore import intent as intents
from appliance.units import CHUNK, MiB, format_size

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["Part", "Plan", "make_plan", "pair"]

# What a revert moved a second on a slow machine, and what its two pauses, the reset and the keeper take: for a rough
# answer to "seconds or minutes?".
_RATE = 60 * MiB
_FIXED = 4.0
# Counted in whole chunks, the last one too.
_FAR = 1 << 62


@dataclass(frozen=True, slots=True)
class Part:
    """One disk of a revert: as it is attached now, and as it was."""

    disk: Disk
    point: DiskPoint


@dataclass(frozen=True, slots=True)
class Plan:
    """`disks` are (target, size, bytes that differ in whole chunks) as of the last point or revert; what the guest
    wrote since then comes on top. `files` are the paths that will be written or made. `extents` counts runs of
    differing chunks. Without `compared` the present of a disk is in no point any more: all that the point holds counts
    then, which is the most that can move."""

    domain: str
    uuid: str
    point: str
    time: datetime
    mode: str
    disks: tuple[tuple[str, int, int], ...]
    changed_bytes: int
    chunks: int
    extents: int
    expected_seconds: float | None
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    compared: bool = True


def pair(domain: Domain, point: Point, names: Sequence[str]) -> list[Part]:
    """The disks to revert, each with what it was. Without `names` all that the point has.

    Raises DiskNotFound when the point or the domain lacks one, NotSupported when one cannot be switched,
    NotRecoverable when one has become smaller since: a disk cannot be made larger below a guest by a revert.
    """
    there = {disk.target: disk for disk in domain.disks()}
    then = {one.disk: one for one in point.disks if one.kind is DiskKind.DISK}
    wanted = list(names) or list(then)
    for name in wanted:
        for known, whose in ((then, f"point {point.id}"), (there, domain.name)):
            if name not in known:
                raise DiskNotFound(domain=whose, disk=name, disks=", ".join(known) or "none")
        _check(domain, there[name], then[name], point)
    return [Part(there[name], then[name]) for name in wanted]


def _check(domain: Domain, disk: Disk, then: DiskPoint, point: Point) -> None:
    if disk.refusal:
        raise NotSupported(object=f"disk {disk.target} of {domain.name}", reason=disk.refusal)
    if disk.size < then.size:
        raise NotRecoverable(
            point=point.id,
            reason=f"disk {disk.target} has {disk.size} bytes now and had {then.size} then",
            hint=f"make it at least as large first: virsh blockresize {domain.name} {disk.target} {then.size}B",
        )


def make_plan(
    home: Home, repo: Repository, domain: Domain, record: Protection, point: Point, names: Sequence[str],
    instant: bool, rate: int,
) -> Plan:  # fmt: skip
    """Look, and change nothing. Raises what `pair` raises, and what reading the maps raises."""
    parts = pair(domain, point, names)
    now = _present(home, repo, record)
    rows, extents, chunks = [], 0, 0
    for part in parts:
        present = now.get(part.disk.target)
        count = 0
        for extent in merge(of_chunks(repo.diff(present, part.point.map), CHUNK, _FAR)):
            extents += 1
            count += extent.length // CHUNK
        chunks += count
        rows.append((part.disk.target, part.disk.size, count * CHUNK))
    changed = chunks * CHUNK
    return Plan(
        domain=domain.name, uuid=domain.uuid, point=point.id, time=point.time, mode=_mode(domain, instant),
        disks=tuple(rows), changed_bytes=changed, chunks=chunks, extents=extents,
        expected_seconds=_FIXED + changed / min(rate or _RATE, _RATE),
        files=tuple(sorted([part.disk.source for part in parts] + [f"{home.revert(domain.uuid)}/"])),
        notes=(*notes(domain, point, parts, bool(names)), *_reading(repo, record), *_reset(domain)),
        compared=all(part.disk.target in now for part in parts),
    )  # fmt: skip


def _reading(repo: Repository, record: Protection) -> list[str]:
    """What it costs that there is no point to count from."""
    if _point(repo, record.last_point) is not None:
        return []
    why = "was forgotten" if record.last_point else "is not there yet"
    return [f"the point that the next one continues from {why}: the protected disks are read whole first"]


def _reset(domain: Domain) -> list[str]:
    """Not of `notes`, which are told of a revert that was done as well."""
    if domain.state() is DomainState.SHUTOFF:
        return []
    return ["the guest is reset: what it has in memory alone is gone, and no undo brings it back"]


def _present(home: Home, repo: Repository, record: Protection) -> dict[str, MapRef]:
    """The newest known state of each disk: of the last point, or what a revert since then has put there."""
    newest = _point(repo, record.parent or record.last_point)
    found = {one.disk: one.map for one in newest.disks} if newest else {}
    # A revert of some disks only has no point of its own to come from.
    done = intents.load(home, record.uuid)
    if record.parent is not None and done is not None and done.ended and done.timeline == record.timeline:
        # The maps of a point that was forgotten may be collected.
        there = _point(repo, done.point) is not None
        found = {name: map for name, map in found.items() if there or name not in {one.target for one in done.disks}}
        found |= {disk.target: disk.wanted for disk in done.disks if there}
    return found


def _point(repo: Repository, name: str | None) -> Point | None:
    """None when it was deleted."""
    try:
        return repo.point(name) if name else None
    except NoSuchPoint:
        return None


def _mode(domain: Domain, instant: bool) -> str:
    if domain.state() is DomainState.SHUTOFF:
        return "offline"
    return "instant" if instant else "plain"


def notes(domain: Domain, point: Point, parts: Sequence[Part], chosen: bool) -> list[str]:
    """What a person should know before saying yes."""
    found = []
    for part in parts:
        if part.disk.size > part.point.size:
            rest = format_size(part.disk.size - part.point.size)
            found.append(
                f"{part.disk.target} has grown since: it keeps its size, and the last {rest} will read as zeroes"
            )
    reverted = {part.disk.target for part in parts}
    untouched = [disk.target for disk in domain.disks() if disk.target not in reverted]
    if untouched:
        found.append(f"{', '.join(untouched)} {'is' if len(untouched) == 1 else 'are'} left as now")
    kinds = {one.kind for one in point.disks}
    for kind, what in ((DiskKind.NVRAM, "UEFI variables stay"), (DiskKind.TPM, "the TPM's state stays")):
        if kind in kinds and not chosen and domain.state() is not DomainState.SHUTOFF:
            found.append(f"{what} as now: that can be taken back while the domain is shut off only")
    return found
