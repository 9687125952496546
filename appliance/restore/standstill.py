"""A guest that stands still because the view of its disks did not answer, and goes on when it does.

A view that is replaced, or that is away for as long as nobody resumes what served it, must be a pause for the guest
and not a read error. QEMU has a time for that (`reconnect-delay`), which libvirt 9.0 does not hand on: there each
request that meets a dead view fails at once. So the disks have the error policy `stop`: QEMU pauses the guest, keeps
the request, and makes it again when the guest goes on (`rerror=stop`, qemu(1)), for which it connects anew. What is
done here is to have it go on.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from appliance.errors import HypervisorError, Locked
from appliance.hypervisor import hostlock
from appliance.hypervisor.base import Domain, Pulls

__all__ = ["Standstill"]

# A guest whose own disk fails, or whose point is damaged just there, is stopped again at once.
_AGAIN, _AGAIN_AT_MOST = 2.0, 60.0
# So often in a row, and somebody has to look.
_OFTEN = 5

_log = logging.getLogger(__name__)


class Standstill:
    """Of one domain; for one thread. `trying`: it stands still and may go on by what is done here."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._next, self._tries = 0.0, 0
        self.trying = False

    def end(self, domain: Domain) -> str:
        """To be called again and again while the view answers, or is not needed. Why the guest stands still, empty when
        it does not. Nothing is done about a pause that somebody asked for before, nor where QEMU found no space: that
        is for whoever makes room. Raises HypervisorError."""
        self.trying = False
        if not isinstance(domain, Pulls) or not domain.stopped_by_error():
            self._tries = 0
            return ""
        if any(one.get("io-status") == "nospace" for one in domain.monitor().execute("query-block")):
            return "the guest stands still: there was no space for a write"
        if time.monotonic() >= self._next:
            self._go_on(domain)
        self.trying = self._tries < _OFTEN
        return "the guest stands still: a read or write failed" + ("" if self.trying else f" {self._tries} times")

    def _go_on(self, domain: Domain) -> None:
        assert isinstance(domain, Pulls), "end() has looked"
        self._next = time.monotonic() + min(_AGAIN * 2**self._tries, _AGAIN_AT_MOST)
        try:
            # Whoever works on its block graph has it paused, for which it may have found it so. QEMU is not asked for
            # its images: a pull may just have failed (`graph.nodes.all_nodes`).
            with hostlock.hold(hostlock.names_of(domain.uuid, ()), domain.name, self._home, "let the guest go on"):
                if stopped := domain.stopped_by_error():
                    domain.resume()
        except Locked:
            return
        except HypervisorError:
            if domain.stopped_by_error():
                raise
            return  # somebody else was faster
        self._tries += stopped
        _log.info("%s was stopped by a read or write that failed; it goes on (try %d)", domain.name, self._tries)
