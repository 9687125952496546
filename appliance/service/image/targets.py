"""Hardware that images are made for: blobs of the repository, so that every home that joins it knows them.

A target is its inventory and, where a libvirt domain was its source, the definition that a new domain is made of.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from appliance.errors import AlreadyExists, BadInventory, NoSuchTarget, ObjectNotFound
from appliance.service.session import Session
from appliance.store.blobs import BlobRef
from images import hardware
from images.model import Inventory

__all__ = ["Target", "add", "find", "listing", "remove"]

_KIND = "targets"


@dataclass(frozen=True, slots=True)
class Target:
    """`definition` is libvirt's XML, empty for hardware that is no domain."""

    inventory: Inventory
    definition: str
    added: datetime


def add(session: Session, inventory: Inventory, definition: str = "", replace: bool = False) -> Target:
    """Keep it under its name. Raises AlreadyExists unless `replace`, and what the store raises; the old one stays then,
    but for a failure between the two steps of a replacement, after which it has to be added again."""
    repo = session.repository
    name = inventory.name
    old = _ref(session, name)
    if old is not None and not replace:
        raise AlreadyExists(url=repo.url, name=f"target {name}", hint="--replace puts the new one in its place")
    text = json.dumps({"version": 1, "inventory": hardware.dump(inventory), "definition": definition}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=session.home.path / "run") as file:
        file.write(text)
        file.flush()
        if old is not None:
            repo.delete_blob(old)
        repo.put_blob(_KIND, name, Path(file.name))
    return find(session, name)


def listing(session: Session) -> list[Target]:
    """By name."""
    return [_load(session, ref) for ref in session.repository.blobs(_KIND)]


def find(session: Session, name: str) -> Target:
    """Raises NoSuchTarget; BadInventory when what is kept under the name makes no sense."""
    if (ref := _ref(session, name)) is None:
        raise NoSuchTarget(target=name)
    return _load(session, ref)


def remove(session: Session, name: str) -> None:
    """Raises NoSuchTarget."""
    if (ref := _ref(session, name)) is None:
        raise NoSuchTarget(target=name)
    session.repository.delete_blob(ref)


def _ref(session: Session, name: str) -> BlobRef | None:
    return next((ref for ref in session.repository.blobs(_KIND) if ref.name == name), None)


def _load(session: Session, ref: BlobRef) -> Target:
    try:
        kept = json.loads(session.repository.read_blob(ref))
        return Target(hardware.load(kept["inventory"], target=ref.name), str(kept["definition"]), ref.modified)
    except ObjectNotFound:
        raise NoSuchTarget(target=ref.name) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInventory(target=ref.name, field="blob", reason=f"it cannot be read: {error!r}") from error
