"""A point, a target and a template become a plan, and the plan an image.

opened   the point's disks served by a view, read by a confined child: the guest's files and its system
plan     which driver goes in, out, stays; nothing is written
build    the image in a folder; nothing is written when a driver is missing
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from appliance.errors import BadInventory, ToolFailed
from appliance.model import Point
from appliance.service.elsewhere import export
from appliance.service.image import drivers, readers, targets, templates
from appliance.service.instant import resolve
from appliance.service.session import Session
from images import hardware
from images.build import Built, build_image
from images.drivers.plan import Options, make_plan
from images.drivers.store import DriverStore
from images.drivers.tables import tables_from_folder, tables_from_tree
from images.guest import Guest, open_guest
from images.model import Client, Inventory, Plan
from images.settle.choice import After, report_of, with_steps
from images.settle.lacks import lacking
from images.template.build import Template

__all__ = ["Made", "Planned", "Ready", "build", "opened", "plan", "prepared"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planned:
    """`time` is the instant of the point."""

    plan: Plan
    domain: str
    point: str
    time: datetime
    template: str
    reader: str


@dataclass(frozen=True, slots=True)
class Made:
    """An image, and the plan that it was built by. `settles` is what its client's report of settling is known by,
    empty when it does nothing to itself."""

    planned: Planned
    built: Built
    settles: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """What planning has found and building needs. The guest is open as long as the context lasts that gave it."""

    planned: Planned
    guest: Guest
    template: Template
    store: DriverStore


@contextmanager
def opened(session: Session, domain: str, when: str, keys: Sequence[bytes] = ()) -> Iterator[tuple[Point, Guest]]:
    """The system in a point, read-only. `keys` are passphrases for LUKS. Raises GuestUnreadable, and as `export`."""
    point = resolve(session, domain, when)
    with readers.scratch(session) as folder, export(session, domain, point.id) as served:
        disks = {one.disk: one.uri for one in served.disks}
        kept, accelerator = readers.folder(session), session.settings.accelerator
        with open_guest(disks, folder, keys=keys, appliances=kept, accelerator=accelerator) as guest:
            yield point, guest


def plan(
    session: Session, domain: str, when: str, target: str, template: str = "", keys: Sequence[bytes] = (),
    options: Options | None = None, after: After | None = None,
) -> Planned:  # fmt: skip
    """`after` as for `build`: its plan has the same warnings. Raises NoSuchTarget, NoSuchTemplate, GuestUnreadable, and
    as `export`. A missing driver is told in the plan."""
    with prepared(session, domain, when, target, template, keys, options) as ready:
        return replace(ready.planned, plan=_with_lacks(ready.planned.plan, ready.guest, after or After()))


def build(
    session: Session, domain: str, when: str, target: str, media: Sequence[str], folder: Path, template: str = "",
    keys: Sequence[bytes] = (), options: Options | None = None, inventory: Inventory | None = None,
    after: After | None = None, look: Callable[[Guest], None] | None = None, machine: str = "",
) -> Made:  # fmt: skip
    """Build these media into `folder`, which must not exist. `inventory` instead of what the target's name stands for;
    `after` is what the client does to itself once it runs, other than one with another `machine`. `look` sees the guest
    before anything is written, and may raise. Raises as `plan` and `images.build.build_image`; nothing is left then."""
    with prepared(session, domain, when, target, template, keys, options, inventory) as ready:
        planned = ready.planned
        if look is not None:
            look(ready.guest)
        seed = " ".join([planned.point, planned.plan.inventory.name, *([machine] if machine else [])])
        plan, settings = with_steps(planned.plan, after or After(), seed)
        plan = _with_lacks(plan, ready.guest, after or After())
        built = build_image(
            plan, ready.guest.tree, ready.template, media=media, folder=folder, settings=settings,
            driver_store=drivers.reader(ready.store, plan.client.release),
        )  # fmt: skip
        return Made(replace(planned, plan=plan), built, report_of(settings))


@contextmanager
def prepared(
    session: Session, domain: str, when: str, target: str, template: str, keys: Sequence[bytes],
    options: Options | None, inventory: Inventory | None = None,
) -> Iterator[Ready]:  # fmt: skip
    """The first half of `build`: the plan, and all that it was made of. Arguments and errors as there."""
    inventory = inventory or targets.find(session, target).inventory
    with opened(session, domain, when, keys) as (point, guest):
        chosen = templates.opened(session, template)  # not before: a Windows needs none
        client, unknown = _with_origin(guest.client, point)
        store = drivers.store_for(session, client.release)
        options = replace(options or Options(), identifiers=_identifiers(guest))
        made = _plan(client, guest, inventory, chosen, store, options)
        made = replace(made, warnings=(*made.warnings, *unknown))
        yield Ready(Planned(made, point.domain, point.id, point.time, chosen.id, guest.reader), guest, chosen, store)


def _plan(
    client: Client, guest: Guest, inventory: Inventory, template: Template, store: DriverStore, options: Options
) -> Plan:
    return make_plan(
        client, tables_from_tree(guest.tree, client.modules), inventory, tables_from_folder(template.modules),
        store.tables(client.release), options=options,
    )  # fmt: skip


def _with_lacks(plan: Plan, guest: Guest, after: After) -> Plan:
    """With warnings of what its client has not got for what it is to do to itself."""
    lacks = lacking(plan, guest.tree, guest.volumes, after.choice(plan, ""))
    return replace(plan, warnings=(*plan.warnings, *lacks))


def _with_origin(client: Client, point: Point) -> tuple[Client, list[str]]:
    """The client with the hardware that it came from, which only says what is left out; and what is to be told when
    that is not known."""
    try:
        old = hardware.from_xml(point.xml, target="origin")
    except (BadInventory, ToolFailed) as error:
        log.info("the hardware of %s is not known: %s", point.domain, error)
        return client, [f"what hardware {point.domain!r} had is not known, so drivers for it are not told"]
    return replace(client, origin=tuple(device.modalias for device in old.devices)), []


def _identifiers(guest: Guest) -> frozenset[str]:
    """How fstab and command lines may call what is on the restored disks."""
    found: set[str] = set()
    for one in guest.volumes:
        names = {"UUID": one.uuid, "LABEL": one.label, "PARTUUID": one.partuuid, "PARTLABEL": one.partlabel}
        found |= {f"{kind}={value}" for kind, value in names.items() if value}
    return frozenset(found)
