"""A point under a tap: its place in the journal, and what is counted from it. A real ledger, a tap that pretends."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from appliance.capture import recorded, tap
from appliance.capture.recorded import Recorded
from appliance.config import Home
from appliance.errors import JournalSilent
from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph.tap import TapState

UUID, JOURNAL = "8d0a4f0e-6f0c-4d8e-9d6e-000000000007", "ab" * 16
DISKS = [Disk("vda", "", "", 0), Disk("vdb", "", "", 0)]
MONITOR = SimpleNamespace(storage_daemon=False)


class Running:
    """The tap process says that it records vda and vdb, up to number 7."""

    attached, disks, control_socket = True, ("vda", "vdb"), "/run/tap.control"

    def position(self, _timeout):
        return JOURNAL, 7


class Silent(Running):
    def position(self, _timeout):
        raise JournalSilent(socket="s", reason="nobody answers")


@pytest.fixture
def part(tmp_path, monkeypatch):
    home = Home(tmp_path / "home")
    home.create()
    monkeypatch.setattr(tap, "current", lambda *_: Running())
    running = dict.fromkeys(("vda", "vdb"), TapState.RUNNING)
    monkeypatch.setattr(recorded.graph, "state", lambda *_: running)
    monkeypatch.setattr(recorded.graph, "recording", lambda *_: True)
    monkeypatch.setattr(tap, "ours", lambda *_: True)
    return Recorded(home, SimpleNamespace(name="web", uuid=UUID, uri="test:///"))


def place(part, disks=DISKS):
    part.look(MONITOR, disks)
    part.mark(MONITOR, disks)
    return part.journal, part.sequence


def test_where_it_stands(part):
    """P5-25: behind the last write before the freeze."""
    assert place(part) == (JOURNAL, 7)


@pytest.mark.parametrize("disks", [DISKS[:1], [*DISKS, Disk("vdc", "", "", 0)], [DISKS[0], Disk("vdc", "", "", 0)]])
def test_disks_other_than_those_of_the_tap_have_no_place(part, disks):
    """P5-26: nothing may be counted from a point that lacks a disk, or has one that is not recorded."""
    assert place(part, disks) == ("", None)


@pytest.mark.parametrize("what", ["none", "waiting", "broken", "ended", "silent", "another home's"])
def test_a_tap_that_does_not_record_gives_no_place(part, monkeypatch, what):
    """P5-24: before the pause or in it; the point is none the worse."""
    running = {"none": None, "waiting": SimpleNamespace(attached=False, disks=("vda", "vdb")), "silent": Silent()}
    monkeypatch.setattr(tap, "current", lambda *_: running.get(what, Running()))
    if what == "broken":
        monkeypatch.setattr(recorded.graph, "state", lambda *_: {"vda": TapState.RUNNING, "vdb": TapState.BROKEN})
    if what == "another home's":
        monkeypatch.setattr(tap, "ours", lambda *_: False)
    if what == "ended":
        monkeypatch.setattr(recorded.graph, "recording", lambda *_: False)
    assert place(part) == ("", None)


def test_later_records_are_counted_from_it(part, tmp_path):
    """P5-37: in the span that has its place; a point without one is of no use there."""
    ledger, now = tap.ledger_of(Home(tmp_path / "home"), UUID), datetime.now(UTC)
    ledger.began(JOURNAL, 3, now)
    part.tell(SimpleNamespace(id="nowhere", journal="", sequence=None, time=now))
    part.tell(SimpleNamespace(id="first", journal=JOURNAL, sequence=7, time=now))
    ledger.confirmed(JOURNAL, 10, now)
    assert [(one.point, one.sequence) for one in ledger.spans()[-1].bases] == [("first", 7)]
