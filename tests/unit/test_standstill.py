"""A guest that QEMU stopped at a failed read goes on; with a real one: tests/integration/test_image.py -k at_once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from appliance.hypervisor.base import Pulls
from appliance.restore import standstill
from appliance.restore.standstill import Standstill


class Domain:
    """Of libvirt."""

    name = "twin"

    def __init__(self, stopped, status="failed"):
        self.stopped, self.status, self.resumed = stopped, status, 0

    def stopped_by_error(self):
        return self.stopped

    def monitor(self):
        return SimpleNamespace(execute=lambda command: [{"device": ""}, {"io-status": self.status}])

    def resume(self):
        self.resumed += 1

    def pull(self, target, rate): ...

    def pulling(self, target): ...

    def backed(self, target): ...

    def undefine(self): ...


@pytest.mark.parametrize(
    ("stopped", "status", "times"), [(True, "failed", 1), (True, "nospace", 0), (False, "ok", 0)]
)
def test_what_goes_on(stopped, status, times):
    """P6-14: neither a pause of the admin's, nor one that waits for room."""
    domain = Domain(stopped, status)
    assert isinstance(domain, Pulls)
    Standstill().end(domain)
    assert domain.resumed == times


def test_one_that_is_stopped_again_is_tried_again_after_a_while(monkeypatch):
    """Its own disk may fail."""
    now = [100.0]
    monkeypatch.setattr(standstill.time, "monotonic", lambda: now[0])
    domain, one = Domain(True), Standstill()
    for _ in range(3):
        one.end(domain)
    assert domain.resumed == 1
    now[0] += 3
    one.end(domain)
    assert domain.resumed == 2
