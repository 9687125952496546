"""A Windows of a point on other hardware, by drivers that it has: planned, and changed in the overlay it starts from.

    judged         IsWindows, as reading the point ended, and a target → what its plan says
    way            the same for a new domain that is to start
    change         the one thing that is written: Start of these drivers in the registry, in a new domain's own disk

Experimental: never promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from appliance.errors import GuestUnreadable, TargetExists
from appliance.service.image import readers, targets
from appliance.service.instant import resolve
from appliance.service.session import Session
from images.drivers.windows import WindowsPlan, judge, refuse
from images.guest.appliance import Unfit, fitting
from images.guest.confine import user
from images.guest.reader import ConfinedTree
from images.guest.sources import serve_disks
from images.guest.windows import IsWindows, firmware_of
from images.model import Inventory
from images.settle.choice import After

__all__ = ["PlannedWindows", "Way", "change", "judged", "planned", "way"]


@dataclass(frozen=True, slots=True)
class PlannedWindows:
    """`time` is the instant of the point."""

    plan: WindowsPlan
    domain: str
    point: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Way:
    """How a new domain starts: from a medium, or from its first disk once `change` has been at its disks (by their
    names in the point). `settles` as in `making.Made`."""

    warnings: tuple[str, ...]
    medium: Path | None
    settles: str = ""
    change: Callable[[Mapping[str, Path]], None] = lambda _: None


def planned(session: Session, domain: str, when: str, target: str, found: IsWindows, after: After) -> PlannedWindows:
    """Raises NoSuchTarget, and as `resolve`. What hinders it is told in the plan."""
    point = resolve(session, domain, when)
    plan = judged(found, targets.find(session, target).inventory, after, {})
    return PlannedWindows(plan, point.domain, point.id, point.time)


def judged(found: IsWindows, inventory: Inventory, after: After, sizes: Mapping[str, int]) -> WindowsPlan:
    """What was asked for that only Linux guests do is refused, too."""
    asked = {
        "--settle": after.settle, "--identity new": after.identity != "keep", "--host-name": bool(after.host_name),
        "--grow": after.grow, "--size": bool(sizes),
    }  # fmt: skip
    return judge(found.windows, firmware_of(found.volumes), inventory, [name for name, one in asked.items() if one])


def way(
    session: Session, found: IsWindows, inventory: Inventory, after: After, sizes: Mapping[str, int], folder: Path
) -> Way:
    """That of a new domain, with its folder. Raises NotForWindows, TargetExists; nothing is written then."""
    plan = judged(found, inventory, after, sizes)
    refuse(plan)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise TargetExists(path=folder) from None
    return Way(plan.warnings, None, change=lambda disks: change(session, plan, disks))


def change(session: Session, plan: WindowsPlan, disks: Mapping[str, Path]) -> None:
    """Have its drivers start at boot, on `disks` (by the names that they have in the point): qcow2 images that nobody
    else has open. Raises GuestUnreadable, ToolFailed; the disks are of no use then."""
    with readers.scratch(session) as folder, _appliance(session) as made:
        served = {name: f"qcow2:{path}" for name, path in disks.items()}
        accelerator = session.settings.accelerator
        with (
            serve_disks(served, folder, user(), writable=True) as sockets,
            ConfinedTree.general(sockets, made, accelerator=accelerator, writable=True) as tree,
        ):
            tree.volumes()  # by them it knows the names
            tree.start_at_boot(plan.windows.volume, plan.windows.control_set, plan.drivers)


@contextmanager
def _appliance(session: Session) -> Iterator[Path]:
    try:
        with fitting(readers.folder(session)) as made:
            yield made
    except Unfit as error:  # since the point was read
        hint = "`rewind image reader build`"
        raise GuestUnreadable(what="the new domain's disk", reason=str(error), hint=hint) from error
