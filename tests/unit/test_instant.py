"""What a person types becomes a point wherever continuous capture covers it: numbers, times, gaps, branches, clocks."""

from __future__ import annotations

import errno
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from appliance.capture import ship
from appliance.capture.ship import Shipper
from appliance.config import Home
from appliance.errors import InGap, NoSuchPoint, SequenceMissing
from appliance.model import DiskPoint, MapRef, Point
from appliance.service import Session, setup, upkeep
from appliance.service.difference import diff
from appliance.service.instant import resolve
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK
from tests.support.journal import SECOND, Scribe

UUID = "8d0a4f0e-6f0c-4d8e-9d6e-000000000004"
SIZE = 4 * CHUNK
TEN = datetime(2026, 9, 21, 10, tzinfo=UTC)


def ns(moment: datetime) -> int:
    return int(moment.timestamp()) * SECOND + moment.microsecond * 1000


class Captured:
    """A home with a repository, a point at ten o'clock, a running capture and its spool. Write n is the byte n at place
    n, one each second from 10:00:01 on."""

    def __init__(self, folder: Path):
        self.home = Home(folder)
        self.session = Session(self.home, "test:///", settings_file=folder / "none.yaml")
        setup.init(self.session, None)
        spool = self.home.spool(UUID)
        spool.mkdir(parents=True)
        self.scribe = Scribe(spool, {"vda": SIZE}, step=SECOND, wall=ns(TEN))
        self.journal = self.scribe.journal.hex()
        self.ledger = Ledger(self.home.ledger(UUID))
        self.ledger.began(self.journal, 0, TEN - timedelta(seconds=1))
        self.point("10", TEN, sequence=0)
        self.ledger.based(self.journal, 0, TEN, "10")

    def point(self, name, time, *, sequence=None, label="", timeline="t", content=None) -> Point:
        repo = self.session.repository
        ref = MapRef(b"", SIZE)
        if content is not None:
            with repo.writer() as writer:
                ref = repo.write_map(None, SIZE, [(0, writer.put(content))], writer)
        point = Point(
            name, "web", UUID, "test:///", time, timeline, None, (DiskPoint("vda", SIZE, ref),), label=label,
            reason="schedule", journal="" if sequence is None else self.journal, sequence=sequence,
        )  # fmt: skip
        repo.commit(point)
        return point

    def write(self, count: int, *, seal=True) -> None:
        for _ in range(count):
            number = self.scribe.sequence + 1
            self.scribe.write("vda", number, bytes([number]))
        if seal:
            self.scribe.seal()

    def minutes(self, count: int) -> None:
        """So many minutes of six writes each, every minute a segment, all confirmed."""
        self.scribe.step = 10 * SECOND
        for _ in range(count):
            self.write(6)
        self.confirm()

    def confirm(self, time: datetime | None = None) -> None:
        at = time or datetime.fromtimestamp(self.scribe.wall // SECOND, UTC)
        self.ledger.confirmed(self.journal, self.scribe.sequence, at)

    def asked(self, text: str, now=TEN + timedelta(hours=1)) -> Point:
        return resolve(self.session, "web", text, now)

    def holds(self, point: Point, writes: range | list[int], before: bytes = b"") -> None:
        """The point's disk has exactly these writes over `before`."""
        expected = bytearray(before.ljust(CHUNK, b"\0"))
        for number in writes:
            expected[number] = number
        (disk,) = point.disks
        chunks = dict(self.session.repository.map(disk.map).items())
        assert self.session.repository.read_chunk(chunks.get(0, b"")) == expected and not set(chunks) - {0}


@pytest.fixture
def captured():
    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        captured = Captured(Path(folder) / "home")
        with captured.session:
            yield captured


def test_a_number_is_made_once_and_found_again(captured):
    """P5-02: the state right after that write, whoever asks how often; a dry run makes nothing more."""
    captured.write(10)
    captured.write(5, seal=False)
    captured.scribe.leave_open()
    captured.confirm()
    first = captured.asked("#7")
    assert (first.sequence, first.reason, first.parent) == (7, "journal", "10")
    captured.holds(first, range(1, 8))
    assert captured.asked("7") == first == captured.asked(first.id)
    captured.holds(captured.asked("#15"), range(1, 16))
    assert captured.asked("#0").id == "10"
    assert captured.asked("#7").id == first.id
    # The next one is counted from the nearest.
    assert captured.asked("#8").parent == first.id
    assert len(captured.session.repository.points()) == 4


@pytest.mark.parametrize("text", ["#7", "2026-09-21T10:00:07.5Z", "#12?"])
def test_who_only_looks_leaves_no_point_behind(captured, text):
    """P5-21, P5-22: a dry run and a diff change nothing; what they saw is what a revert would find, by the same id."""
    captured.write(10)
    captured.confirm()
    captured.write(5)
    now, session = TEN + timedelta(hours=1), captured.session
    seen = resolve(session, "web", text, now, passing=True)
    captured.holds(seen, range(1, seen.sequence + 1))
    diff(session, "web", "#3", "#9")
    assert [one.id for one in session.repository.points()] == ["10"]
    assert upkeep.gc(session).waiting
    captured.holds(seen, range(1, seen.sequence + 1))
    made = captured.asked(text, now)
    assert (made.id, made.disks[0].map.root) == (seen.id, seen.disks[0].map.root)


def test_a_time_is_the_last_write_before_it(captured):
    """P5-02, P5-21: to the microsecond; a point of that very second wins, as it does in a list."""
    captured.write(10)
    captured.confirm(TEN + timedelta(seconds=30))
    captured.holds(captured.asked("2026-09-21T10:00:03.999999Z"), range(1, 4))
    assert captured.asked("2026-09-21T10:00:04.000Z").sequence == 4
    assert captured.asked("2026-09-21 10:00:20Z").sequence == 10
    assert captured.asked("2026-09-21 10:00:00.5Z").id == "10"
    assert captured.asked("59m55s ago").sequence == 5
    captured.point("cafe", TEN + timedelta(seconds=6, milliseconds=300), label="by hand")
    assert captured.asked("2026-09-21 10:00:06Z").id == "cafe"
    assert captured.asked("2026-09-21 10:00:06.2Z").sequence == 6
    assert captured.asked("by hand").id == "cafe"
    assert captured.asked("latest").sequence == 10
    old, new, (changed,) = diff(captured.session, "web", "#2", "#9", unit=4096)
    assert (old.sequence, new.sequence) == (2, 9)
    assert [(one.offset, one.length) for one in changed.extents] == [(0, 4096)]


def test_a_point_made_later_in_that_second_is_not_meant(captured):
    """P5-02: the last write before 10:00:03 is that of 10:00:02.7, whatever has been made a point."""
    captured.scribe.wall += 700_000_000
    captured.write(5)
    captured.confirm()
    assert captured.asked("#3").time == TEN + timedelta(seconds=3, milliseconds=700)
    assert captured.asked("2026-09-21T10:00:03Z").sequence == 2
    assert captured.asked("2026-09-21T10:00:03.7Z").sequence == 3


def test_a_time_in_a_gap_is_refused_with_both_sides(captured):
    """P5-38: with the reason, and what can be typed instead."""
    captured.write(5)
    captured.ledger.ended(captured.journal, 5, TEN + timedelta(seconds=6), "the journal died")
    back = TEN + timedelta(seconds=60)
    captured.write(5)
    captured.ledger.began(captured.journal, 8, back - timedelta(seconds=1))
    captured.point("60", back, sequence=9)
    captured.ledger.based(captured.journal, 9, back, "60")
    captured.confirm(back + timedelta(seconds=20))
    with pytest.raises(InGap, match="the journal died") as caught:
        captured.asked("2026-09-21T10:00:40Z")
    hint = caught.value.hint
    assert "#5, the state until 2026-09-21" in hint and ":00:06.000" in hint and "60 of 2026-09-21" in hint
    captured.holds(captured.asked(hint.split()[1].rstrip(",")), range(1, 6))
    with pytest.raises(InGap, match="the journal died") as caught:
        captured.asked("#7")
    assert caught.value.hint.startswith("nearest: #5 and #9; `#7?` takes")
    assert captured.asked("#10").parent == "60"
    with pytest.raises(InGap, match="not confirmed"):
        captured.asked("#11")
    with pytest.raises(InGap, match="still to come"):
        captured.asked("2026-09-21T11:00:01Z")
    with pytest.raises(InGap, match="not been seen"):
        captured.asked("2026-09-21T10:30:00Z")
    with pytest.raises(NoSuchPoint):
        captured.asked("nonsense")


def test_spans_that_meet_at_a_number_share_no_state(captured):
    """P5-38: what was written between them is in no record; the last point of one is no base of the next."""
    captured.write(5)
    captured.ledger.ended(captured.journal, 5, TEN + timedelta(seconds=6), "the journal died")
    assert captured.asked("#5").sequence == 5
    back = TEN + timedelta(seconds=60)
    captured.ledger.began(captured.journal, 5, back - timedelta(seconds=1))
    captured.point("0060", back, sequence=5, content=b"unseen")
    captured.ledger.based(captured.journal, 5, back, "0060")
    captured.scribe.wall = ns(back)
    captured.write(3)
    captured.confirm()
    later = captured.asked("#8")
    assert later.parent == "0060"
    captured.holds(later, range(6, 9), before=b"unseen")
    captured.holds(captured.asked("#5"), range(1, 6))
    assert captured.asked("2026-09-21T10:01:00.5Z").id == "0060"
    captured.holds(captured.asked("2026-09-21T10:01:02.5Z"), range(6, 8), before=b"unseen")


def test_after_a_revert_the_number_of_the_switch_is_what_was_left(captured):
    """P5-37: later ones are counted from where the revert went, on the new timeline; the old one stays reachable."""
    captured.write(6)
    captured.point("ab", TEN - timedelta(hours=1), content=b"old" * 100, timeline="t")
    captured.ledger.branch(captured.journal, 6, TEN + timedelta(seconds=6, milliseconds=500), "ab", "t2")
    captured.write(4)
    captured.confirm()
    captured.holds(captured.asked("#6"), range(1, 7))
    assert captured.asked("#6").timeline == "t"
    later = captured.asked("#9")
    assert (later.timeline, later.parent, later.sequence) == ("t2", "ab", 9)
    captured.holds(later, range(7, 10), before=b"old" * 100)
    assert captured.asked("2026-09-21T10:00:06.2Z").sequence == 6
    assert captured.asked("2026-09-21T10:00:06.8Z").id == "ab"
    captured.holds(captured.asked("#10"), range(7, 11), before=b"old" * 100)
    assert captured.asked("#10").parent == later.id
    captured.holds(captured.asked("#5"), range(1, 6))


def test_a_disk_that_has_grown_since_the_target_keeps_its_size_after_a_revert(captured):
    """P5-37: what is written after the revert can be reached, also beyond what the target's disk had."""
    captured.write(3)
    captured.ledger.ended(captured.journal, 3, TEN + timedelta(seconds=3), "vda was resized")
    captured.scribe.restart(vda=SIZE + 512)
    captured.ledger.began(captured.journal, 3, TEN + timedelta(seconds=4))
    captured.point("ab", TEN - timedelta(hours=1), content=b"old")
    captured.ledger.branch(captured.journal, 3, TEN + timedelta(seconds=5), "ab", "t2")
    captured.write(1, seal=False)
    captured.scribe.write("vda", SIZE + 500, b"end")
    captured.scribe.seal()
    captured.confirm()
    captured.holds(captured.asked("#4"), [4], before=b"old")
    point, repo = captured.asked("#5"), captured.session.repository
    assert point.disk("vda").size == SIZE + 512
    assert repo.read_chunk(repo.map(point.disk("vda").map).get(SIZE // CHUNK))[500:512] == b"end".ljust(12, b"\0")


def test_what_was_recorded_but_not_confirmed_is_offered_and_never_counted(captured):
    """P5-31, P5-38: after everything has died; who wants it says so, and no later instant is counted from it."""
    captured.write(5)
    captured.confirm()
    captured.write(3)
    with pytest.raises(InGap, match=r"write 7 .*not confirmed") as caught:
        captured.asked("#7")
    assert "`#7?` takes" in caught.value.hint
    with pytest.raises(InGap) as caught:
        captured.asked("2026-09-21T10:00:30Z")
    assert "`#8?` takes" in caught.value.hint
    captured.ledger.ended(captured.journal, None, None, "the process that captured has died")
    captured.ledger.began(captured.journal, 8, TEN + timedelta(seconds=20))
    captured.point("0020", TEN + timedelta(seconds=21), sequence=8, content=b"unseen")
    captured.ledger.based(captured.journal, 8, TEN + timedelta(seconds=21), "0020")
    captured.scribe.wall = ns(TEN + timedelta(seconds=21))
    captured.write(2)
    captured.confirm()
    said = []
    captured.session.say = said.append
    for number in (6, 8):
        point = captured.asked(f"#{number}?")
        assert (point.sequence, point.reason, point.parent) == (number, "unseen", "10")
        captured.holds(point, range(1, number + 1))
    assert len(said) == 2 and "a disk may lack writes" in said[0]
    with pytest.raises(InGap, match="has died") as caught:
        captured.asked("#7")
    assert "`#7?` takes" in caught.value.hint
    assert captured.asked("#5?") == captured.asked("#5")
    captured.holds(captured.asked("#10"), [9, 10], before=b"unseen")
    for beyond in ("#11?", "#99?"):
        with pytest.raises((InGap, SequenceMissing)):
            captured.asked(beyond)


@pytest.mark.parametrize("whole", [True, False])
def test_what_follows_a_revert_that_nobody_confirmed_is_not_even_offered(captured, whole):
    """P5-37: it would be counted from the history that was left."""
    captured.write(5)
    captured.confirm()
    captured.write(1)
    if whole:
        captured.ledger.branch(captured.journal, 6, TEN + timedelta(seconds=6), "10", "t2")
    else:
        captured.ledger.ended(captured.journal, 6, None, "a revert of vda alone")
    captured.write(2)
    if whole:
        assert captured.asked("#6?").reason == "unseen"
    with pytest.raises(InGap) as caught:
        captured.asked("#7?")
    assert "?" not in caught.value.hint


def test_a_time_that_came_twice_means_the_earlier_one(captured):
    """P5-02: the clock was set back by five seconds; going back too far loses less than going back too little."""
    captured.write(10)
    captured.scribe.wall = ns(TEN + timedelta(seconds=5))
    captured.write(10)
    captured.confirm()
    assert captured.asked("2026-09-21T10:00:08.5Z").sequence == 8
    assert captured.asked("2026-09-21T10:00:10Z").sequence == 15
    assert captured.asked("2026-09-21T10:00:12Z").sequence == 17


def test_what_the_spool_forgot_comes_from_the_repository(captured):
    """P5-27: also when a part is only here and another one only there."""
    for _ in range(3):
        captured.write(4)
    repo, spool = captured.session.repository, captured.home.spool(UUID)
    Shipper(repo, UUID, spool).once()
    for path in sorted(spool.glob("*.rwj"))[:2]:
        path.unlink()
    captured.write(3, seal=False)
    captured.scribe.leave_open()
    captured.confirm(TEN + timedelta(seconds=15))
    captured.holds(captured.asked("#5"), range(1, 6))
    captured.holds(captured.asked("#14"), range(1, 15))
    for path in spool.iterdir():
        path.unlink()
    captured.holds(captured.asked("2026-09-21T10:00:07.5Z"), range(1, 8))
    assert not list(captured.home.cache.glob("journal-*"))
    for lost in ("#15", "2026-09-21T10:00:12.5Z"):
        with pytest.raises(SequenceMissing, match=r"write 1[35]"):
            captured.asked(lost)


def refuse(*_):
    raise OSError(errno.EXDEV, "another disk")


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_forgotten_while_the_rest_is_fetched_is_not_missing(captured, monkeypatch, apart):
    """P5-29: a full spool goes on forgetting what was shipped, also a spool on a disk of its own."""
    spool, repo = captured.home.spool(UUID), captured.session.repository
    for _ in range(4):
        captured.write(3)
    captured.confirm()
    Shipper(repo, UUID, spool).once()
    first, second, *_ = sorted(spool.glob("*.rwj"))
    first.unlink()
    fetch = ship.fetch
    monkeypatch.setattr(ship, "fetch", lambda *given: (second.unlink(missing_ok=True), fetch(*given))[1])
    if apart:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    captured.holds(captured.asked("#12"), range(1, 13))


def test_points_that_were_forgotten_are_no_base(captured):
    """P5-27: the instant is refused; an older point is not passed off for it."""
    captured.write(5)
    captured.confirm()
    captured.point("aa", TEN - timedelta(hours=2))
    captured.session.repository.delete_point("10")
    with pytest.raises(InGap, match="forgotten"):
        captured.asked("2026-09-21T10:00:03Z")
    with pytest.raises(InGap) as caught:
        captured.asked("#3")
    assert caught.value.hint == "nearest: none"


def test_the_very_present_is_waited_for(captured):
    """P5-02: what is confirmed once a second may be asked for a moment too early."""
    now = datetime.now(UTC)
    captured.scribe.wall = ns(now - timedelta(seconds=2))
    captured.write(1)
    captured.confirm(now - timedelta(seconds=1))
    waited = []

    class Watching(Ledger):
        def spans(self):
            waited.append(1)
            if len(waited) == 3:
                captured.confirm(now + timedelta(seconds=1))
            return super().spans()

    from appliance.service import instant

    asked = instant._Asked(captured.session, _known(captured), now.isoformat(), now)
    asked._ledger = Watching(captured.home.ledger(UUID))
    assert asked.point().sequence == 1 and len(waited) >= 3


def _known(captured):
    from appliance.service.history import history

    return history(captured.session, "web", measure=False)
