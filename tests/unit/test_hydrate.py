"""When a domain that runs from a view is alone; tests/integration/test_image.py does it with a guest."""

from __future__ import annotations

from types import SimpleNamespace
from urllib.parse import quote

import pytest

from appliance.config import Home, Settings, write_json
from appliance.hypervisor.base import DomainState
from appliance.model import MapRef
from appliance.restore import hydrate, hydrations

UUID = "11111111-2222-3333-4444-555555555555"


class Domain:
    """Of libvirt; answers what a step asks. Its pulls end at once."""

    def __init__(self, state=DomainState.RUNNING, nodes=(), backed=False):
        self._state, self._nodes, self._backed = state, nodes, backed

    def state(self):
        return self._state

    def backed(self, _target):
        return self._backed

    def monitor(self):
        nodes = [{"file": one} for one in self._nodes]
        return SimpleNamespace(execute=lambda command, **_: [] if command == "query-jobs" else nodes)

    def pull(self, _target, _rate):
        pass

    def pulling(self, _target):
        return None

    def stopped_by_error(self):
        return False

    def undefine(self):
        raise AssertionError("nobody asks for that")


@pytest.fixture
def hydration(tmp_path):
    home = Home(tmp_path)
    order = hydrations.Order(
        "twin", UUID, "qemu:///system", "p", "{}", {"vda": MapRef(b"", 1 << 20)}, {"sda": "vda"}, None, 0, "/image"
    )  # fmt: skip
    hydrations.folder(home, "twin").mkdir(parents=True)
    write_json(hydrations.folder(home, "twin") / "order.json", order.to_json())
    return hydrate.Hydration(home, "twin", Settings())


def stepped(hydration, domain):
    hydration._hypervisor = SimpleNamespace(domain=lambda _uuid: domain)
    return hydration._step()


def test_it_is_alone_when_qemu_itself_has_closed_the_view(hydration, tmp_path):
    """libvirt calls the disk alone a moment earlier, and a view that went then would have QEMU wait for it."""
    place = hydrations.socket_path(Home(tmp_path), UUID)
    for name in (place, quote(str(place))):
        seen = stepped(hydration, Domain(nodes=["/images/sda.qcow2", f"nbd+unix:///vda?socket={name}"]))
        assert (seen.phase, seen.left) == ("pulling", ())
    others = ["/images/sda.qcow2", f"nbd+unix:///vda?socket={place}.other"]
    assert stepped(hydration, Domain(nodes=others)).phase == "done"
    assert stepped(hydration, Domain(state=DomainState.SHUTOFF)).phase == "done"


def test_a_full_file_system_is_told(hydration, monkeypatch):
    """QEMU's job ends without a word that anybody can still ask for."""
    domain = Domain(backed=True)
    assert stepped(hydration, domain).error == ""
    monkeypatch.setattr(hydrate.os, "statvfs", lambda _path: SimpleNamespace(f_bavail=3, f_frsize=1 << 20))
    seen = stepped(hydration, domain)
    assert seen.phase == "pulling" and seen.error == "/image: no space is left on its file system"


class Stopped(Domain):
    """By QEMU, at a read that failed; also asked to change its definition."""

    def __init__(self, **rest):
        super().__init__(**rest)
        self.asked, self.changed = 0, []

    def change(self, edit):
        self.changed.append(edit(DISK))


DISK = """<domain><devices><disk device="disk"><driver name="qemu" error_policy="stop"/><target dev="sda"/></disk><disk
device="disk"><driver name="qemu" error_policy="stop"/><target dev="sdb"/></disk></devices></domain>"""


@pytest.fixture
def standstill(hydration, monkeypatch):
    """What becomes of the guest that stands still, and how often that was asked."""
    found = SimpleNamespace(trying=True, said="it stands still", times=0)

    def end(_domain):
        found.times += 1
        return found.said

    found.end = end
    hydration._standstill = found
    return found


@pytest.mark.parametrize(("key", "error", "times"), [("alive", "", 1), ("", "", 0), ("alive", "no room", 0)])
def test_a_guest_that_stands_still_goes_on_when_its_view_answers(hydration, standstill, monkeypatch, key, error, times):
    """P6-14."""
    monkeypatch.setattr(hydrate, "lives", bool)
    monkeypatch.setattr(hydrate.KeptView, "key", key)
    hydration._view.error = error
    seen = stepped(hydration, Stopped(backed=True))
    assert (standstill.times, seen.phase, seen.error) == (times, "pulling", standstill.said if times else "")


def test_it_is_not_done_before_the_guest_goes_on(hydration, standstill):
    """P6-14: nobody looks after it any more then. From its next start on it is told of errors of its own disks."""
    domain = Stopped()
    seen = stepped(hydration, domain)
    assert (seen.phase, seen.left, seen.error, domain.changed) == ("pulling", (), standstill.said, [])
    standstill.trying, standstill.said = False, ""
    assert stepped(hydration, domain).phase == "done"
    (changed,) = domain.changed
    assert changed.count('error_policy="stop"') == 1 and changed.index("sda") < changed.index("error_policy")
