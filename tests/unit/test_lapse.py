"""The journal of a domain that nobody captures any more: points first, then the records go, here and far away."""

from __future__ import annotations

import shutil
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.capture import protection, tap
from appliance.capture.ship import Shipper
from appliance.errors import SequenceMissing
from appliance.service import lapse as service
from tests.support.journal import Scribe
from tests.unit.test_instant import TEN, UUID, Captured

LATER = TEN + timedelta(hours=5)


@pytest.fixture
def begun():
    """A capture of ours; `end` of it is for the test."""
    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        found = Captured(Path(folder) / "home")
        with found.session:
            yield found


def end(captured, minutes, *, shipped=True):
    captured.minutes(minutes)
    last = captured.scribe.sequence
    captured.ledger.ended(captured.journal, last, TEN + timedelta(minutes=minutes), "not protected any more")
    if shipped:
        Shipper(
            captured.session.repository, UUID, captured.home.spool(UUID), ledger=captured.ledger
        ).once()  # fmt: skip
        assert far(captured) == near(captured) == minutes


@pytest.fixture
def captured(begun):
    """Eight minutes of six writes each, shipped; then the capture has ended."""
    end(begun, 8)
    return begun


def near(captured):
    return len(list(captured.home.spool(UUID).glob("*.rwj")))


def far(captured):
    return len(captured.session.repository.segments(UUID))


def lapse(captured, now=LATER):
    captured.session.__dict__.pop("catalogue", None)
    return service.lapse(captured.session, lambda *_: None, now)


@pytest.mark.parametrize("minutes", [8, 25])
def test_old_records_become_points_and_go(begun, minutes):
    """P5-27, P5-31: each minute stays reachable, nothing lies on the host or in the repository for ever. However long
    it was: nobody has to keep up."""
    end(begun, minutes)
    spool = begun.home.spool(UUID)
    assert service.spooled(begun.session, UUID) == sum(path.stat().st_size for path in spool.iterdir())
    (found,) = lapse(begun)
    assert (found.domain, found.uuid, found.made, found.segments) == ("web", UUID, minutes, 2 * minutes)
    assert near(begun) == far(begun) == 0
    for minute in range(1, minutes + 1):
        point = begun.asked(f"#{minute * 6}", LATER)
        begun.holds(point, range(1, minute * 6 + 1))
    with pytest.raises(SequenceMissing):
        begun.asked("#20", LATER)
    assert lapse(begun) == [] and begun.ledger.events() == []


def test_what_is_young_stays(captured):
    """Every write can be asked for as long as `journal_keep` says: four hours."""
    (found,) = lapse(captured, TEN + timedelta(hours=4, minutes=3))
    assert found.made == 8 and found.segments == 2 * 3
    captured.holds(captured.asked("#20", LATER), range(1, 21))


@pytest.mark.parametrize(("later", "made"), [(timedelta(days=3), 1), (timedelta(days=4000), 1)])
def test_however_late_its_last_write_stays(captured, later, made):
    """Of what is older than `minutes_keep` each hour; no hour is too old, and points outlive every tier: nobody writes
    this history any more, and only a person forgets it."""
    (found,) = lapse(captured, TEN + later)
    assert (found.made, near(captured), far(captured)) == (made, 0, 0)
    captured.holds(captured.asked("#48", LATER), range(1, 49))
    before = captured.session.repository.point_ids(UUID)
    assert lapse(captured, TEN + timedelta(days=8000)) == []
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
        assert "left for the next time" in captured.session.warnings[0]
    else:
        assert lapse(captured) == []
    assert near(captured) == far(captured) == 8


@pytest.mark.parametrize("spool", ["none", "empty", "another journal"])
def test_a_journal_of_another_home_is_not_ours(captured, spool, tmp_path):
    """A home that joined the repository has the ledger as a copy, and maybe captured the same domain itself."""
    place = captured.home.spool(UUID)
    shutil.move(place, tmp_path / "theirs")
    if spool != "none":
        place.mkdir()
    if spool == "another journal":
        other = Scribe(place, {"vda": 65536}, journal=bytes(16))
        other.write("vda", 0, b"x")
        other.seal()
    lapse(captured)
    assert far(captured) == 8


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_record_is_read_from_what_was_shipped(captured):
    damage(sorted(captured.home.spool(UUID).glob("*.rwj"))[1])
    (found,) = lapse(captured)
    assert found.made == 8 and near(captured) == far(captured) == 0
    captured.holds(captured.asked("#48", LATER), range(1, 49))


def test_where_no_point_can_be_made_no_record_goes(begun):
    """It is told, and gc of the rest goes on."""
    end(begun, 8, shipped=False)
    damage(sorted(begun.home.spool(UUID).glob("*.rwj"))[1])
    (found,) = lapse(begun)
    assert found.segments == 0 and near(begun) == 8
    assert "no point can be made" in begun.session.warnings[0]


def test_what_cannot_be_read_at_all_is_told(captured):
    for path in captured.home.spool(UUID).glob("*.rwj"):
        path.write_bytes(b"\0" * 4096)
    assert lapse(captured) == []
    assert captured.session.warnings and far(captured) == 8


def test_without_any_point_it_goes_by_its_age(captured):
    """Nothing of it can be reached any more."""
    captured.session.repository.delete_point("10")
    (found,) = lapse(captured)
    assert (found.made, found.segments, near(captured), far(captured)) == (0, 16, 0, 0)
