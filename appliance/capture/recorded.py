"""One point of a domain that is captured continuously, as far as its tap and its journal are concerned.

    connected          look    whether all of the point's disks are recorded, by our tap
    in the pause       mark    the number of the last write: the point's place in the journal
    when it exists     tell    the ledger counts what comes later from it

Without a tap of ours all of this does nothing, and under one that records other disks as well. The point itself is the
same with and without: it is of the freeze, by a copy-before-write below whatever tap there is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from appliance.capture import tap
from appliance.config import Home
from appliance.errors import JournalError, RewindError
from appliance.hypervisor.base import Disk, Domain, Monitor
from appliance.hypervisor.graph import tap as graph
from appliance.model import Point

__all__ = ["BEFORE_REVERT", "Recorded"]

_log = logging.getLogger(__name__)

# Reason of the point that a revert takes first.
BEFORE_REVERT: Final = "before-revert"
# In the pause: a journal that needs longer to answer is one that the watchdog is about to kill.
_POSITION = 0.2


class Recorded:
    """Lives for one point, used by one thread. `journal` and `sequence` say where the point stands, "" and None
    without a tap."""

    def __init__(self, home: Home, domain: Domain) -> None:
        self._home = home
        self._domain = domain
        self._running: tap.Running | None = None
        self.journal = ""
        self.sequence: int | None = None

    def look(self, monitor: Monitor, disks: Sequence[Disk]) -> None:
        """Before the pause; nobody else changes the graph meanwhile."""
        running = None if monitor.storage_daemon else tap.current(self._home, self._domain.uuid)
        if running is None or not running.attached or set(running.disks) != {disk.target for disk in disks}:
            return
        whole = all(one is graph.TapState.RUNNING for one in graph.state(monitor, disks).values())
        if whole and tap.ours(monitor, Path(running.control_socket).parent, disks):
            self._running = running

    def mark(self, monitor: Monitor, disks: Sequence[Disk]) -> None:
        """In a pause, when every write of the guest is in the journal: note the number of the last one. A tap that has
        ended meanwhile gives the point no place; it is none the worse."""
        if self._running is None or not graph.recording(monitor, disks):
            return
        try:
            self.journal, self.sequence = self._running.position(_POSITION)
        except JournalError as error:
            _log.warning("%s: the point has no place in the journal: %s", self._domain.name, error)

    def tell(self, point: Point) -> None:
        """The ledger learns of a point that exists: what that says must be true. One that it does not know is one to
        count from less."""
        if point.sequence is None:
            return
        ledger = tap.ledger_of(self._home, self._domain.uuid)
        try:
            ledger.based(point.journal, point.sequence, point.time, point.id)
        except (RewindError, OSError) as error:
            _log.warning("%s: nothing counts from point %s: %s", self._domain.name, point.id, error)
