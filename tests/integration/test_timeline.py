"""`status` and `timeline` of a live guest whose every write is captured: figures of the real journal and its ledger."""

from __future__ import annotations

import json
import os
import signal

import pytest

from appliance.cli import main
from appliance.service.status import status
from appliance.service.tap import pause
from appliance.units import MiB
from tests.support.tapped import Tapped
from tests.support.tiny import BareGuest, TinyDisk, make_disk


@pytest.fixture
def tapped(tmp_path):
    """Recorded, and written to at 60 operations a second."""
    disks = [TinyDisk(make_disk(tmp_path / f"{n}.qcow2", 64 * MiB)) for n in range(2)]
    with BareGuest(tmp_path, disks, name="web", span=1 << 20) as guest:
        guest.boot()
        guest.ask("start 60")
        with Tapped(guest) as found:
            found.protect()
            yield found


def standing(tapped):
    with tapped.session() as session:
        return status(session, "web")[1][0].capture


@pytest.mark.timeout(120)
def test_how_a_live_capture_stands_and_what_it_tells(tapped, capsys, monkeypatch):
    """P5-37, P5-42: achieved RPO near and far, added latency, bytes; a killed journal is a gap with its reason."""
    first = tapped.spans()[-1].last
    tapped.until(lambda: tapped.spans()[-1].last > first + 100, "nothing is recorded")
    mark = tapped.running.control().mark("before the fault")
    monkeypatch.setattr("appliance.service.capturing.on_this_host", lambda _url: "")  # a repository that is elsewhere
    shipped = tapped.until(lambda: (now := standing(tapped)).shipped_bytes and now, "nothing is shipped")
    assert (shipped.mode, shipped.reason, shipped.journal) == ("tap", "", tapped.running.journal)
    assert shipped.sequence >= shipped.durable >= first
    assert shipped.near is not None and 0 <= shipped.near < 20
    assert shipped.far is not None and 0 <= shipped.far < 60
    monkeypatch.undo()
    here = standing(tapped)
    assert here.far is None and here.far_reason.startswith("the repository is on this host (") and here.shipped_bytes
    assert 0 < shipped.latency < 5
    assert 0 < shipped.spool_bytes < shipped.spool_limit <= 16 << 30  # less on a disk with less room

    os.kill(tapped.server, signal.SIGKILL)
    tapped.attached(after=1)
    capsys.readouterr()
    assert main(["--home", str(tapped.home.path), "--json", "timeline", "web"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    spans = [one for one in lines if one["type"] == "span"]
    assert [one["running"] for one in spans] == [False, True]
    assert spans[0]["reason"] and spans[0]["last"] <= spans[1]["first"]
    marks = [one for one in lines if one["type"] == "mark"]
    assert [(one["label"], one["sequence"]) for one in marks] == [("before the fault", mark.sequence)]
    gaps = [one for one in lines if one["type"] == "gap"]
    assert gaps[-1]["reason"] == spans[0]["reason"] and gaps[-1]["start"] == spans[0]["end"]
    assert gaps[-1]["end"] == spans[1]["since"]
    assert any(one["exact"] and one["bytes"] for one in lines if one["type"] == "bucket")
    assert lines[-1]["capture"]["mode"] == "tap"
    assert lines[-1]["capture"]["last_gap"]["reason"] == spans[0]["reason"]

    with tapped.session() as session:
        pause(session, "web", wait=20)
    aside = standing(tapped)
    assert (aside.mode, aside.journal) == ("paused", None)
    assert aside.last_gap.start == tapped.spans()[-1].end
    assert tapped.guest.ask("stats")["errors"] == 0
