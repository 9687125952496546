"""A guest that an error left paused is put right by the guard, and is known to be ours by whoever comes next."""

from __future__ import annotations

import pytest

from appliance.errors import LeftPaused
from appliance.hypervisor import guard as guards
from appliance.hypervisor.graph import base, switching


class Quiet(guards.Guard):
    """A guard without a process behind it; `said` is what went through its pipe, `left` that it was let act."""

    def __init__(self, uri, uuid, lock, log=None, host=()):
        self._mark, self._owed, self.said, self.left = guards.paused_mark(lock), set(), b"", False

    def alive(self):
        return True

    def _tell(self, word):
        self.said += word

    def leave(self):
        self.left = True


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "Guard", Quiet)
    monkeypatch.setattr(guards, "_guards", {})
    return tmp_path / "uuid.lock"


def test_disarmed_when_nothing_is_owed(lock):
    with guards.guarding("uri", "uuid", lock) as guard:
        guard.pausing(True)
        assert guards.paused_mark(lock).exists()
        guard.resumed()
    assert guard.said.endswith(b"D") and not guard.left and not guards.paused_mark(lock).exists()


@pytest.mark.parametrize("begin", ["pausing", "freezing"])
def test_acts_when_an_error_left_the_guest_paused_or_frozen(lock, begin):
    """P5-03: also when it is not our death but an error: the connection was lost, Ctrl-C was pressed twice."""
    with pytest.raises(KeyboardInterrupt), guards.guarding("uri", "uuid", lock) as guard:
        guard.pausing(True) if begin == "pausing" else guard.freezing()
        raise KeyboardInterrupt
    assert guard.left and not guard.said.endswith(b"D")
    assert guards.paused_mark(lock).exists() == (begin == "pausing")
    with guards.guarding("uri", "uuid", lock) as other:
        assert other is not guard


class Monitor:
    """A guest whose device sits on `node`."""

    domain, storage_daemon = "guest", False

    def __init__(self, node):
        self.node, self.log = node, []

    def execute(self, command, /, **_):
        self.log.append(command)
        if command == "query-status":
            return {"status": "running", "running": True}
        if command == "query-block":
            return [{"qdev": "vda", "inserted": {"node-name": self.node}}]
        return {"nodes": [], "edges": []} if command.startswith("x-") else []


@pytest.mark.parametrize("node", ["rw-hole-vda", "rw-rvx-vda", "rw-rvo-vda"])
def test_never_goes_on_upon_a_node_that_is_not_its_own(node):
    """P5-03: neither on an epoch's hole nor on what a failed revert put under it."""
    monitor = Monitor(node)
    with pytest.raises(LeftPaused), base.paused(monitor):
        raise OSError
    assert "cont" not in monitor.log


def test_goes_on_after_an_error_on_its_own_node():
    monitor = Monitor("D")
    with pytest.raises(OSError), base.paused(monitor):
        raise OSError
    assert monitor.log[-1] == "cont"


def test_a_hold_is_on_record_before_the_guest_stops_and_until_it_goes_on():
    """P5-36: whoever finds the driver of a revert dead in such a moment knows that it was not the admin."""
    monitor = Monitor("D")
    with switching.stopped(monitor, lambda stopped: monitor.log.append(str(stopped))):
        pass
    assert monitor.log == ["query-status", "True", "stop", "cont", "False"]
