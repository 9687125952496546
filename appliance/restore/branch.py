"""What a revert means for continuous capture: the ledger is told where its journal changes from one history to another.

    … records ≤ S ──── safety point            the tap never stops: what the guest writes after the revert is recorded
                 └──── target ── records > S   in the same journal, and is to be counted from the target

Below the tap nothing is recorded, so nothing of the revert itself is in the journal. All of this happens between the
switch and the moment at which the guest goes on. What the ledger cannot be told must not be claimed: the journal is
killed then, before anything else can get into it, and capture begins anew with a gap.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from appliance.capture import protection, tap
from appliance.errors import JournalError, RewindError

if TYPE_CHECKING:
    from appliance.config import Home
    from appliance.restore.intent import Intent

__all__ = ["back", "forth"]

_log = logging.getLogger(__name__)


def forth(home: Home, intent: Intent) -> None:
    """The devices are on the target: the history branches where the safety point is. May be repeated."""
    place = intent.extra.get("place")
    if place is None:
        # It may run all the same, and only not have answered when the safety point was taken.
        tap.cut(home, intent.uuid)
        return
    _tell(home, intent, str(place[0]), int(place[1]), intent.point, intent.timeline)


def back(home: Home, intent: Intent) -> None:
    """The devices are on the safety point again and what was written since is dropped. The guest stands still."""
    if intent.extra.get("place") is None:
        return
    try:
        running = tap.current(home, intent.uuid)
        if running is None or not running.attached:
            return
        journal, sequence = running.position()
    except JournalError as error:
        _log.warning("%s: capture begins anew after the roll-back: %s", intent.domain, error)
        tap.cut(home, intent.uuid)
        return
    record = protection.load(home, intent.uuid)
    _tell(home, intent, journal, sequence, intent.safety_point, record.timeline if record else intent.timeline)


def _tell(home: Home, intent: Intent, journal: str, sequence: int, point: str, timeline: str) -> None:
    now = datetime.now(UTC)
    try:
        ledger = tap.ledger_of(home, intent.uuid)
        if intent.whole and _moved_all(home, intent):
            ledger.branch(journal, sequence, now, point, timeline)
        else:
            # The other disks did not move: there is no point that all of them are at now. The time is that of the last
            # look: a revert that is resumed gets here long after its switch.
            disks = ", ".join(disk.target for disk in intent.disks)
            ledger.ended(journal, sequence, None, f"a revert of {disks} alone")
    except (RewindError, OSError) as error:
        _log.warning("%s: capture begins anew after the revert: %s", intent.domain, error)
        tap.cut(home, intent.uuid)


def _moved_all(home: Home, intent: Intent) -> bool:
    """Whether every disk that is recorded went along: one that came after the point was taken stays as it is."""
    running = tap.current(home, intent.uuid)
    return running is None or set(running.disks) <= {disk.target for disk in intent.disks}
