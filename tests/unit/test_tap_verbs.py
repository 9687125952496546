"""The verbs around a tap process that is not there: pauses, and starting one that cannot start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from appliance.capture import protection, tap
from appliance.capture.protection import Protection
from appliance.capture.tap import Running
from appliance.config import Home
from appliance.errors import CaptureError, DomainBusy, NotProtected
from appliance.process import process_key, signal_process, wait_gone
from appliance.service import Session
from appliance.service import tap as verbs
from appliance.service.protection import point
from appliance.service.setup import init


@pytest.fixture
def session():
    with tempfile.TemporaryDirectory(prefix="rw") as folder, Session(Home(Path(folder) / "home")) as found:
        init(found)
        yield found


@pytest.fixture
def record(session):
    made = Protection("web", "uuid-web", "test:///", ("vda",), "id", "t", continuous=True)
    protection.save(session.home, made)
    session.home.run(made.uuid).mkdir(parents=True)
    return made


def test_a_pause_ends_by_itself(session, record, monkeypatch):
    """P5-31."""
    monkeypatch.setattr(verbs, "clean", lambda *_: None)
    made = verbs.pause(session, "web", 60)
    assert made.continuous and made.until is not None
    assert verbs.paused_until(session.home, record.uuid) == pytest.approx(made.until)
    monkeypatch.setattr(verbs.time, "time", lambda: made.until + 1)
    assert verbs.paused_until(session.home, record.uuid) is None


def test_a_pause_without_an_end_is_ended(session, record, monkeypatch):
    """P5-31: also twice."""
    monkeypatch.setattr(verbs, "clean", lambda *_: None)
    assert verbs.pause(session, "web").until is None
    assert verbs.paused_until(session.home, record.uuid) == float("inf")
    for _ in range(2):
        verbs.unpause(session, "web")
        assert verbs.paused_until(session.home, record.uuid) is None


def test_a_pause_that_does_not_come_about_is_none(session, record, monkeypatch):
    """P5-31: else the daemon would take no points, and nobody would know."""

    def fails(*_):
        raise CaptureError(reason="no")

    monkeypatch.setattr(verbs, "clean", fails)
    with pytest.raises(CaptureError):
        verbs.pause(session, "web", 60)
    assert verbs.paused_until(session.home, record.uuid) is None


@pytest.mark.parametrize("text", ["", "{}", '{"until": "soon"}', "[]"])
def test_a_pause_that_cannot_be_read_is_none(session, record, text):
    """P5-31: protection goes on rather than not."""
    (session.home.run(record.uuid) / "pause.json").write_text(text)
    assert verbs.paused_until(session.home, record.uuid) is None


def test_only_what_is_protected_can_be_paused(session):
    """P5-31."""
    with pytest.raises(NotProtected):
        verbs.pause(session, "web")


def test_a_tap_process_waits_for_a_domain_that_is_not_there(session, record):
    """P5-23: it starts, says why it records nothing, and ends when it is told to."""
    verbs.ensure(session, record)
    running = tap.current(session.home, record.uuid)
    assert running is not None and running.state == "waiting" and not running.attached
    assert not verbs.missing(session.home, record)
    verbs.ensure(session, record)
    assert tap.current(session.home, record.uuid).process == running.process
    protection.remove(session.home, record.uuid)
    limit = time.monotonic() + 20
    while tap.current(session.home, record.uuid) is not None:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_description_of_a_dead_process_is_none(session, record):
    """P5-23."""
    tap.tell(session.home, record.uuid, tap.Running("1:1", "attached"))
    assert tap.current(session.home, record.uuid) is None
    assert verbs.missing(session.home, record)


def test_no_point_that_nobody_asked_for_is_taken_in_a_pause(session, record, monkeypatch):
    """P5-31: it may have waited for the domain since before."""
    monkeypatch.setattr(verbs, "clean", lambda *_: None)
    verbs.pause(session, "web", 60)
    for reason in ("schedule", "baseline"):
        with pytest.raises(DomainBusy, match="step aside"):
            point(session, "web", reason=reason)


def test_starting_a_tap_process_keeps_no_descriptor(session, record):
    """P5-23: the daemon does it for as long as it lives."""
    verbs.ensure(session, record)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        found = tap.current(session.home, record.uuid)
        signal_process(found.process, signal.SIGKILL)
        wait_gone(found.process, 5)
        verbs.ensure(session, record)
    last = tap.current(session.home, record.uuid)
    protection.remove(session.home, record.uuid)
    assert wait_gone(last.process, 20)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_pause_cleans_up_when_the_tap_process_dies_instead_of_stepping_aside(session, record, monkeypatch):
    """P5-31: nothing of ours is in the graph when it returns."""
    cleaned = []
    monkeypatch.setattr(verbs, "clean", lambda _session, found: cleaned.append(found.uuid))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        tap.tell(session.home, record.uuid, Running(process_key(process.pid), "attached"))
        verbs.pause(session, "web", 60)  # the signal kills it: it is no tap process
        assert process.wait(5) == -signal.SIGUSR1
    assert cleaned == [record.uuid]
