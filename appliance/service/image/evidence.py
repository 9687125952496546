"""What a test boot of a point showed, kept beside the point: points are never written again.

    blobs/evidence/POINT-TIME-booted          a document: verdict, machine, what the system is
    blobs/evidence/POINT-TIME-booted-files    console, report and screen, packed
    blobs/evidence/POINT-TIME-failed …        the same of a point that did not boot

The name alone tells what a list of points shows, so that a list costs one listing. The newest of a point counts;
putting it removes the older ones. It goes with its point at the next `rewind forget`; gc leaves it.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from appliance.errors import IntegrityError, ObjectNotFound, TargetExists
from appliance.service.image.shelf import Shelf
from appliance.service.session import Session
from appliance.store.blobs import BlobRef

__all__ = ["Mark", "drop_orphans", "fetch", "known", "load", "of", "put"]

_KIND = "evidence"
_FILES = "-files"
_NAME = re.compile(r"([0-9a-z]+)-(\d{8}t\d{6})-(booted|failed)")
_TIME = "%Y%m%dt%H%M%S"


@dataclass(frozen=True, slots=True)
class Mark:
    """That a point was booted as a test at `time`, and whether it came up."""

    name: str
    point: str
    time: datetime
    booted: bool


def put(
    session: Session, point: str, time: datetime, booted: bool, document: Mapping[str, Any], files: Mapping[str, bytes]
) -> Mark:
    """Keep it, durably, then remove what is older of the same point. Raises what the store raises."""
    name = f"{point}-{time.astimezone(UTC).strftime(_TIME)}-{'booted' if booted else 'failed'}"
    older = [one for one in _all(session) if one.point == point]
    with tempfile.NamedTemporaryFile(dir=session.home.path / "run") as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path, data in sorted(files.items()):
                member = tarfile.TarInfo(path)
                member.size, member.mtime, member.mode = len(data), int(time.timestamp()), 0o600
                archive.addfile(member, io.BytesIO(data))
        packed.flush()
        Shelf(session, _KIND).put(name, dict(document), Path(packed.name))
    for one in older:
        if one.name != name:
            Shelf(session, _KIND).remove(one.name)
    return Mark(name, point, time, booted)


def known(session: Session) -> dict[str, Mark]:
    """The newest of each point. One listing, nothing is opened."""
    return {one.point: one for one in sorted(_all(session), key=lambda one: one.time)}


def load(session: Session, mark: Mark) -> dict[str, Any]:
    """The document. Raises ObjectNotFound, IntegrityError."""
    ref = BlobRef(_KIND, mark.name)
    try:
        found = json.loads(session.repository.read_blob(ref))
    except ValueError as error:
        raise IntegrityError(object=ref.object, reason=f"it is no document: {error}") from error
    if not isinstance(found, dict):
        raise IntegrityError(object=ref.object, reason="it is no document")
    return found


def fetch(session: Session, mark: Mark, folder: Path) -> list[Path]:
    """Write its files into `folder`, which is made, and must not exist. They can be read by this user alone: a console
    and a screen may show what the guest keeps from others. Raises TargetExists, ObjectNotFound, IntegrityError; nothing
    is left then."""
    if folder.exists():
        raise TargetExists(path=folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        packed, new = Path(scratch) / "files", Path(scratch) / "new"
        Shelf(session, _KIND).fetch(mark.name, packed)
        new.mkdir(mode=0o700)
        with tarfile.open(packed) as archive:
            for member in archive:
                # Only what `put` writes: a repository may have been written by anybody who has its key.
                if member.isreg() and (content := archive.extractfile(member)) is not None:
                    _private(new / Path(member.name).name, content.read())
        document = json.dumps(load(session, mark), indent=1, sort_keys=True)
        _private(new / "evidence.json", f"{document}\n".encode())
        new.rename(folder)
    return sorted(folder.iterdir())


def _private(path: Path, content: bytes) -> None:
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def drop_orphans(session: Session, points: Collection[str]) -> None:
    """Remove what is of none of these points, all that there are."""
    for one in _all(session):
        if one.point not in points:
            Shelf(session, _KIND).remove(one.name)


def _all(session: Session) -> list[Mark]:
    """Those that are whole."""
    names = {ref.name for ref in session.repository.blobs(_KIND)}
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match and name + _FILES in names:
            time = datetime.strptime(match[2], _TIME).replace(tzinfo=UTC)
            found.append(Mark(name, match[1], time, match[3] == "booted"))
    return found


def of(session: Session, point: str) -> Mark:
    """The newest of one point. Raises ObjectNotFound."""
    found = known(session).get(point)
    if found is None:
        raise ObjectNotFound(
            url=session.repository.url, name=f"evidence of point {point}", hint="`rewind image verify` makes it"
        )
    return found
