"""Kernel modules that clients do not have themselves: kept in the repository, unpacked in this home's cache."""

from __future__ import annotations

import dataclasses
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from appliance.errors import IntegrityError
from appliance.service.image.shelf import Shelf
from appliance.service.session import Session
from images.drivers.store import Drivers, DriverStore, NoSuchDrivers
from images.model import Decision

__all__ = ["add", "listing", "reader", "remove", "store_for"]

_KIND = "drivers"


def add(session: Session, path: Path, release: str = "") -> Drivers:
    """Take the modules of a folder, a .deb, an .rpm or one module; the same again is what is there.

    Raises DriversRefused, GuestUnreadable, and what the
    store raises; nothing is kept then."""
    scratch = Path(tempfile.mkdtemp(prefix=".add-", dir=_made(session.home.cache / _KIND)))
    try:
        entry = DriverStore(scratch).add(path, release=release)
        if known := [one for one in listing(session) if one.digest == entry.digest]:
            return known[0]
        file = scratch / "file"
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(scratch / entry.release / entry.name, arcname=".")
        Shelf(session, _KIND).put(entry.digest[:32], dataclasses.asdict(entry), file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return entry


def listing(session: Session, release: str = "") -> list[Drivers]:
    """All, or those for one kernel release, by release and name."""
    found = [Drivers(**package.document) for package in Shelf(session, _KIND).packages()]
    return sorted((one for one in found if release in ("", one.release)), key=lambda one: (one.release, one.name))


def remove(session: Session, name: str) -> None:
    """Raises NoSuchDrivers. Plans that need it find them missing from now on."""
    for one in listing(session):
        if one.name == name:
            Shelf(session, _KIND).remove(one.digest[:32])
            shutil.rmtree(session.home.cache / _KIND / one.release / one.name, ignore_errors=True)
            return
    raise NoSuchDrivers(name=name)


def store_for(session: Session, release: str) -> DriverStore:
    """A store on this host that has exactly what the repository has for that release."""
    root = _made(session.home.cache / _KIND)
    wanted = {one.name: one for one in listing(session, release)}
    for name, one in wanted.items():
        Shelf(session, _KIND).have(one.digest[:32], root / release / name, _unpack)
    for left in DriverStore(root).list(release):
        if left.name not in wanted:
            shutil.rmtree(root / release / left.name, ignore_errors=True)  # removed by another home
    return DriverStore(root)


def reader(store: DriverStore, release: str) -> Callable[[Decision], bytes]:
    """For `build_image`: the content of a module that the plan takes from the store."""
    return lambda decision: store.read(release, decision.origin, decision.path)


def _unpack(file: Path, where: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=_made(where.parent)))
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                _put(archive, member, scratch)
        scratch.chmod(0o755)
        scratch.rename(where)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Files of the entry alone; not every Python that we run on can be told to take no others."""
    content = archive.extractfile(member) if member.isfile() else None
    name = member.name.removeprefix("./")
    if content is None:
        return
    if name.startswith("/") or ".." in name.split("/"):
        raise IntegrityError(object=f"driver package {folder.name}", reason=f"{name!r} leads out of it")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.read())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
