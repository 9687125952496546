"""The journal of a domain that nobody captures any more: points first, then the records go, here and far away."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.capture import protection, tap
from appliance.capture.ship import Shipper
from appliance.errors import SequenceMissing
from appliance.service import lapse as service
from tests.unit.test_instant import TEN, UUID, Captured

LATER = TEN + timedelta(hours=5)


@pytest.fixture
def captured():
    """Eight minutes of six writes each, shipped; then the capture has ended."""
    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        found = Captured(Path(folder) / "home")
        with found.session:
            found.minutes(8)
            found.ledger.ended(found.journal, 48, TEN + timedelta(minutes=8), "not protected any more")
            spool = found.home.spool(UUID)
            Shipper(found.session.repository, UUID, spool, ledger=found.ledger).once()
            assert len(found.session.repository.segments(UUID)) == len(list(spool.glob("*.rwj"))) == 8
            yield found


def lapse(captured, now=LATER):
    captured.session.__dict__.pop("catalogue", None)
    return service.lapse(captured.session, lambda *_: None, now)


def test_old_records_become_points_and_go(captured):
    """P5-27, P5-31: each minute stays reachable, nothing lies on the host or in the repository for ever."""
    spool = captured.home.spool(UUID)
    assert service.spooled(captured.session, UUID) == sum(path.stat().st_size for path in spool.iterdir())
    (found,) = lapse(captured)
    assert (found.domain, found.uuid, found.made, found.segments) == ("web", UUID, 8, 16)
    assert list(spool.glob("*.rwj")) == [] and captured.session.repository.segments(UUID) == []
    for minute in range(1, 9):
        point = captured.asked(f"#{minute * 6}", LATER)
        captured.holds(point, range(1, minute * 6 + 1))
    with pytest.raises(SequenceMissing):
        captured.asked("#20", LATER)
    assert lapse(captured) == []


def test_what_is_young_stays(captured):
    """Every write can be asked for as long as `journal_keep` says: four hours."""
    (found,) = lapse(captured, TEN + timedelta(hours=4, minutes=3))
    assert found.made == 8 and found.segments == 2 * 3
    captured.holds(captured.asked("#20", LATER), range(1, 21))


def test_points_outlive_every_tier(captured):
    """Nobody writes this history any more: only a person forgets it."""
    lapse(captured)
    before = captured.session.repository.point_ids(UUID)
    assert lapse(captured, TEN + timedelta(days=4000)) == []
    assert captured.session.repository.point_ids(UUID) == before


@pytest.mark.parametrize("who", ["wanted", "running", "busy"])
def test_whose_journal_it_is_lets_it_go_himself(captured, who, monkeypatch):
    """A capture that is wanted or runs, and whoever holds the domain."""
    if who == "wanted":
        monkeypatch.setattr(protection, "load", lambda *_: SimpleNamespace(continuous=True))
    if who == "running":
        monkeypatch.setattr(tap, "current", lambda *_: SimpleNamespace(journal=captured.journal))
    if who == "busy":
        with captured.session.hold(UUID, "web", "a test"):
            assert lapse(captured) == []
    else:
        assert lapse(captured) == []
    assert len(captured.session.repository.segments(UUID)) == 8
