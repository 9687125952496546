"""How a revert ended, or stands: what is told about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from shlex import quote

from appliance.errors import NothingToResume
from appliance.restore.intent import Intent

__all__ = ["Result", "come_of", "result_of"]


@dataclass(frozen=True, slots=True)
class Result:
    """How a revert ended. `state`: `done`; `pending` (it goes on in the background); `rolled-back`; `given-up` (it had
    not begun). `moved_bytes` were read from the repository for the disks."""

    domain: str
    uuid: str
    verb: str
    point: str
    safety_point: str | None
    timeline: str | None
    mode: str
    state: str
    changed_bytes: int
    moved_bytes: int
    pause_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()


def result_of(intent: Intent) -> Result:
    """What is to be told about a revert, ended or not."""
    given_up = not intent.safety_point
    if intent.ended:
        ending = "given-up" if given_up else "rolled-back" if intent.rolling_back else "done"
    else:
        ending = "pending"
    mode = "offline" if intent.was == "shutoff" else "instant" if intent.instant else "plain"
    end = float(intent.extra.get("ended") or time.time())
    return Result(
        domain=intent.domain, uuid=intent.uuid, verb=intent.verb, point=intent.point,
        safety_point=intent.safety_point or None,
        timeline=None if given_up or intent.rolling_back else intent.timeline, mode=mode, state=ending,
        changed_bytes=sum(disk.pending_bytes + disk.zero_bytes for disk in intent.disks),
        moved_bytes=intent.moved_bytes, pause_seconds=intent.pause_seconds, seconds=end - intent.started,
        notes=intent.notes,
    )  # fmt: skip


def come_of(meant: Intent | None, found: Intent | None, roll_back: bool) -> Result | None:
    """What came of the revert that was under way; None when it still is, or was given up: that has left its place to
    the revert before it. Raises NothingToResume when it was too late to roll it back."""
    if meant is None or meant.ended or found is None:
        return None
    if roll_back and found.id != meant.id and not found.ended:
        hint = f"another one to {found.point} is under way now: `rewind status {quote(found.domain)}` shows it"
        raise NothingToResume(domain=found.domain, hint=hint)
    if found.id != meant.id or not found.ended:
        return None
    if roll_back and not found.rolling_back:
        hint = f"it ended before it could be rolled back: `rewind undo {quote(found.domain)}` leads back"
        raise NothingToResume(domain=found.domain, hint=hint)
    return result_of(found)
