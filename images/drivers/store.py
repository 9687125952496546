"""The driver store: kernel modules that a client's own disk does not have, each for exactly one kernel release.

    ROOT/RELEASE/NAME-DIGEST/drivers.json    what it is, and what each module says about itself
                             modules/…       the files, below paths as in /lib/modules/RELEASE

A module is for the release that its own `vermagic` names; a path or a caller that says otherwise makes the whole of it
refused. Tables are computed from what the modules say (`depends`, `alias`, `softdep`) and not by depmod, which would
not know the client's modules that they depend on.

An entry is written beside and renamed: it is there whole or not at all, and adding the same again changes nothing. Any
number of processes may add and read at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ImageError
from images.drivers.glob import Index
from images.drivers.modinfo import ModInfo, read
from images.drivers.sources import DriversRefused, modules_in
from images.drivers.tables import Module, Soft, Tables, module_name, plain_path

__all__ = ["DriverStore", "Drivers", "DriversRefused", "NoSuchDrivers"]

_INSIDE = re.compile(r".*(?:^|/)lib/modules/([^/]+)/(.+)", re.DOTALL)
_TREE = re.compile(r"(?:^|.*/)((?:kernel|updates|extra|weak-updates)/.+)")
_RECORD = "drivers.json"


class NoSuchDrivers(ImageError):
    template = "the driver store has no {name!r}"
    default_hint = "`rewind image drivers list` lists what it has"


@dataclass(frozen=True, slots=True)
class Drivers:
    """One entry. `name` is of the file or folder that it came from, and the first letters of its digest; `digest` is
    SHA-256 over paths and contents; `size` in bytes."""

    name: str
    release: str
    digest: str
    modules: int
    size: int


class DriverStore:
    """The store in one folder, which is made when something is added. Any thread may use it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, path: Path, *, release: str = "") -> Drivers:
        """Take the modules of a folder, a `.deb`, an `.rpm` or one `.ko` file; the entry, also when it was there.

        Raises DriversRefused, and the store is as before: no modules in it, modules of several releases or of another
        than `release`, one that says another release than its path (vermagic), a path that leads out, damage; and
        GuestUnreadable for a file that is no module.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
        try:
            records = {}
            for name, data in modules_in(path):
                where, record = _taken(path, name, data, release)
                if where in records:
                    raise DriversRefused(path=str(path), reason=f"it has two modules for {where}")
                records[where] = record
                file = scratch / "modules" / where
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            return self._keep(path, scratch, records)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def list(self, release: str = "") -> tuple[Drivers, ...]:
        """All entries, or those for one kernel release, by release and name."""
        return tuple(_drivers(document) for _, document in self._entries(release))

    def remove(self, name: str) -> None:
        """Raises NoSuchDrivers. Plans that were made with it can no longer be built."""
        for folder, document in self._entries():
            if document["name"] == name:
                # Not seen any more before it is half gone.
                gone = Path(tempfile.mkdtemp(prefix=".old-", dir=self._root))
                os.rename(folder, gone / "entry")
                shutil.rmtree(gone, ignore_errors=True)
                with contextlib.suppress(OSError):  # others are left for this release
                    folder.parent.rmdir()
                return
        raise NoSuchDrivers(name=name)

    def tables(self, release: str) -> tuple[Tables, ...]:
        """What it has for exactly this release, for `make_plan`."""
        return tuple(_tables(document) for _, document in self._entries(release))

    def read(self, release: str, origin: str, path: str) -> bytes:
        """The file of a decision that is IN and whose `origin` is not `client`, as it was added (maybe compressed).
        Raises NoSuchDrivers; DriversRefused when it is not the file that was added."""
        for folder, document in self._entries(release):
            if document["name"] == origin and path in document["modules"]:
                data = (folder / "modules" / path).read_bytes()
                if hashlib.sha256(data).hexdigest() != document["modules"][path]["sha256"]:
                    raise DriversRefused(path=origin, reason=f"{path} was changed after it was added")
                return data
        raise NoSuchDrivers(name=f"{origin}: {path}")

    def _keep(self, path: Path, scratch: Path, records: dict[str, dict[str, Any]]) -> Drivers:
        releases = sorted({record["vermagic"].split(" ")[0] for record in records.values()})
        if not records:
            raise DriversRefused(path=str(path), reason="there are no kernel modules (.ko) in it")
        if len(releases) > 1:
            raise DriversRefused(path=str(path), reason=f"it has modules of several kernels: {', '.join(releases)}")
        lines = "".join(f"{where} {records[where]['sha256']}\n" for where in sorted(records))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        origin = re.sub(r"[^A-Za-z0-9._+~-]", "_", path.resolve().name).lstrip(".")[:80] or "drivers"
        size = sum(record["size"] for record in records.values())
        name = f"{origin}-{digest[:12]}"
        document = {"version": 1, "name": name, "release": releases[0], "digest": digest, "size": size}
        (scratch / _RECORD).write_text(json.dumps({**document, "modules": dict(sorted(records.items()))}))
        self._put(scratch, self._root / releases[0] / name)
        return Drivers(name, releases[0], digest, len(records), size)

    def _put(self, scratch: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            return
        scratch.chmod(0o755)
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.exists():  # somebody who added the same at this moment was first otherwise
                raise

    def _entries(self, release: str = "") -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """(folder, its record). What a killed `add` left behind begins with a dot."""
        if release.startswith(".") or "/" in release or not self._root.is_dir():
            return
        releases = [release] if release else sorted(os.listdir(self._root))
        for one in releases:
            if one.startswith("."):
                continue
            for record in sorted((self._root / one).glob(f"[!.]*/{_RECORD}")):
                with contextlib.suppress(FileNotFoundError):  # removed at this moment
                    yield record.parent, json.loads(record.read_text())


def _taken(path: Path, name: str, data: bytes, release: str) -> tuple[str, dict[str, Any]]:
    """Where a module goes below its release's folder, and what it says about itself."""
    if ".." in name.split("/"):
        raise DriversRefused(path=str(path), reason=f"{name!r} leads out of it")
    inside, tree = _INSIDE.fullmatch(name), _TREE.fullmatch(name)
    where = inside[2] if inside else tree[1] if tree else f"extra/{name.rpartition('/')[2]}"
    if not plain_path(where):
        raise DriversRefused(path=str(path), reason=f"{name!r} is no usable path of a module")
    info = read(name, data)
    for said, what in ((inside[1] if inside else "", "lies in the folder of"), (release, "was asked for")):
        if said and info.release != said:
            reason = f"{name} is for kernel {info.release} by its vermagic, and {what} {said}"
            raise DriversRefused(path=str(path), reason=reason, hint="a kernel takes modules of its own release only")
    return where, _record(info, data)


def _record(info: ModInfo, data: bytes) -> dict[str, Any]:
    words = asdict(info)
    del words["release"]
    return {**words, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _drivers(document: Mapping[str, Any]) -> Drivers:
    modules = len(document["modules"])
    return Drivers(document["name"], document["release"], document["digest"], modules, document["size"])


def _tables(document: Mapping[str, Any]) -> Tables:
    """Only modules whose vermagic is the entry's release: the record may have been edited."""
    release, origin = document["release"], document["name"]
    usable = {
        path: record
        for path, record in document["modules"].items()
        if record["vermagic"].split(" ")[0] == release and plain_path(path)
    }
    modules, soft = {}, {}
    # A module's name is its file's, as for depmod. Of two the later counts: `updates` comes behind `kernel`.
    for path, record in usable.items():
        name = module_name(path)
        modules[name] = Module(name, path, tuple(record["depends"]), origin, record["signed"])
        soft[name] = Soft(tuple(record["soft"]["before"]), tuple(record["soft"]["behind"]))
    pairs = ((alias, module_name(path)) for path, record in usable.items() for alias in record["aliases"])
    index = Index(pairs, f"the aliases of {origin} in the driver store")
    return Tables(release, modules, frozenset(), {k: v for k, v in soft.items() if v != Soft()}, (index,))
