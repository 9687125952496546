"""The pauses of one point, told to the guard: who dies in one leaves a guest that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from appliance.capture.watch import Watched
from appliance.errors import DomainLost
from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph import base
from appliance.hypervisor.guard import Guard

__all__ = ["Pauses"]


class Pauses:
    """`seconds` is how long the guest stood still in all, `stopped` whether it does now, because of us."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self.seconds = 0.0
        self.stopped = False

    @contextmanager
    def pause(self, watched: Watched, disks: Sequence[Disk]) -> Iterator[None]:
        """Every command in here is time that the guest stands still: what can be made before and removed after, is."""
        for disk in disks:
            base.make_hole(watched, disk)
        pause: base.Pause | None = None
        try:
            with base.paused(watched, before=self._note_pause) as pause:
                yield
        finally:
            if pause is not None and pause.restored:
                # Also after an error: a guard that still thought so would take the lock and refuse whoever comes next.
                self._note_resumed()
            with suppress(DomainLost):
                for disk in disks:
                    base.fill_hole(watched, disk)
        self.seconds += pause.seconds

    def _note_pause(self, running: bool) -> None:
        self.stopped = running
        self._guard.pausing(running)

    def _note_resumed(self) -> None:
        self.stopped = False
        self._guard.resumed()
