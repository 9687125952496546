"""The protection record of a domain: what is protected, how often, and where capture stands.

    HOME/domains/UUID.json

Where capture stands is, for each disk, the *generation*: our recording bitmap is called `rw-ID-GENERATION`, and a new
one begins at every epoch's freeze. The bitmaps of the record's generation and of later ones name together everything
that was written since `last_point`. So an image that was put back from somewhere is found out by its bitmap's name,
and a crash at any instant leaves a union that is too large, never too small.

`pending` is a point about to be committed: if it turns out to exist, `settled` takes it over.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import Home, write_json
from appliance.errors import ConfigError, NoSuchPoint, NotProtected
from appliance.model import Timeline

if TYPE_CHECKING:
    from appliance.hypervisor.base import Domain
    from appliance.store import Repository

__all__ = [
    "DiskState", "Pending", "Protection", "all_records", "load", "new", "path_of", "remove", "require", "save",
    "settled",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DiskState:
    """Capture of one disk as of the last point: generation, identities of its images from the top down, and what the
    image looked like when the point was taken of a domain that was shut off (empty otherwise)."""

    generation: int
    chain: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    offline: str = ""


@dataclass(frozen=True, slots=True)
class Pending:
    """A point that is being committed and what the record says once it exists."""

    point: str
    disks: Mapping[str, DiskState]


@dataclass(frozen=True, slots=True)
class Protection:
    """`every` is seconds, or None: points are taken by hand. `last_point` is what the next increment is relative to;
    `parent` is what the next point says it comes from, where that is another one (the target of a revert). `state` is
    kept by target. With `continuous` every write is recorded as well, as long as that adds no more than
    `max_added_latency` seconds to a write (None: whatever it adds). `verify_every` is seconds, or None: points are
    booted as a test by hand."""

    domain: str
    uuid: str
    uri: str
    disks: tuple[str, ...]
    id: str
    timeline: str
    every: int | None = None
    quiesce: str = "auto"
    last_point: str | None = None
    parent: str | None = None
    state: Mapping[str, DiskState] = field(default_factory=dict)
    pending: Pending | None = None
    continuous: bool = False
    max_added_latency: float | None = None
    verify_every: int | None = None

    @property
    def prefix(self) -> str:
        """What the names of our bitmaps begin with."""
        return f"rw-{self.id}-"

    def moved_to(self, timeline: str, parent: str) -> Protection:
        """After a revert: history goes on in a new timeline from `parent`. The bitmaps go on relative to
        `last_point`: what the revert wrote is in them."""
        return replace(self, timeline=timeline, parent=parent)


def path_of(home: Home, uuid: str) -> Path:
    return home.domains / f"{uuid}.json"


def new(
    repo: Repository, domain: Domain, disks: tuple[str, ...], *, every: int | None = None, quiesce: str = "auto"
) -> Protection:
    """A record for a domain that is not protected yet, on a new timeline. It is not saved. Earlier points of the same
    domain stay what they are; nothing that they hold is stored again."""
    timeline = Timeline(id=secrets.token_hex(8), domain_uuid=domain.uuid, created=datetime.now(UTC))
    repo.put_timeline(timeline)
    return Protection(
        domain=domain.name, uuid=domain.uuid, uri=domain.uri, disks=disks, id=secrets.token_hex(4),
        timeline=timeline.id, every=every, quiesce=quiesce,
    )  # fmt: skip


def load(home: Home, uuid: str) -> Protection | None:
    """Raises ConfigError when the file is there and cannot be understood."""
    path = path_of(home, uuid)
    try:
        return _from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot read the protection record {path}: {error!r}"
        raise ConfigError(reason=reason, hint="take it away and protect the domain again") from error


def require(home: Home, uuid: str, name: str) -> Protection:
    """As `load`. Raises NotProtected when there is none."""
    record = load(home, uuid)
    if record is None:
        raise NotProtected(domain=name)
    return record


def all_records(home: Home) -> list[Protection]:
    """Of every protected domain, by name."""
    found = [load(home, path.stem) for path in home.domains.glob("*.json")]
    return sorted((one for one in found if one is not None), key=lambda one: one.domain)


def save(home: Home, record: Protection) -> None:
    """Durable when it returns."""
    write_json(path_of(home, record.uuid), asdict(record))


def remove(home: Home, uuid: str) -> None:
    path_of(home, uuid).unlink(missing_ok=True)


def settled(home: Home, record: Protection, repo: Repository) -> Protection:
    """The record after a crash between the commit of a point and its own update: the point that exists counts."""
    if record.pending is None:
        return record
    try:
        repo.point(record.pending.point)
    except NoSuchPoint:
        found = replace(record, pending=None)
    else:
        found = replace(record, last_point=record.pending.point, parent=None, state=record.pending.disks, pending=None)
    save(home, found)
    return found


def _from_json(values: dict[str, Any]) -> Protection:
    pending = values.pop("pending", None)
    return Protection(
        **{
            **values,
            "disks": tuple(values["disks"]),
            "state": _states(values.get("state", {})),
            "pending": None if pending is None else Pending(pending["point"], _states(pending["disks"])),
        }
    )


def _states(values: dict[str, Any]) -> dict[str, DiskState]:
    return {name: DiskState(**{**one, "chain": tuple(one["chain"])}) for name, one in values.items()}
