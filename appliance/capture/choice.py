"""Which disks belong to a point, and each of them as a source of the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from appliance.capture.heal import Mode, Plan
from appliance.capture.protection import Protection
from appliance.errors import DiskNotFound, NotSupported
from appliance.hypervisor.base import Disk, Domain
from appliance.hypervisor.graph.epoch import Source
from appliance.hypervisor.graph.nodes import Graph

__all__ = ["Part", "choose", "resized", "source_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """One disk on its way into the point."""

    disk: Disk
    plan: Plan
    source: Source


def choose(domain: Domain, record: Protection, notes: list[str]) -> list[Disk]:
    """The disks that belong to the point, in the order of the definition.

    A disk that was protected and is not attached any more is left out with a note: in every point when it was named,
    once when the whole domain is protected (`record.disks` is empty; the record forgets it then). So is, in the latter
    case, one that cannot be protected. Raises DiskNotFound when nothing is left, NotSupported when a disk that was
    named cannot be protected, or none of those that are there.
    """
    there = [disk for disk in domain.disks() if not disk.read_only]
    wanted = [disk for disk in there if not record.disks or disk.target in record.disks]
    for disk in wanted:
        if disk.refusal and record.disks:
            raise NotSupported(object=f"disk {disk.target} of {domain.name}", reason=disk.refusal)
        if disk.refusal:
            notes.append(f"{disk.target} is not in this point: {disk.refusal}")
    chosen = [disk for disk in wanted if not disk.refusal]
    gone = (set(record.disks) | set(record.state)) - {disk.target for disk in wanted}
    notes += [f"{target} is not attached any more" for target in sorted(gone)]
    if wanted and not chosen:
        raise NotSupported(object=f"disk {wanted[0].target} of {domain.name}", reason=wanted[0].refusal)
    if not chosen:
        names = ", ".join(disk.target for disk in there) or "none that can be protected"
        raise DiskNotFound(domain=domain.name, disk=", ".join(record.disks) or "any", disks=names)
    return chosen


def source_of(graph: Graph, prefix: str, disk: Disk, plan: Plan, number: int) -> Source:
    chained = "backing" in graph.nodes[disk.storage].children
    return Source(
        disk=disk,
        number=number,
        take=plan.take if plan.mode is Mode.INCREMENTAL else None,
        recording=f"{prefix}{plan.generation}",
        before=plan.before,
        # Without a backing image, what is not allocated is zero.
        sparse=plan.mode in (Mode.FULL, Mode.COMPARE) and not chained,
    )


def resized(disk: Disk, before: int) -> str:
    """Why a disk that had another size has to be compared; empty when its bitmaps tell everything."""
    if disk.size < before:
        return "it has become smaller"
    # A file grows by zeroes, a volume by whatever lay there.
    grown = disk.size > before and disk.format == "raw" and Path(disk.source).is_block_device()
    return "its volume has grown" if grown else ""
