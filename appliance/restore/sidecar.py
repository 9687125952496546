"""The small host files that belong to a point, taken back with it while the domain is shut off: UEFI variables and the
state of its TPM. Both instants of them lie beside the intent, so that whoever ends the revert needs no repository."""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.config import Home
from appliance.errors import RestoreError
from appliance.hypervisor.base import Domain
from appliance.model import DiskKind, DiskPoint, Point
from appliance.restore.intent import Intent, save
from appliance.units import CHUNK, chunks_of

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["keep", "put_back", "write_stored"]


def keep(home: Home, repo: Repository, domain: Domain, intent: Intent, wanted: Point, safety: Point) -> Intent:
    """Copy what both points have, if the domain has it now and is reverted as a whole; the intent says where to."""
    places = {DiskKind.NVRAM: domain.nvram(), DiskKind.TPM: domain.tpm_state()} if intent.whole else {}
    for kind, path in places.items():
        then, now = _stored(wanted, kind), _stored(safety, kind)
        if path is None or then is None or now is None:
            continue
        for name, one in (("wanted", then), ("safety", now)):
            write_stored(repo, one, home.revert(intent.uuid) / f"{kind.value}-{name}")
        intent = save(home, replace(intent, extra={**intent.extra, kind.value: str(path)}))
    return intent


def _stored(point: Point, kind: DiskKind) -> DiskPoint | None:
    return next((one for one in point.disks if one.kind is kind), None)


def write_stored(repo: Repository, stored: DiskPoint, target: Path) -> None:
    """A host file as it is kept in the repository, chunk by chunk; durable, mode 0600. Replaces what is there."""
    found = repo.map(stored.map)
    with open(target, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        for index in range(chunks_of(stored.size)):
            chunk = found.get(index)
            file.write(repo.read_chunk(chunk) if chunk else bytes(CHUNK))
        file.truncate(stored.size)
        file.flush()
        os.fsync(file.fileno())


def put_back(home: Home, intent: Intent) -> None:
    """Make the domain's files the state that the revert ends in. May be repeated, and has to be when it was
    interrupted: the TPM's state is several files."""
    state = "safety" if intent.rolling_back else "wanted"
    folder = home.revert(intent.uuid)
    if DiskKind.NVRAM.value in intent.extra:
        _put_file(folder / f"nvram-{state}", Path(intent.extra[DiskKind.NVRAM.value]))
    if DiskKind.TPM.value in intent.extra:
        _put_folder(folder / f"tpm-{state}", Path(intent.extra[DiskKind.TPM.value]))


def _put_file(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.rewind")
    shutil.copyfile(source, temporary)
    if target.exists():
        found = target.stat()
        os.chown(temporary, found.st_uid, found.st_gid)
        os.chmod(temporary, found.st_mode & 0o7777)
    _durable(temporary)
    temporary.replace(target)
    _durable(target.parent)


def _put_folder(source: Path, target: Path) -> None:
    """The archive's files, with its modes and owners, and no others; each of them old or new at any instant. swtpm's
    own lock file stays. The folder is not exchanged: it may be a mount point."""
    target.mkdir(exist_ok=True, mode=0o700)
    with tarfile.open(source) as archive:
        members = {_inside(one.name): one for one in archive.getmembers() if one.isfile() or one.isdir()}
        for path, member in members.items():
            if (target / path).is_symlink():
                (target / path).unlink()  # swtpm makes none, and we shall not write where one leads
            if member.isdir():
                (target / path).mkdir(exist_ok=True, mode=0o700)
                _own(target / path, member)
            else:
                _unpack(archive, member, target / path)
    for path in sorted(target.rglob("*"), reverse=True):
        if path.relative_to(target) not in members and not path.name.startswith(".lock"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in (target, *(one for one in target.rglob("*") if one.is_dir())):
        _durable(path)


def _inside(name: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise RestoreError(reason=f"the TPM's state holds a file outside its folder: {name!r}")
    return path


def _unpack(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    temporary = target.with_name(f".{target.name}.rewind")
    temporary.unlink(missing_ok=True)
    with content, open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        shutil.copyfileobj(content, file)
    _own(temporary, member)
    _durable(temporary)
    temporary.replace(target)


def _own(path: Path, member: tarfile.TarInfo) -> None:
    if os.geteuid() == 0:
        os.chown(path, member.uid, member.gid)
    os.chmod(path, member.mode & 0o777)


def _durable(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
