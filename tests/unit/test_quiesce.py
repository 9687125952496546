"""Freezing around a point: whatever happens, the guest is thawed."""

from __future__ import annotations

import pytest

from appliance.capture.quiesce import frozen
from appliance.errors import AgentUnavailable
from appliance.hypervisor import guard
from appliance.hypervisor.base import DomainState
from appliance.model import Consistency


class FakeDomain:
    name = "fake"

    def __init__(self, answer=2, state=DomainState.RUNNING):
        self.answer = answer
        self.now = state
        self.did = []

    def state(self):
        return self.now

    def freeze(self, timeout):
        self.did.append("freeze")
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def thaw(self, timeout):
        self.did.append("thaw")


class FakeGuard:
    def __init__(self):
        self.said = []

    def freezing(self):
        self.said.append("freezing")

    def thawed(self):
        self.said.append("thawed")


SILENT = AgentUnavailable(domain="fake", reason="no agent")


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_frozen_is_a_filesystem_point(mode):
    """P5-16: level by evidence."""
    domain, guarding = FakeDomain(), FakeGuard()
    with frozen(domain, mode, 5, guarding) as level:
        assert level.consistency is Consistency.FILESYSTEM
        assert guarding.said == ["freezing"]
    assert domain.did == ["freeze", "thaw"]
    assert guarding.said == ["freezing", "thawed"]


def test_thawed_after_an_error_in_the_pause():
    """P5-16: thaw is guaranteed."""
    domain, guarding = FakeDomain(), FakeGuard()
    with pytest.raises(ZeroDivisionError), frozen(domain, "auto", 5, guarding):
        raise ZeroDivisionError
    assert domain.did == ["freeze", "thaw"]
    assert guarding.said[-1] == "thawed"


def test_without_an_agent():
    domain = FakeDomain(SILENT)
    with frozen(domain, "auto", 5, FakeGuard()) as level:
        assert level.consistency is Consistency.CRASH
    with pytest.raises(AgentUnavailable), frozen(domain, "require", 5, FakeGuard()):
        pass


def test_never_and_not_running():
    domain = FakeDomain()
    with frozen(domain, "never", 5, FakeGuard()) as level:
        assert level.consistency is Consistency.CRASH
    paused = FakeDomain(state=DomainState.PAUSED)
    with frozen(paused, "auto", 5, FakeGuard()):
        pass
    with pytest.raises(AgentUnavailable), frozen(paused, "require", 5, FakeGuard()):
        pass
    assert domain.did == paused.did == []


def test_nothing_to_freeze_is_told():
    with frozen(FakeDomain(0), "auto", 5, FakeGuard()) as level:
        assert level.consistency is Consistency.CRASH
        assert level.notes


@pytest.mark.parametrize(
    ("words", "thaws", "resumes"),
    [(b"AF", 1, 0), (b"AFP", 1, 1), (b"AFPRT", 0, 0), (b"AFPRTD", 0, 0), (b"APD", 0, 0), (b"APDA", 0, 0), (b"", 0, 0)],
)
def test_guard_undoes_what_was_begun(monkeypatch, tmp_path, words, thaws, resumes):
    """P5-16: the other end of the pipe, when we died after saying these words."""
    import os

    from appliance import hypervisor
    from appliance.hypervisor.graph import base

    domain, cleaned = FakeDomain(), []
    domain.monitor = lambda: None

    class Place:
        def domain(self, uuid):
            return domain

        def close(self):
            pass

    monkeypatch.setattr(hypervisor, "connect", lambda uri: Place())
    monkeypatch.setattr(base, "clean", lambda monitor, prefix, resume: cleaned.append(resume))
    read, write = os.pipe()
    ready = os.open("/dev/null", os.O_WRONLY)
    os.write(write, words)
    os.close(write)
    guard.main("x:///", "u", str(tmp_path / "lock"), str(read), str(ready))
    os.close(read)
    assert domain.did == ["thaw"] * thaws
    assert sum(cleaned) == resumes
    assert bool(cleaned) == (b"A" in words and not words.endswith(b"D"))
