"""What a revert is about to do, written down before it does it: the one thing that `resume` has to believe.

    PLANNED ──► FENCED ──► SWITCHED ──► MERGING ──► PIVOTING ──► PIVOTED ──► DONE
       │           │           │           ▲   from here on there is no way back: D holds what the guest wrote
       │           │           └──► ROLLING_BACK
       └───────────┴──► given up: nothing had happened

Each phase is durable *before* the step that it names begins, so what is on disk is at most one step behind what was
announced, and every step may be repeated:

    PLANNED       the fence is put up; patches are being made, the guest may be stopped
    FENCED        the patches are final; the stopped guest's devices may have been switched
    SWITCHED      the guest's devices are on the chain, D is written by the hydration
    MERGING       D is written with the guest's own blocks too
    PIVOTING      the guest is stopped and its devices go back to D; it goes on after PIVOTED only, so that its overlay
                  is never merged over newer writes
    ROLLING_BACK  the view now shows the safety point

The file is HOME/reverts/UUID/intent.json; until a revert has been switched, last.json holds the intent of the one
before. The folder also holds the patches, the overlays, the keeper's files, and the lock of whoever drives the revert.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from appliance.config import Home, write_json
from appliance.errors import RestoreError, RevertUnderWay
from appliance.model import MapRef

__all__ = [
    "Course", "DiskIntent", "Intent", "Phase", "discard", "drive_lock", "driven", "load", "pending",
    "refuse_if_under_way", "save", "set_aside", "tidy", "undo_point",
]  # fmt: skip

FORMAT = 1
_FILES = ("patch-", "overlay-", "pending-", "nvram-", "tpm-")


class Phase(Enum):
    PLANNED = "planned"
    FENCED = "fenced"
    SWITCHED = "switched"
    MERGING = "merging"
    PIVOTING = "pivoting"
    PIVOTED = "pivoted"
    ROLLING_BACK = "rolling-back"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class DiskIntent:
    """One disk: where it lies, the maps of the wanted instant and of the safety point, the two files of ours, and in a
    running QEMU its own node and its device."""

    target: str
    source: str
    format: str
    size: int
    wanted: MapRef
    safety: MapRef
    patch: str
    overlay: str
    node: str = ""
    device: str = ""
    pending_bytes: int = 0
    zero_bytes: int = 0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class Intent:
    """The whole revert. `was` is the domain's state before (`running`, `paused`, `shutoff`); `repository` is how our
    children open it, `owner` (uid, gid) who must be able to use the view's socket, `whole` whether all disks are
    reverted. Times are seconds since the epoch, rates bytes a second.

    `extra` holds what the driver notes on the way: `go_on` (the guest is stopped by us and has to go on when it may),
    `turned` (there if it is rolled back, true once the devices are on the safety point), `qemu` (the process), `place`
    (journal and number of the safety point, where writes are recorded) and `branched` (the ledger knows)."""

    id: str
    domain: str
    uuid: str
    uri: str
    verb: str
    point: str
    safety_point: str
    timeline: str
    instant: bool
    was: str
    rate: int
    started: float
    repository: str
    phase: Phase = Phase.PLANNED
    disks: tuple[DiskIntent, ...] = ()
    owner: tuple[int, int] | None = None
    whole: bool = True
    pause_seconds: float = 0.0
    moved_bytes: int = 0
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def at(self, phase: Phase, **changes: Any) -> Intent:
        """The same revert one phase on."""
        return replace(self, phase=phase, **changes)

    @property
    def ended(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def rolling_back(self) -> bool:
        """The view shows the safety point."""
        return "turned" in self.extra

    @property
    def may_roll_back(self) -> bool:
        """The patch covers every block of D that was written: only until the guest's own blocks are merged."""
        return self.phase in (Phase.FENCED, Phase.SWITCHED, Phase.ROLLING_BACK)


def _file(folder: Path) -> Path:
    return folder / "intent.json"


def save(home: Home, intent: Intent) -> Intent:
    """Make it durable, replacing what was there; it is returned for the next step."""
    folder = home.revert(intent.uuid)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    value = asdict(intent)
    value["format"] = FORMAT
    value["phase"] = intent.phase.value
    for disk in value["disks"]:
        for name in ("wanted", "safety"):
            disk[name]["root"] = disk[name]["root"].hex()
    write_json(_file(folder), value)
    return intent


def load(home: Home, uuid: str) -> Intent | None:
    """The revert of that domain, ended or not; None if there is none. Raises RestoreError if it cannot be read."""
    path = _file(home.revert(uuid))
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RestoreError(reason=f"cannot read {path}: {error}") from error
    try:
        if value.pop("format", None) != FORMAT:
            raise RestoreError(
                reason=f"{path} was written by another version of rewind", hint="resume with that version"
            )
        return _decoded(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON, and no intent
        raise RestoreError(reason=f"cannot read {path}: {error!r}") from error


def _decoded(value: dict[str, Any]) -> Intent:
    value["phase"] = Phase(value["phase"])
    value["notes"] = tuple(value["notes"])
    value["owner"] = tuple(value["owner"]) if value["owner"] else None
    value["disks"] = tuple(_disk(disk) for disk in value["disks"])
    return Intent(**value)


def _disk(value: dict[str, Any]) -> DiskIntent:
    for name in ("wanted", "safety"):
        ref = value[name]
        value[name] = MapRef(bytes.fromhex(ref["root"]), ref["size"], ref["place"])
    return DiskIntent(**value)


class Course:
    """The intent of a revert while somebody drives it: the newest, written down with every step."""

    def __init__(self, home: Home, intent: Intent) -> None:
        self._home, self.intent = home, intent

    def save(self, phase: Phase, **facts: object) -> None:
        """Announce the phase, with what is to be known in it."""
        extra = {**self.intent.extra, **facts}
        self.intent = save(self._home, self.intent.at(phase, extra=extra))

    def note(self, text: str) -> None:
        """What the result has to tell, once; durable with the next phase."""
        if text not in self.intent.notes:
            self.intent = replace(self.intent, notes=(*self.intent.notes, text))


def pending(home: Home) -> list[Intent]:
    """Every revert of this home that has not ended."""
    folder = home.path / "reverts"
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    found = [load(home, name) for name in names]
    return [intent for intent in found if intent is not None and not intent.ended]


def undo_point(home: Home, uuid: str) -> str | None:
    """The point that an undo of the last revert goes to; None when there is no revert that could be undone now."""
    last = load(home, uuid)
    return last.safety_point or None if last is not None and last.ended and not last.rolling_back else None


def refuse_if_under_way(home: Home, uuid: str, domain: str) -> None:
    """Raises RevertUnderWay while a revert of the domain has not ended: its disk alone holds no instant then, and a
    point taken of it would be a lie."""
    intent = load(home, uuid)
    if intent is not None and not intent.ended:
        raise RevertUnderWay(domain=domain, point=intent.point)


def _last(folder: Path) -> Path:
    return folder / "last.json"


def set_aside(home: Home, uuid: str) -> None:
    """Before a new revert: keep the intent of the last one, which has ended, until the new one has begun. `discard`
    brings it back, so that an attempt that failed does not lose its `undo`."""
    folder = home.revert(uuid)
    _last(folder).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.link(_file(folder), _last(folder))


def discard(home: Home, uuid: str) -> None:
    """Take the patches, overlays and the intent away, as nothing had happened yet; the intent of the revert before
    takes its place. The intent goes last, so that a crash in the middle leaves a revert that can be discarded again."""
    tidy(home, uuid)
    folder = home.revert(uuid)
    try:
        _last(folder).replace(_file(folder))
    except FileNotFoundError:
        _file(folder).unlink(missing_ok=True)


def tidy(home: Home, uuid: str) -> None:
    """Take the files of a revert away that has ended; its intent stays, for `undo`. The keeper's own files stay too:
    it may still be ending."""
    folder = home.revert(uuid)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(_FILES) or entry.name in ("fence", "release"):
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def drive_lock(home: Home, uuid: str) -> Iterator[bool]:
    """Yields whether we are the one who drives this revert now. The kernel takes the lock from a driver that dies, so
    whoever else waits for it (the keeper, `resume`) goes on from the intent."""
    folder = home.revert(uuid)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def driven(home: Home, uuid: str) -> bool:
    """Whether somebody drives the revert now."""
    with drive_lock(home, uuid) as free:
        return not free
