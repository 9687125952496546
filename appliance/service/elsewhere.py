"""export, restore: a point as disks that other programs read, and as a new domain somewhere else.

Neither touches the domain that the point is of; it need not exist any more, and the hypervisor is asked only when a new
domain is to be defined.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import (
    AlreadyExists,
    ConfigError,
    DiskNotFound,
    NotSupported,
    TargetExists,
    ToolFailed,
    of_the_system,
)
from appliance.model import DiskKind, DiskPoint, Point
from appliance.service import returning
from appliance.service.instant import resolve
from appliance.service.session import Progress, Session, silent
from appliance.units import chunks_of

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer

__all__ = ["Exported", "ExportedDisk", "Restored", "choose", "export", "restore"]

_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class ExportedDisk:
    """One NBD disk; `uri` is what nbdinfo, nbdcopy and qemu-img take."""

    disk: str
    size: int
    uri: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What is being served. It ends with the context of `export`."""

    domain: str
    point: str
    time: datetime
    disks: tuple[ExportedDisk, ...]
    servers: tuple[ViewServer, ...]

    def wait(self) -> None:
        """Until interrupted. Raises ToolFailed when a server has died by itself."""
        while all(server.alive() for server in self.servers):
            time.sleep(_LOOK)
        dead = next(server for server in self.servers if not server.alive())
        raise ToolFailed(tool="nbdkit", reason=dead.tail() or "it was killed")


@contextmanager
def export(
    session: Session,
    name: str,
    when: str,
    disks: Sequence[str] = (),
    writable: bool = False,
    socket: Path | None = None,
) -> Iterator[Exported]:
    """Serve a point while the context lasts. Writes to a `writable` export go into an overlay that ends with it; each
    disk then has a server of its own. Raises DiskNotFound, NoSuchPoint and the like; TargetExists for the socket."""
    point = resolve(session, name, when)
    chosen = choose(point, disks)
    if socket is not None and socket.exists():
        raise TargetExists(path=socket)
    if socket is not None and not socket.parent.is_dir():
        raise ConfigError(reason=f"there is no folder {socket.parent} for the socket", hint="make it first")
    if writable and socket is not None and len(chosen) > 1:
        raise ConfigError(reason="a writable export has a socket for each disk", hint="choose one disk with --disk")
    groups = [[one] for one in chosen] if writable else [chosen]
    # Not below run/UUID: an export must not collide with an epoch of the same domain.
    folder = Path(tempfile.mkdtemp(prefix="export-", dir=session.home.path / "run"))
    try:
        with ExitStack() as stack:
            served = [_serve(session, stack, folder, group, writable, socket) for group in groups]
            found = tuple(
                ExportedDisk(one.disk, one.size, server.uri(one.disk))
                for server, group in zip(served, groups, strict=True)
                for one in group
            )
            yield Exported(point.domain, point.id, point.time, found, tuple(served))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(
    session: Session, stack: ExitStack, folder: Path, disks: list[DiskPoint], writable: bool, socket: Path | None
) -> ViewServer:
    from appliance.restore.export import ViewServer

    server = ViewServer(
        folder,
        session.spec,
        {one.disk: one.map for one in disks},
        writable=writable,
        socket=socket or folder / (f"{disks[0].disk}.sock" if writable else "disks.sock"),
        cache=session.settings.view_cache,
        log=session.home.log / "export.log",
    )
    return stack.enter_context(server)


def choose(point: Point, names: Sequence[str]) -> list[DiskPoint]:
    """The guest's disks of those names, or all of them. Raises DiskNotFound."""
    there = {one.disk: one for one in point.disks if one.kind is DiskKind.DISK}
    for name in names:
        if name not in there:
            raise DiskNotFound(domain=point.domain, disk=name, disks=", ".join(there) or "none")
    return [there[name] for name in (names or there)]


@dataclass(frozen=True, slots=True)
class Restored:
    """`files` are the new disks, `definition` the new domain's, `defined` whether the hypervisor knows it; `left_out`
    tells what of the old domain the new one does not have."""

    domain: str
    point: str
    time: datetime
    name: str
    defined: bool
    definition: Path | None
    files: tuple[Path, ...]
    written_bytes: int
    seconds: float
    left_out: tuple[str, ...] = ()


def restore(
    session: Session,
    name: str,
    when: str,
    folder: Path,
    new_name: str | None = None,
    disks: Sequence[str] = (),
    image_format: str = "qcow2",
    rate: int = 0,
    progress: Progress = silent,
) -> Restored:
    """Write the disks of a point into new files of `folder`, and define a domain of them when `new_name` is given. A
    whole domain that is protected, gone, and comes back under its name is the same domain: see `returning`.

    Existing files are never overwritten (TargetExists), an existing domain neither (AlreadyExists), and both are looked
    at before anything is written. After a failure what was written is removed again.
    """
    began = time.monotonic()
    point = resolve(session, name, when)
    folder = Path(os.path.abspath(folder))
    plan = _Plan(point, folder, new_name or point.domain, choose(point, disks), image_format)
    if new_name is not None:
        _must_be_a_name(new_name)
        _must_be_new(session, point, new_name)
    back = new_name == point.domain and not disks and returning.may(session, point)
    xml, left_out = _definition(plan, new_name is not None, point.domain_uuid if back else "")
    _make(folder)
    plan.must_be_new()
    with ExitStack() as undo:
        undo.callback(plan.remove)
        written = _write_disks(session, plan, rate, progress)
        _write_definition(session, plan, xml)
        if back:
            returning.define(session, point, xml)
        elif new_name is not None:
            session.hypervisor(point.uri or None).define(xml)
        undo.pop_all()
    return Restored(
        point.domain, point.id, point.time, plan.name, new_name is not None,
        plan.definition if plan.definition.exists() else None, tuple(plan.files.values()), written,
        time.monotonic() - began, tuple(left_out),
    )  # fmt: skip


class _Plan:
    """Which files a restore makes. Only names; `remove` deletes those of them that exist."""

    def __init__(self, point: Point, folder: Path, name: str, disks: list[DiskPoint], image_format: str) -> None:
        self.point, self.name, self.disks, self.format = point, name, disks, image_format
        self.files = {one.disk: folder / f"{name}-{one.disk}.{image_format}" for one in disks}
        self.definition = folder / f"{name}.xml"
        self.nvram = folder / f"{name}-nvram.fd" if self.nvram_disk() else None

    def nvram_disk(self) -> DiskPoint | None:
        return next((one for one in self.point.disks if one.kind is DiskKind.NVRAM), None)

    def all(self) -> list[Path]:
        return [*self.files.values(), self.definition, *([self.nvram] if self.nvram else [])]

    def must_be_new(self) -> None:
        for path in self.all():
            if path.exists():
                raise TargetExists(path=path)

    def remove(self) -> None:
        for path in self.all():
            path.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    """Raises NoSpace, PermissionDenied, ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "--into names the folder for the new disks"
        reason = f"folder {str(folder)!r} cannot be made: {(error.strerror or str(error)).lower()}"
        raise of_the_system(error) or ConfigError(reason=reason, hint=hint) from error


def _must_be_a_name(name: str) -> None:
    """Files are called by it, and the hypervisor refuses such a name after the disks were written. Raises
    ConfigError."""
    if "/" in name or not name.isprintable() or not name.strip():
        reason = f"{name!r} cannot be the name of a domain"
        raise ConfigError(reason=reason, hint="without `/`, line breaks and the like: `--name web-restored`")


def _must_be_new(session: Session, point: Point, name: str) -> None:
    uri = session.uri if session.connect or not point.uri else point.uri
    if name in session.hypervisor(uri).domains():
        raise AlreadyExists(url=uri, name=f"domain {name}", hint="choose another --name")


def _write_disks(session: Session, plan: _Plan, rate: int, progress: Progress) -> int:
    """Bytes of all new images, as they are on disk."""
    from appliance.restore.export import ViewServer
    from appliance.restore.image import write_image

    total, done = sum(one.size for one in plan.disks), 0
    folder = Path(tempfile.mkdtemp(prefix="restore-", dir=session.home.path / "run"))
    try:
        exports = {one.disk: one.map for one in plan.disks}
        with ViewServer(folder, session.spec, exports, cache=session.settings.view_cache) as server:
            for one in plan.disks:
                share = _share(progress, done, one.size, total, f"restore of {one.disk}")
                write_image(server, one.disk, plan.files[one.disk], plan.format, rate=rate, progress=share)
                done += one.size
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return sum(path.stat().st_blocks * 512 for path in plan.files.values())


def _share(progress: Progress, done: int, size: int, total: int, what: str) -> Callable[[float], None]:
    return lambda share: progress(done + int(share * size), total, what)


def _definition(plan: _Plan, needed: bool, uuid: str) -> tuple[str, list[str]]:
    """(XML, what it leaves out). Empty where the point has no definition that libvirt could read and none is needed."""
    from appliance.restore.definition import for_new_domain

    files = {disk: (path, plan.format) for disk, path in plan.files.items()}
    try:
        return for_new_domain(plan.point.xml, plan.name, files, plan.nvram, uuid=uuid)
    except NotSupported:
        if needed:
            raise
        return "", ["the definition: the point has none that libvirt could read"]


def _write_definition(session: Session, plan: _Plan, xml: str) -> None:
    """The definition and the NVRAM, beside the disks."""
    stored = plan.nvram_disk()
    if plan.nvram is not None and stored is not None:
        _write_small(session, stored, plan.nvram)
    if xml:
        plan.definition.write_text(xml)


def _write_small(session: Session, stored: DiskPoint, target: Path) -> None:
    """A host file that belongs to the point: a few hundred KiB, chunk by chunk."""
    found = session.repository.map(stored.map)
    with open(target, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        for index in range(chunks_of(stored.size)):
            file.write(session.repository.read_chunk(found.get(index)))
        file.truncate(stored.size)
        file.flush()
        os.fsync(file.fileno())
