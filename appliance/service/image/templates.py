"""Templates of bootable images: made before any request, kept in the repository, unpacked in this home's cache."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from appliance.errors import NoSuchTemplate
from appliance.scratch import scratch_folder
from appliance.service.image.shelf import Package, Shelf
from appliance.service.session import Session
from images.template import build, pack
from images.template.build import Manifest, Template

__all__ = ["Kept", "listing", "make", "opened", "remove"]

_KIND = "templates"


@dataclass(frozen=True, slots=True)
class Kept:
    """`release` of the default kernel; `packages` are what it was made of, with their versions."""

    id: str
    created: datetime
    release: str
    packages: dict[str, str]
    stored_bytes: int


def make(session: Session, kernel: str | Path = build.DEFAULT_KERNEL) -> Kept:
    """Make one and keep it. `kernel` as in `build_template`. Raises ImageError, ToolFailed, and what the store raises;
    nothing is kept then. One that has the same content as an older one is that one."""
    folder = session.home.cache / _KIND
    with scratch_folder(folder, ".make-") as scratch:
        made = build.build_template(scratch / "template", kernel=kernel)
        if (known := _find(session, made.id)) is not None:
            return known
        file = scratch / "file"
        pack.pack(made, file)
        Shelf(session, _KIND).put(made.id, made.manifest.model_dump(mode="json"), file)
        where = folder / made.id
        if not where.exists():
            made.folder.rename(where)
    kept = _find(session, made.id)
    assert kept is not None, "it has just been put"
    return kept


def listing(session: Session) -> list[Kept]:
    """The oldest first."""
    return sorted(map(_kept, Shelf(session, _KIND).packages()), key=lambda one: one.created)


def opened(session: Session, name: str = "") -> Template:
    """The template of that id, or enough of its beginning; the newest without a name. Raises NoSuchTemplate."""
    fitting = [one for one in listing(session) if one.id.startswith(name)]
    if not fitting or (name and len(fitting) > 1):
        raise NoSuchTemplate(template_name=name, called=repr(name) if name else "in this repository yet")
    chosen = fitting[-1].id
    where = session.home.cache / _KIND / chosen
    return build.load_template(Shelf(session, _KIND).have(chosen, where, pack.unpack))


def remove(session: Session, name: str) -> None:
    """Raises NoSuchTemplate. Images that were made from it go on working."""
    if _find(session, name) is None:
        raise NoSuchTemplate(template_name=name, called=repr(name))
    Shelf(session, _KIND).remove(name)


def _find(session: Session, name: str) -> Kept | None:
    return next((one for one in listing(session) if one.id == name), None)


def _kept(package: Package) -> Kept:
    manifest = Manifest.model_validate(package.document)
    created = datetime.fromtimestamp(manifest.created, UTC)
    return Kept(manifest.id, created, manifest.release, manifest.packages, package.stored_bytes)
