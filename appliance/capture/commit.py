"""From what the intake holds to a point that exists: maps, the small host files that belong to it, the commit."""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.hypervisor.base import Disk, Domain
from appliance.model import DiskKind, DiskPoint, MapRef, Point
from appliance.units import CHUNK

if TYPE_CHECKING:
    from appliance.store import ChunkWriter, Repository

__all__ = ["Sidecar", "disk_point", "new_id", "read_sidecars", "store_sidecar"]

# More than this is not a variable store or a TPM; reading it while the guest waits would be felt.
_SIDECAR_LIMIT = 80 << 20


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of a host file (or folder, as a tar archive) that belongs to the point's instant."""

    kind: DiskKind
    source: str
    data: bytes


def new_id(moment: datetime) -> str:
    """Sorts by time, unique without asking anyone."""
    return f"{int(moment.timestamp() * 1000):012x}{secrets.token_hex(4)}"


def read_sidecars(domain: Domain) -> list[Sidecar]:
    """UEFI variables and TPM state as they are now. Inside the pause: that takes a millisecond."""
    found: list[Sidecar] = []
    nvram, tpm = domain.nvram(), domain.tpm_state()
    if nvram is not None and nvram.exists():
        found.append(Sidecar(DiskKind.NVRAM, str(nvram), _limited(nvram)))
    if tpm is not None and tpm.exists():
        found.append(Sidecar(DiskKind.TPM, str(tpm), _archive(tpm)))
    return found


def _limited(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SIDECAR_LIMIT)


def _archive(folder: Path) -> bytes:
    """A tar of the folder that is the same whenever the files are: names, content, mode and owner, no times."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if path.name.startswith(".lock") or not (path.is_file() or path.is_dir()):
                continue
            entry = archive.gettarinfo(path, str(path.relative_to(folder)))
            entry.mtime = 0
            archive.addfile(entry, path.open("rb") if path.is_file() else None)
    return out.getvalue()


def store_sidecar(repo: Repository, writer: ChunkWriter, sidecar: Sidecar, parent: Point | None) -> DiskPoint:
    """Stored as a small disk named `nvram` or `tpm`."""
    pieces = (sidecar.data[at : at + CHUNK] for at in range(0, len(sidecar.data), CHUNK))
    changes = ((index, writer.put(piece)) for index, piece in enumerate(pieces))
    ref = repo.write_map(None, len(sidecar.data), _non_zero(changes), writer)
    before = _of(parent, sidecar.kind.value)
    changed = tuple(repo.diff(before, ref))
    return DiskPoint(
        disk=sidecar.kind.value, size=len(sidecar.data), map=ref, kind=sidecar.kind,
        changed_bytes=len(changed) * CHUNK, changed=changed if before else None, source=sidecar.source,
    )  # fmt: skip


def _non_zero(changes: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    return ((index, chunk) for index, chunk in changes if chunk)


def disk_point(repo: Repository, disk: Disk, ref: MapRef, parent: Point | None, bitmap: str) -> DiskPoint:
    """The disk at the point, with what differs from the same disk of `parent`."""
    before = _of(parent, disk.target)
    differing = repo.diff(before, ref)
    # Without a parent the list would be every chunk of the disk, and nobody asks for it.
    changed = None if before is None else tuple(differing)
    count = sum(1 for _ in differing) if changed is None else len(changed)
    attributes = {"bus": disk.bus, "device": disk.device, "bitmap": bitmap}
    return DiskPoint(
        disk=disk.target, size=disk.size, map=ref, changed_bytes=count * CHUNK, changed=changed,
        source=disk.source, format=disk.format,
        attributes={name: value for name, value in attributes.items() if value},
    )  # fmt: skip


def _of(point: Point | None, disk: str) -> MapRef | None:
    return next((one.map for one in point.disks if one.disk == disk), None) if point is not None else None
