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

from appliance.hypervisor.base import Domain, Pulls

__all__ = ["Standstill"]

# A guest whose own disk fails is stopped again at once.
_AGAIN = 2.0

_log = logging.getLogger(__name__)


class Standstill:
    """Of one domain; for one thread."""

    def __init__(self) -> None:
        self._next = 0.0

    def end(self, domain: Domain) -> None:
        """To be called again and again while the view answers. Nothing is done about a pause of the admin's, nor where
        QEMU found no space: that is for whoever makes room. Raises HypervisorError."""
        if time.monotonic() < self._next or not isinstance(domain, Pulls) or not domain.stopped_by_error():
            return
        self._next = time.monotonic() + _AGAIN
        if any(one.get("io-status") == "nospace" for one in domain.monitor().execute("query-block")):
            return
        _log.info("%s was stopped by a read or write that failed; it goes on", domain.name)
        domain.resume()
