"""The reader for guests that the fast one does not know (xfs, btrfs, LUKS, md): libguestfs' appliance of this host.

Made of this host's packages and only of use with them, so it is in the cache of this home and not in the repository. It
is made when somebody asks for it and proved by starting it; a point's reading never makes it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from appliance.errors import ConfigError
from appliance.process import run
from appliance.scratch import scratch_folder
from appliance.service.session import Session
from images.guest import appliance
from images.guest.grub import version_key
from images.template import apt

__all__ = ["Kept", "folder", "make", "newer_kernel", "remove", "shown"]


@dataclass(frozen=True, slots=True)
class Kept:
    """`kernel` is the release of its own kernel, `qemu` what it was made for, `size` in bytes on the disk. `unfit`: why
    it is refused, empty when it is not."""

    path: Path
    created: datetime
    kernel: str
    qemu: str
    size: int
    unfit: str


def folder(session: Session) -> Path:
    """Where it is, or would be."""
    return session.home.cache / "reader"


@contextmanager
def scratch(session: Session) -> Iterator[Path]:
    """A folder for the sockets of one reading, which goes with it."""
    where = session.home.path / "run"
    with tempfile.TemporaryDirectory(prefix="guest-", dir=where, ignore_cleanup_errors=True) as made:
        yield Path(made)


def make(session: Session, kernel: str | Path | None = None) -> Kept:
    """Make it and start it once, in the place of the one that is there. `kernel`: a Debian package by name or a .deb
    file; None: this host's newest. Raises ConfigError, ImageError, ToolFailed, GuestUnreadable (it does not start):
    what was there stays then."""
    where = folder(session)
    where.mkdir(parents=True, exist_ok=True, mode=0o700)

    def check(made: Path) -> None:
        appliance.prove(made, session.home.path / "run", session.settings.accelerator)

    with scratch_folder(where, ".kernel-") as scratch:
        chosen = (None, None) if kernel is None else _unpacked(kernel, scratch)
        return _kept(appliance.build_appliance(where, kernel=chosen[0], modules=chosen[1], check=check))


def shown(session: Session) -> Kept | None:
    """The one that is there, also one that is refused."""
    found = appliance.kept(folder(session))
    return _kept(found) if found else None


def remove(session: Session) -> None:
    """No error when there is none. Raises ConfigError while a reader uses it."""
    if not appliance.remove(folder(session)):
        raise ConfigError(reason="a guest is being read with it", hint="wait for the end of the other `rewind image`")


def newer_kernel(kept: Kept) -> str:
    """The release of a newer kernel that this host has; empty when there is none."""
    try:
        release = appliance.host_kernel()[1].name
    except ConfigError:
        return ""
    return release if version_key(release) > version_key(kept.kernel) else ""


def _unpacked(kernel: str | Path, scratch: Path) -> tuple[Path, Path]:
    if isinstance(kernel, Path):
        archive = kernel
    else:
        # `linux-image-6.1.0-50-amd64` is a kernel; `linux-image-amd64` only names one.
        name = kernel if re.match(r"linux-image-\d", kernel) else apt.meant_by(kernel)
        (archive,) = apt.download([name], scratch / "package")
    apt.unpack(archive, scratch / "root")
    found, modules = appliance.host_kernel(scratch / "root")
    # A package has no tables of its modules before it is installed.
    place = scratch / "tables/lib/modules" / modules.name
    place.parent.mkdir(parents=True)
    modules.rename(place)
    run(["depmod", "-b", scratch / "tables", modules.name])
    return found, place


def _kept(one: appliance.Appliance) -> Kept:
    told = one.manifest
    created = datetime.fromtimestamp(told.created, UTC)
    return Kept(one.folder, created, told.kernel, told.qemu, one.size, one.unfit)
