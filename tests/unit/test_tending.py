"""What the tap process tends beside capturing."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.capture import tap
from appliance.capture.tap import Running
from appliance.config import Home
from appliance.process import process_key
from appliance.service import tending
from appliance.service.tending import Tending
from tests.unit.test_instant import UUID as CAPTURED
from tests.unit.test_instant import Captured
from tests.unit.test_tiers import Spool

UUID = "uuid-web"


@pytest.fixture
def home(tmp_path):
    found = Home(tmp_path)
    found.create()
    found.run(UUID).mkdir(parents=True)
    return found


def test_what_nobody_wants_of_one_journal_says_nothing_of_the_next(home, monkeypatch):
    """P5-31: a spool that was emptied begins at 1, and what is in it must be shipped before it is forgotten."""
    monkeypatch.setattr(tending, "retire", lambda *_: None)
    made = Tending(home, UUID, home.path / "none.yaml", None)
    session = type("S", (), {"repository": None})
    record = type("R", (), {"uuid": UUID})

    def runs(journal):
        tap.tell(home, UUID, Running(process_key(os.getpid()), "attached", journal=journal))

    runs("old")
    made._retire(session, record, {"old": 100, "older": 900})
    assert made._unwanted() == 100
    runs("")
    assert made._unwanted() == 100
    runs("new")
    assert made._unwanted() == 0
    made._retire(session, record, {"old": 100, "new": 7})
    assert made._unwanted() == 7


def until(done):
    limit = time.monotonic() + 20
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_point_that_takes_long_keeps_nothing_from_being_shipped_and_forgotten(monkeypatch):
    """P5-29, P5-31: the spool fills meanwhile, and what the repository has goes first; the next pass tells of it."""
    passes, go_on, ended = [], threading.Event(), SimpleNamespace(left=0, damaged=False, expired={})

    def slow(session, record, budget, **more):
        passes.append(more["full"])
        assert go_on.wait(20)
        return ended

    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        captured = Captured(Path(folder) / "home")
        home, spool = captured.home, Spool(captured, limit=4_000)
        running = SimpleNamespace(journal=captured.journal, control_socket="s", control=lambda timeout=2.0: spool)
        monkeypatch.setattr(tap, "current", lambda *_: running)
        monkeypatch.setattr(tending.tiers, "run", slow)
        monkeypatch.setattr(tending.protection, "load", lambda *_: SimpleNamespace(uuid=CAPTURED))
        made = Tending(home, CAPTURED, home.path / "none.yaml", None)
        made.start()
        try:
            until(lambda: passes == [False])
            for _ in range(8):
                captured.write(30)
            captured.confirm()
            until(lambda: len(list(spool.folder.glob("*.rwj"))) == 0)
            with captured.session as session:
                assert session.repository.segments(CAPTURED)[-1].last == 240
            assert passes == [False]
            go_on.set()
            monkeypatch.setattr(made, "_pressed", lambda: True)
            until(lambda: True in passes)
        finally:
            go_on.set()
            made.stop()
        assert not any(thread.is_alive() for thread in made._threads)
