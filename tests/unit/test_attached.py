"""What the tap process says of a span by what it sees, with a journal and a domain that only pretend."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from appliance.capture import tap
from appliance.capture.protection import Protection
from appliance.config import Home
from appliance.hypervisor.base import DomainState
from appliance.journal import State
from appliance.service import protection as verbs
from appliance.service.attached import Attached, Lost

UUID, JOURNAL = "uuid-web", "ab" * 16
RECORD = Protection("web", UUID, "test:///", ("vda",), "id", "t", continuous=True)


def state(last, what="ok", durable=None):
    durable = last if durable is None else durable
    return State(what, "no space" if what != "ok" else "", 1, last, last, durable, durable, 0, 0, {"journal": JOURNAL})


class Recorder:
    """Answers with `now`."""

    journal, now = JOURNAL, state(0)

    def alive(self):
        return True

    def control(self):
        return self

    def status(self):
        return self.now

    def stats(self):
        return {}


@pytest.fixture
def attached(tmp_path, monkeypatch):
    home = Home(tmp_path)
    home.create()
    session = type("S", (), {"busy": staticmethod(lambda _uuid: None)})
    ledger = tap.ledger_of(home, UUID)
    made = Attached(session, ledger, Recorder(), (), "qemu")
    made.ledger = ledger
    monkeypatch.setattr(made, "_see_jobs", lambda _record: None)
    monkeypatch.setattr(made.latency, "measure", lambda _stats: None)
    made._looked = float("inf")
    ledger.began(JOURNAL, 0, datetime.now(UTC))
    return made


@pytest.mark.parametrize("what", ["failed", "full"])
def test_a_journal_that_has_refused_a_write_is_not_seen_to_record(attached, what):
    """P5-25: QEMU says for up to 100 ms more that its job runs, and nothing may be confirmed then."""
    attached.recorder.now = state(7)
    attached.look(RECORD)
    assert attached.ledger.spans()[-1].last == 7
    attached.recorder.now = state(8, what)
    with pytest.raises(Lost, match="no space"):
        attached.look(RECORD)
    assert attached.ledger.spans()[-1].last == 7


def test_what_a_look_saw_is_confirmed_as_soon_as_it_is_durable(attached):
    """P5-31: not only by the next look, which may never come; and nothing that was given out after the look."""
    attached.recorder.now = state(7, durable=3)
    attached.look(RECORD)
    seen = attached._seen[1]
    attached.recorder.now = state(9, durable=6)
    attached.arrived()
    assert attached.ledger.spans()[-1].last == 0
    attached.recorder.now = state(9, durable=9)
    attached.arrived()
    span = attached.ledger.spans()[-1]
    assert (span.last, span.end) == (7, seen)


def test_a_span_after_a_revert_of_some_disks_begins_behind_it(attached):
    """P5-37: the look had begun before the revert ended the span, and its number is of before."""
    before = state(7)
    attached.recorder.now = state(9)
    attached.ledger.ended(JOURNAL, 9, None, "a revert of vda alone")
    attached._confirm(before, datetime.now(UTC))
    assert attached.ledger.spans()[-1].open
    assert attached.ledger.spans()[-1].first == 9


def test_a_point_counts_when_the_ledger_says_so(attached, monkeypatch):
    """P5-37: not for having been taken: what could not be written down would leave the whole span out of reach."""
    assert not attached.based()
    attached.taken("first")
    assert attached.based(), "it may be about to"
    monkeypatch.setattr("appliance.service.attached._COUNTED", 0.0)
    assert not attached.based(), "it was not written down"
    attached.taken("second")
    attached.ledger.based(JOURNAL, 3, datetime.now(UTC), "second")
    attached.recorder.now = state(7)
    attached.look(RECORD)
    assert attached.based()
    attached.rebase()
    assert not attached.based()


@pytest.mark.parametrize(
    ("version", "iothread", "words"),
    [((7, 2, 22), True, "pull-mode"), ((7, 2, 22), False, ""), ((10, 0, 2), True, ""), ((10, 1, 0), False, "instead")],
)
def test_dangers_of_this_qemu_are_told_when_capture_begins(version, iothread, words):
    """P5-30: another tool's backup would end a guest that has an iothread."""
    said = []
    disk = type("D", (), {"iothread": iothread, "target": "vda"})
    domain = type("V", (), {"state": lambda _: DomainState.RUNNING, "disks": lambda _: [disk],
                            "process": lambda _: type("P", (), {"version": version})})()  # fmt: skip
    verbs._tell_dangers(type("S", (), {"warn": said.append}), domain, ("vda",))
    assert (words in "".join(said)) if words else said == []
