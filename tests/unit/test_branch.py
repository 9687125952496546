"""What the ledger is told by a revert, and what happens when it cannot be told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from appliance.capture import tap
from appliance.capture.tap import Running
from appliance.config import Home
from appliance.process import process_key
from appliance.restore import branch
from appliance.restore.intent import DiskIntent, Intent

UUID, JOURNAL = "uuid-web", "ab" * 16


@pytest.fixture
def home(tmp_path):
    found = Home(tmp_path)
    found.create()
    found.run(UUID).mkdir(parents=True)
    return found


@pytest.fixture
def ledger(home):
    found = tap.ledger_of(home, UUID)
    found.began(JOURNAL, 0, datetime.now(UTC))
    found.based(JOURNAL, 1, datetime.now(UTC), "target")
    found.based(JOURNAL, 40, datetime.now(UTC), "safety")
    found.confirmed(JOURNAL, 40, datetime.now(UTC))
    return found


@pytest.fixture
def server(home):
    """A process that stands for the journal's, described as running by this one."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        tap.tell(home, UUID, Running(process_key(os.getpid()), "attached", server=process_key(process.pid)))
        yield process
        process.kill()


def intent(place, *, whole=True):
    disks = (DiskIntent("vda", "/a", "qcow2", 1, None, None, "p", "o", "n", "d"),)
    return Intent(
        id="i", domain="web", uuid=UUID, uri="test:///", verb="revert", point="target", safety_point="safety",
        timeline="new", instant=True, was="running", rate=0, started=0.0, repository="{}", disks=disks, owner=None,
        whole=whole, extra={"place": place},
    )  # fmt: skip


def test_a_revert_is_a_branch_at_the_safety_point(home, ledger, server):
    """P5-37: what follows counts from the point gone to, on the timeline of the revert."""
    branch.forth(home, intent([JOURNAL, 40]))
    (found,) = ledger.branches()
    assert (found.sequence, found.point, found.timeline) == (40, "target", "new")
    assert server.poll() is None


def test_a_revert_of_some_disks_ends_the_span(home, ledger, server):
    """P5-37: no point is what all disks are at then."""
    branch.forth(home, intent([JOURNAL, 40], whole=False))
    assert ledger.branches() == []
    assert ledger.spans()[-1].reason_ended == "a revert of vda alone"
    assert server.poll() is None


def test_a_disk_that_came_after_the_point_did_not_move(home, ledger, server):
    """P5-37: the revert takes all disks of the point along, and that is not all that is recorded."""
    tap.tell(home, UUID, replace(tap.current(home, UUID), disks=("vda", "vdb")))
    branch.forth(home, intent([JOURNAL, 40]))
    assert ledger.branches() == []
    assert ledger.spans()[-1].reason_ended == "a revert of vda alone"


def test_a_revert_of_some_disks_that_is_resumed_late_claims_nothing_of_the_time_between(home, ledger):
    """P5-37: host and capture were away between the switch and the resume."""
    before = ledger.spans()[-1].seen
    time.sleep(0.05)
    branch.forth(home, intent([JOURNAL, 40], whole=False))
    assert ledger.spans()[-1].end == before
    assert ledger.gaps()[-1].start == before


def test_what_has_no_place_in_the_journal_ends_the_capture(home, ledger, server):
    """P5-37: the safety point was taken without an answer of the journal: nothing after it may be claimed."""
    branch.forth(home, intent(None))
    assert server.wait(5) == -signal.SIGKILL
    assert ledger.branches() == []


def test_a_ledger_that_cannot_be_written_ends_the_capture(home, ledger, server, monkeypatch):
    """P5-37: as above; the guest goes on without capture rather than with an untrue history."""
    monkeypatch.setattr(tap, "ledger_of", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    branch.forth(home, intent([JOURNAL, 40]))
    assert server.wait(5) == -signal.SIGKILL


def test_a_roll_back_without_capture_says_nothing(home, ledger):
    """P5-37: no tap process lives, so the span was left where it was last confirmed."""
    branch.back(home, intent([JOURNAL, 40]))
    assert ledger.branches() == []


def test_a_journal_that_does_not_answer_a_roll_back_is_ended(home, ledger, server):
    """P5-37."""
    running = tap.current(home, UUID)
    assert running is not None and running.attached and not running.control_socket
    branch.back(home, intent([JOURNAL, 40]))
    assert server.wait(5) == -signal.SIGKILL
    assert ledger.branches() == []
