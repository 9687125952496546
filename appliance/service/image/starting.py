"""Bring a point up on a target as a domain of libvirt: started at once, its disks filled while it runs.

    plan, build ─► overlays of the view ─► define ─► start ─► the hydration goes on by itself (restore/hydrate.py)

Nothing of the point's own domain is touched, which need not exist any more. A step that fails takes back what the ones
before have made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.errors import AlreadyExists, ConfigError, DomainNotFound, HypervisorError, Locked, NotSupported
from appliance.hypervisor.base import Pulls
from appliance.hypervisor.qemu_user import qemu_user
from appliance.model import DiskPoint, Point
from appliance.process import alone, lives, run
from appliance.restore import hydrations, streams
from appliance.restore.newhardware import NewDisk, for_hardware, macs, wanted_disks
from appliance.service import locks
from appliance.service.elsewhere import choose
from appliance.service.image import making, targets, windows
from appliance.service.image.sizes import Sizes
from appliance.service.image.windows import Way
from appliance.service.instant import resolve
from appliance.service.session import Progress, Session, silent
from images.guest.windows import IsWindows
from images.model import Inventory
from images.settle.choice import After

if TYPE_CHECKING:
    from appliance.hypervisor.base import Domain, Hypervisor

__all__ = ["Running", "Started", "follow", "forget", "listing", "resume", "running", "start"]

_MEDIUM = "iso"
_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class Started:
    """A domain that runs. `image` is the folder with its boot medium, `seconds` until it was started."""

    name: str
    uuid: str
    point: str
    target: str
    disks: dict[str, Path]
    image: Path
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Running:
    """How far a domain is that was brought up: `phase` is `pulling`, `off` (it does not run), `done`, `stopped` when
    the process that fills its disks has died, or `gone` when the hypervisor has no such domain any more, however far it
    was; `left` are the disks that still need the repository."""

    name: str
    point: str
    phase: str
    done_bytes: int
    total_bytes: int
    left: tuple[str, ...]
    error: str


def start(
    session: Session, domain: str, when: str, target: str, name: str, folder: Path, *, template: str = "",
    keys: Sequence[bytes] = (), rate: int = 0, new_macs: bool = False, after: After | None = None,
    sizes: Mapping[str, int] | None = None, warned: Callable[[Sequence[str]], None] = lambda _: None,
) -> Started:  # fmt: skip
    """Bring DOMAIN's point up as the new domain `name` with the target's hardware; its files are in `folder`.
    `after` as for `making.build`; a new host name is that of the domain if none is chosen. `sizes` are bytes that disks
    of the point get instead of their own. `warned` gets the warnings before anything of the domain is there.

    A Windows starts from its own disk, in which drivers that it has were told to start at boot. It is an experiment.

    Raises NotForWindows, AlreadyExists (the name, the folder), NotSupported (a target without a libvirt definition),
    DriversMissing, ConfigError for a size of a disk that there is not, ImageError for one that is too small, NoSpace
    where the disks cannot be filled, and what `making.build` raises: nothing is left then.
    """
    with _alone(session, name), session.repository.session(f"start of {name}"):
        return _start(
            session, domain, when, target, name, folder, template, keys, rate, new_macs, after or After(), sizes or {},
            warned,
        )  # fmt: skip


def _lock(session: Session, name: str) -> Path:
    return hydrations.folder(session.home, name).parent / f".{name}.lock"


@contextmanager
def _alone(session: Session, name: str) -> Iterator[None]:
    """Nobody else begins, resumes or forgets that name. Raises Locked."""
    where = _lock(session, name)
    where.parent.mkdir(parents=True, exist_ok=True)
    with alone(where, locks.GLANCE) as first:  # it may only be looked at
        if not first:
            holder = "another `rewind image`, or the daemon,"
            raise Locked(url=f"the name {name!r}", holder=holder, hint="wait for its end")
        yield


def _start(
    session: Session, domain: str, when: str, target: str, name: str, folder: Path, template: str,
    keys: Sequence[bytes], rate: int, new_macs: bool, after: After, sizes: Mapping[str, int],
    warned: Callable[[Sequence[str]], None],
) -> Started:  # fmt: skip
    began = time.monotonic()
    found = targets.find(session, target)
    point = resolve(session, domain, when)
    hypervisor = session.hypervisor()
    if name in hypervisor.domains():
        raise AlreadyExists(url=session.uri, name=f"domain {name}", hint="choose another --name")
    if hydrations.load(session.home, name) is not None or streams.load(session.home, name) is not None:
        raise AlreadyExists(url=str(session.home.path), name=f"image {name}", hint=f"`rewind image forget {name}`")
    disks = choose(point, ())
    fit = Sizes(disks, sizes)
    places = wanted_disks(found.definition, len(disks), name)
    addresses = _addresses(found.definition, name, new_macs)
    shared = _shared(hypervisor, addresses)
    inventory = _with_macs(found.inventory, addresses)
    folder = Path(os.path.abspath(folder))
    fit.refuse_without_room(session.repository, folder, name)
    identity = str(uuid.uuid4())
    with ExitStack() as undo:
        try:
            made = making.build(
                session, domain, point.id, target, [_MEDIUM], folder, template, keys, inventory=inventory,
                after=after.named(name), look=fit.look, machine=identity,
            )  # fmt: skip
            undo.callback(_remove, folder)
            way = Way(made.planned.plan.warnings, made.built.files[_MEDIUM], made.settles)
        except IsWindows as it:
            way = windows.way(session, it, inventory, after, sizes, folder)
            undo.callback(_remove, folder)
        warnings = (*way.warnings, *shared)
        warned(warnings)
        new = _define(session, undo, point, fit, places, name, identity, folder, way, found, addresses, rate)
        new.start()
        undo.pop_all()
    return Started(
        name, new.uuid, point.id, target, {place: folder / f"{name}-{place}.qcow2" for place in places}, folder,
        time.monotonic() - began, warnings,
    )  # fmt: skip


def _define(
    session: Session, undo: ExitStack, point: Point, fit: Sizes, places: Sequence[str], name: str, identity: str,
    folder: Path, way: Way, target: targets.Target, addresses: Sequence[str], rate: int,
) -> Domain:  # fmt: skip
    """The domain, shut off, over a view that answers."""
    disks = fit.disks
    uid, gid = qemu_user(session.uri)
    socket = hydrations.socket_path(session.home, identity)
    new_disks = {}
    for place, one in zip(places, disks, strict=True):
        path = folder / f"{name}-{place}.qcow2"
        new_disks[place] = NewDisk(path, one.disk, socket)
    order = hydrations.Order(
        name, identity, session.uri, point.id, session.spec.to_json(), {one.disk: one.map for one in disks},
        {place: one.disk for place, one in zip(places, disks, strict=True)}, (uid, gid), rate, str(folder), way.settles,
    )  # fmt: skip
    undo.callback(hydrations.tidy, session.home, name)
    # What a forget left that was killed: its state would be taken for the new one's.
    hydrations.tidy(session.home, name)
    hydrations.folder(session.home, name).mkdir(parents=True)
    hydrations.launch(session.home, order, session.settings_file)
    for place, one in zip(places, disks, strict=True):
        _overlay(new_disks[place], one, fit, (uid, gid))
    way.change({new.export: new.path for new in new_disks.values()})
    folder.chmod(0o711)  # QEMU's user passes through
    if way.medium is not None:
        way.medium.chmod(0o600)
        os.chown(way.medium, uid, gid)
    shared = target.inventory.source == "libvirt"
    xml = for_hardware(target.definition, name, new_disks, way.medium, addresses, of_a_domain=shared)
    new = session.hypervisor().define(_with_uuid(xml, identity))
    if not isinstance(new, Pulls):
        raise NotSupported(object=f"new domain {name!r}", reason="only libvirt can fill its disks while it runs")
    undo.callback(new.undefine)
    return new


def follow(session: Session, name: str, progress: Progress = silent) -> Running:
    """Until its disks are its own, or its process has ended. Raises ConfigError for a name that nobody brought up."""
    while True:
        found = running(session, name)
        progress(found.done_bytes, found.total_bytes, f"disks of {name}")
        if found.phase in ("done", "stopped", "gone"):
            return found
        time.sleep(_LOOK)


def listing(session: Session) -> list[Running]:
    """All that were brought up from this home and not forgotten, also while we look."""
    found = [(name, hydrations.load(session.home, name)) for name in hydrations.names(session.home)]
    return [_standing(session, name, order) for name, order in found if order is not None]


def resume(session: Session, name: str) -> None:
    """Have its disks filled again, after this host was restarted or the process that did it died. Raises ConfigError
    for a name that nobody brought up and for a domain that is gone, Locked, RestoreError as `hydrations.launch`."""
    _order(session, name)
    with _alone(session, name):
        order = _order(session, name)  # it may have been forgotten, or started, before we had the name
        if _is_undefined(session, order):
            raise ConfigError(reason=f"domain {name!r} is gone", hint=f"`rewind image forget {name}`")
        if running(session, name).phase == "stopped":
            # The key may come to us through another descriptor than to whoever began.
            hydrations.launch(session.home, replace(order, repository=session.spec.to_json()), session.settings_file)


def forget(session: Session, name: str) -> None:
    """End what is kept for a domain that was brought up: of one that is done, or gone. Raises ConfigError for a name
    that nobody brought up, and for a domain that still needs the repository; Locked, OSError. May be repeated when it
    was broken off."""
    if not hydrations.half_forgotten(session.home, name):
        _order(session, name)
    with _alone(session, name):
        if hydrations.half_forgotten(session.home, name):
            hydrations.tidy(session.home, name)
        else:
            _forget(session, name)


def _forget(session: Session, name: str) -> None:
    found, order = running(session, name), _order(session, name)
    if found.phase != "done" and not _is_undefined(session, order):  # nobody else starts it now
        reason = f"domain {name!r} still reads {', '.join(found.left) or 'its disks'} from the repository"
        undefine = f"`virsh -c {shlex.quote(order.uri)} undefine --nvram {name}`"
        hint = f"wait until `rewind image list` says done, or {undefine}"
        raise ConfigError(reason=reason, hint=hint)
    hydrations.tidy(session.home, name)


def running(session: Session, name: str) -> Running:
    """Raises ConfigError for a name that nobody brought up."""
    return _standing(session, name, _order(session, name))


def _gone(session: Session, order: hydrations.Order) -> bool:
    """Whoever starts it now has not defined it yet, and may have the next moment: it is asked for last."""
    return not locks.taken(_lock(session, order.domain)) and _is_undefined(session, order)


def _is_undefined(session: Session, order: hydrations.Order) -> bool:
    """Whether its own hypervisor answers and has no such domain. One that does not answer says nothing about it."""
    try:
        session.hypervisor_at(order.uri).domain(order.uuid)
    except DomainNotFound:
        return True
    except HypervisorError:
        pass
    return False


def _order(session: Session, name: str) -> hydrations.Order:
    if (order := hydrations.load(session.home, name)) is None:
        raise ConfigError(reason=f"no domain {name!r} was brought up from here", hint="`rewind image list` lists them")
    return order


def _standing(session: Session, name: str, order: hydrations.Order) -> Running:
    state = hydrations.state(session.home, name)
    phase = str(state.get("phase", "stopped"))
    if phase != "done" and not lives(state.get("key", "")):
        phase = "stopped"
    if _gone(session, order):
        phase = "gone"
    return Running(
        name, order.point, phase, int(state.get("done", 0)), int(state.get("total", 0)), tuple(state.get("left", ())),
        str(state.get("error", "")),
    )  # fmt: skip


def _addresses(definition: str, name: str, new: bool) -> list[str]:
    """The target's own MACs; a steady one of ours where it has none, or where new ones are wanted."""
    return [
        _mac(f"{name} {number}") if new or not found else found for number, found in enumerate(macs(definition, name))
    ]


def _shared(hypervisor: Hypervisor, addresses: Sequence[str]) -> list[str]:
    """Told of each address that another domain has as well: both on one network would lose each other's packets."""
    told = []
    for other in hypervisor.domains():
        with suppress(DomainNotFound, NotSupported):  # gone since it was listed
            for one in sorted({*macs(hypervisor.domain(other).definition(), other)} & {*addresses}):
                told.append(f"domain {other!r} has the MAC {one} as well: `--new-macs` gives this one others")
    return told


def _mac(text: str) -> str:
    digits = hashlib.sha256(text.encode()).hexdigest()
    return f"52:54:00:{digits[:2]}:{digits[2:4]}:{digits[4:6]}"


def _with_macs(inventory: Inventory, addresses: Sequence[str]) -> Inventory:
    """In the order of the definition, which is that of the inventory."""
    cards = [
        nic.model_copy(update={"mac": address}) for nic, address in zip(inventory.nics, addresses, strict=False)
    ]
    return inventory.model_copy(update={"nics": tuple(cards) + inventory.nics[len(cards) :]})


def _with_uuid(xml: str, identity: str) -> str:
    return xml.replace("<name>", f"<uuid>{identity}</uuid><name>", 1)


def _overlay(disk: NewDisk, stored: DiskPoint, fit: Sizes, owner: tuple[int, int]) -> None:
    backing: dict[str, Any] = {"driver": "raw", "file": {
        "driver": "nbd", "server.type": "unix", "server.path": str(disk.socket), "export": disk.export,
    }}  # fmt: skip
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", "-u", "-b",
         "json:" + json.dumps(backing), "-F", "raw", disk.path, str(fit.of(stored))]
    )  # fmt: skip
    fit.put_tables(stored, disk)
    disk.path.chmod(0o600)
    os.chown(disk.path, *owner)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
