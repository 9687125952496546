"""A guest that QEMU stopped at a failed read goes on; with a real one: tests/integration/test_image.py -k at_once."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from appliance.errors import HypervisorError, Locked
from appliance.hypervisor.base import Pulls
from appliance.restore import standstill
from appliance.restore.standstill import Standstill


class Domain:
    """Of libvirt. `again`: what made it stop is still there."""

    name, uuid = "twin", "11111111-2222-3333-4444-555555555555"

    def __init__(self, stopped=True, status="failed", again=False):
        self.stopped, self.status, self.again, self.resumed = stopped, status, again, 0

    def stopped_by_error(self):
        return self.stopped

    def monitor(self):
        return SimpleNamespace(execute=lambda command: [{"device": ""}, {"io-status": self.status}])

    def resume(self):
        self.resumed += 1
        self.stopped = self.again

    def pull(self, target, rate): ...

    def pulling(self, target): ...

    def backed(self, target): ...

    def undefine(self): ...


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """Who holds the domain's lock, and for what it was held."""
    found = SimpleNamespace(by="", times=0)

    @contextmanager
    def hold(*_args):
        if found.by:
            raise Locked(url="domain 'twin'", holder=found.by, hint="wait")
        found.times += 1
        yield

    monkeypatch.setattr(standstill.hostlock, "hold", hold)
    return found


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(standstill.time, "monotonic", lambda: now.time)
    return now


@pytest.mark.parametrize(
    ("stopped", "status", "times", "said"),
    [(True, "failed", 1, "a read or write failed"), (True, "nospace", 0, "no space"), (False, "ok", 0, "")],
)
def test_what_goes_on(tmp_path, held, stopped, status, times, said):
    """P6-14: neither a pause that somebody asked for, nor one that waits for room."""
    domain, one = Domain(stopped, status), Standstill(tmp_path)
    assert isinstance(domain, Pulls)
    assert said in one.end(domain) and one.trying is (times == 1)
    assert domain.resumed == held.times == times
    assert status == "nospace" or one.end(domain) == ""


def test_nobody_is_let_go_on_while_its_block_graph_is_changed(tmp_path, held, clock):
    """P6-14: who works on it found it paused, and relies on that."""
    domain, one = Domain(), Standstill(tmp_path)
    held.by = "rewind point"
    assert one.end(domain) and domain.resumed == 0 and one.trying
    held.by = ""
    clock.time += 3
    one.end(domain)
    assert domain.resumed == 1


def test_one_that_is_stopped_again_is_tried_ever_later_and_told(tmp_path, clock):
    """P6-14: its own disk may fail, or the point be damaged just there."""
    domain, one, times = Domain(again=True), Standstill(tmp_path), []
    for _ in range(70):
        said = one.end(domain)
        times += [clock.time] * (domain.resumed - len(times))
        clock.time += 1
    assert times == [100, 102, 106, 114, 130, 162]
    assert not one.trying and said.endswith("a read or write failed 6 times")


def test_somebody_else_may_be_faster(tmp_path):
    class Gone(Domain):
        def resume(self):
            self.stopped = self.again
            raise HypervisorError(reason="domain is already running")

    assert Standstill(tmp_path).end(Gone())
    with pytest.raises(HypervisorError, match="already running"):
        Standstill(tmp_path).end(Gone(again=True))
