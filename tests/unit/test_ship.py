"""Segments leave the host and come back: nothing twice, nothing half, and never a claim about what is not there."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from appliance.capture import ship
from appliance.errors import AlreadyExists, RewindError, SegmentCorrupt, SequenceMissing, Temporary
from appliance.journal import Segment
from appliance.store import Key, Repository, parted
from appliance.store.backend.faulty import Crashed, Fault, Faulty, at
from appliance.store.backend.memory import MemoryBackend
from appliance.store.check import check
from tests.support.journal import SECOND, Scribe, scribble
from tests.support.store import DOMAIN

KEY = Key(bytes(range(32)))
JOURNAL = bytes(range(16)).hex()
DISKS = {"vda": 1 << 20, "vdb": 1 << 18}
_names = itertools.count()


@pytest.fixture
def place(tmp_path):
    place = MemoryBackend(f"ship-{next(_names)}")
    Repository.create(place, cache=tmp_path / "cache", key=KEY).close()
    return place


@pytest.fixture
def repo(place, tmp_path):
    with Repository.open(place, cache=tmp_path / "cache", key=KEY) as repo:
        yield repo


@pytest.fixture
def scribe(tmp_path):
    (tmp_path / "spool").mkdir()
    return Scribe(tmp_path / "spool", DISKS)


def fill(scribe, segments, records=12, seed=1):
    """Sealed segments of random records; their paths."""
    images, dice = {name: bytearray(size) for name, size in DISKS.items()}, random.Random(seed)
    paths = []
    for _ in range(segments):
        list(scribble(scribe, images, dice, records))
        paths.append(scribe.seal())
    return paths


def names(paths):
    return [path.name for path in paths]


def shipper(repo, scribe, **options):
    return ship.Shipper(repo, DOMAIN, scribe.folder, **options)


def test_what_was_sealed_is_shipped_once_and_oldest_first(repo, scribe, tmp_path):
    """P5-30, P5-31: the guest's writes do not wait for any of this."""
    paths = fill(scribe, 3)
    scribe.write("vda", 0, b"x" * 512)
    scribe.leave_open()
    ours = shipper(repo, scribe)
    first = ours.once()
    assert (first.segments, first.bytes) == (3, sum(path.stat().st_size for path in paths))
    assert first.stored == sum(ref.stored for ref in repo.segments(DOMAIN))
    assert ours.once().segments == 0
    assert shipper(repo, scribe).once().segments == 0  # another process: the listing tells
    assert [(ref.journal, ref.first, ref.last) for ref in repo.segments()] == [
        (JOURNAL, 1, 12), (JOURNAL, 13, 24), (JOURNAL, 25, 36)
    ]  # fmt: skip
    assert ours.shipped() == 36
    journal = ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / "back", 0, 36)
    assert [path.read_bytes() for path in paths] == [part.path.read_bytes() for part in journal.parts]
    assert journal.verify() == []
    for part in journal.parts:
        with Segment(part.path) as segment:
            segment.verify()


def test_fetch_brings_what_covers_the_range_and_nothing_twice(repo, scribe, tmp_path):
    paths = fill(scribe, 5)
    shipper(repo, scribe).once()
    back = tmp_path / "back"
    fetched = []
    journal = ship.fetch(repo, DOMAIN, JOURNAL, back, 12, 30, lambda done, total: fetched.append((done, total)))
    assert names(part.path for part in journal.parts) == names(paths[1:3])
    assert fetched == [(1, 2), (2, 2)]
    assert [record.sequence for record in journal.records(13, 31)] == list(range(13, 31))
    before = {path: path.stat().st_ino for path in back.iterdir()}
    assert ship.fetch(repo, DOMAIN, JOURNAL, back, 20, 37).last == 48
    assert {path: path.stat().st_ino for path in before} == before
    assert sorted(names(back.iterdir())) == names(paths[1:4])
    assert ship.fetch(repo, DOMAIN, JOURNAL, back, 40, 40).parts


def test_what_is_missing_is_named(repo, scribe, tmp_path):
    """Never a journal with a hole: the first number that is not there is told."""
    fill(scribe, 4)
    shipper(repo, scribe).once()
    repo.delete_segment(repo.segments()[1])
    back = tmp_path / "back"
    for after, upto, missing, reason in [
        (0, 40, 13, "what follows begins with 25"),
        (14, 15, 15, "what follows begins with 25"),
        (24, 50, 49, "nothing later was shipped"),
    ]:
        with pytest.raises(SequenceMissing, match=f"write {missing}: {reason}") as caught:
            ship.fetch(repo, DOMAIN, JOURNAL, back, after, upto)
        assert caught.value.fields["sequence"] == missing
    with pytest.raises(SequenceMissing, match="write 1: nothing later"):
        ship.fetch(repo, DOMAIN, "ff" * 16, back, 0, 1)
    assert not back.exists()
    assert ship.held(repo, DOMAIN, JOURNAL) == [(1, 12), (25, 48)]
    assert ship.held(repo, DOMAIN, "ff" * 16) == []


def test_retiring_takes_from_the_front_only_what_ends_before(repo, scribe):
    """P5-27, P5-29: after its time a journal lives on in points alone."""
    fill(scribe, 4)
    ours = shipper(repo, scribe)
    ours.once()
    sizes = [ref.stored for ref in repo.segments()]
    assert ship.retire(repo, DOMAIN, JOURNAL, 11) == (0, 0)
    assert ship.retire(repo, DOMAIN, "ff" * 16, 99) == (0, 0)
    assert ship.retire(repo, DOMAIN, JOURNAL, 30) == (2, sum(sizes[:2]))
    assert ship.held(repo, DOMAIN, JOURNAL) == [(25, 48)]
    assert shipper(repo, scribe).once(after=30).segments == 0  # the spool still has them
    assert ship.retire(repo, DOMAIN, JOURNAL, 99) == (2, sum(sizes[2:]))
    assert list(repo.backend.list("segments/")) == []


def test_retiring_takes_what_broken_shipping_left(repo, scribe):
    (path,) = fill(scribe, 1)
    ref = repo.put_segment(DOMAIN, JOURNAL, 1, 12, path)
    repo.backend.put(f"{ref.name}.1", b"left over")
    repo.backend.delete(ref.name)
    assert ship.retire(repo, DOMAIN, JOURNAL, 12)[0] == 0
    assert list(repo.backend.list("segments/")) == []


def test_the_age_of_the_oldest_record_that_is_here_alone(repo, scribe):
    """The far recovery point objective, told without the repository."""
    scribe.wall = time.time_ns() - 60 * SECOND
    ours = shipper(repo, scribe)
    assert ours.behind() == ship.Behind(0.0, 0, 0)
    (path,) = fill(scribe, 1)
    behind = ours.behind()
    assert (behind.segments, behind.bytes) == (1, path.stat().st_size)
    assert 59 < behind.seconds < 70
    scribe.wall += 30 * SECOND
    scribe.write("vda", 0, b"y" * 512)
    scribe.leave_open()
    assert 29 < ours.once().behind.seconds < 40
    assert ours.behind().segments == 0
    assert 29 < ours.behind(after=12).seconds < 40


def test_a_repository_that_is_away_hurts_nobody(place, scribe, tmp_path):
    """P5-31: what was sealed waits; the error says where, the next pass goes on behind what got there."""
    paths = fill(scribe, 3)
    before = {path: path.read_bytes() for path in paths}
    down = threading.Event()
    puts = itertools.count(1)

    def plan(operation):
        if operation.kind == "put" and operation.name.startswith("segments/"):
            return Fault.REFUSE if down.is_set() or next(puts) == 2 else None
        return Fault.REFUSE if down.is_set() else None

    with Repository.open(Faulty(place, plan), cache=tmp_path / "c", key=KEY) as repo:
        ours = shipper(repo, scribe)
        with pytest.raises(Temporary):
            ours.once()
        assert (len(repo.segments()), ours.shipped(), ours.behind().segments) == (1, 12, 2)
        down.set()
        with pytest.raises(Temporary):
            ours.once()
        assert ours.behind().segments == 2
        down.clear()
        assert ours.once().segments == 2
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.LOSE, Fault.REPEAT, Fault.NO_SPACE, Fault.TEAR, Fault.LIE])
def test_errors_at_every_operation(place, scribe, tmp_path, fault):
    """What is reported as shipped is there; what a lying store broke is named by check and can be shipped anew."""
    paths = fill(scribe, 2, records=4)
    for number in itertools.count(1):
        other = copy_of(place)
        faulty = Faulty(other, at(number, fault))
        shipped = 0
        try:
            with Repository.open(faulty, cache=tmp_path / f"c{number}", key=KEY) as repo:
                shipped = shipper(repo, scribe).once().segments
        except (RewindError, ValueError):
            pass
        with Repository.open(other, cache=tmp_path / f"d{number}", key=KEY) as repo:
            bad = {problem.object for problem in check(repo, read_data=True).problems}
            assert not bad or fault in {Fault.TEAR, Fault.LIE}  # what no store of the contract does
            for ref in repo.segments():
                if ref.name in bad:
                    repo.delete_segment(ref)
            assert shipped <= len(repo.segments()) + len(bad)
            shipper(repo, scribe).once()
            back = ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / f"back{number}", 0, 8)
            assert [part.path.read_bytes() for part in back.parts] == [path.read_bytes() for path in paths]
        if len(faulty.operations) < number:
            break
    assert number > 4


@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_AFTER])
def test_death_at_every_operation(place, scribe, tmp_path, monkeypatch, fault):
    """P5-31: shipping and retiring, in parts, killed before and after each call: the next one ends it."""
    monkeypatch.setattr(parted, "PART", 8 * parted.FRAME)
    sizes = DISKS | {"vda": 64 << 20}
    scribe.disks = sizes
    dice, paths = random.Random(3), []
    for _ in range(2):
        for turn in range(10):
            scribe.write("vda", turn << 20, dice.randbytes(1 << 20))
        paths.append(scribe.seal())

    def work(repo):
        shipper(repo, scribe).once()
        ship.retire(repo, DOMAIN, JOURNAL, 10)

    for number in itertools.count(1):
        other = copy_of(place)
        crashed = False
        try:
            with Repository.open(Faulty(other, at(number, fault)), cache=tmp_path / f"c{number}", key=KEY) as repo:
                work(repo)
        except Crashed:
            crashed = True
        with Repository.open(other, cache=tmp_path / f"d{number}", key=KEY) as repo:
            assert check(repo, read_data=True).ok
            for ref in repo.segments():
                path = tmp_path / "one"
                repo.fetch_segment(ref, path)
                assert path.read_bytes() == paths[ref.first // 11].read_bytes()
            work(repo)
            assert [(one.first, one.last, one.whole) for one in repo.segments(whole=False)] == [(11, 20, True)]
        if not crashed:
            break
    assert number > 9


def copy_of(place):
    other = MemoryBackend(f"ship-{next(_names)}")
    for info in place.list():
        other.put(info.name, place.get(info.name))
    return other


def test_a_segment_that_can_never_be_shipped_does_not_hold_up_the_others(repo, scribe, caplog):
    paths = fill(scribe, 4)
    data = bytearray(paths[1].read_bytes())
    data[-20] ^= 1  # of the footer
    paths[1].write_bytes(data)
    (scribe.folder / "elsewhere").mkdir()
    stranger = Scribe(scribe.folder / "elsewhere", DISKS)
    stranger.sequence = 24
    (other,) = fill(stranger, 1, seed=9)
    repo.put_segment(DOMAIN, JOURNAL, 25, 36, other)
    ours = shipper(repo, scribe)
    ours._listed, ours._shipped = time.monotonic(), set()  # as if the stranger came after the listing
    done = ours.once()
    assert (done.segments, [type(error) for error in done.refused]) == (2, [SegmentCorrupt, AlreadyExists])
    assert (done.behind.segments, ours.shipped()) == (2, 12)
    assert [type(error) for error in ours.once().refused] == [SegmentCorrupt, AlreadyExists]
    assert len([one for one in caplog.records if "is not shipped" in one.message]) == 2, "not each second again"
    assert ours.shipped(after=24) == 24, "what nobody wants any more does not fill the spool for ever"


def test_another_journal_in_the_same_spool_is_another_journal(repo, scribe, tmp_path):
    """A spool that was emptied counts from 1 again."""
    ours = shipper(repo, scribe)
    for path in fill(scribe, 2):
        ours.once()
        path.unlink()
    fresh = Scribe(scribe.folder, DISKS, journal=b"\xaa" * 16)
    paths = fill(fresh, 2, seed=2)
    assert ours.once().segments == 2
    assert {ref.journal for ref in repo.segments()} == {JOURNAL, "aa" * 16}
    back = ship.fetch(repo, DOMAIN, "aa" * 16, tmp_path / "back", 0, 24)
    assert [part.path.read_bytes() for part in back.parts] == [path.read_bytes() for path in paths]
    with pytest.raises(SegmentCorrupt, match="not of journal"):
        ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / "back", 0, 12)


def test_segments_that_the_journal_forgets_meanwhile(repo, scribe, monkeypatch):
    paths = fill(scribe, 3)
    ours = shipper(repo, scribe)
    put = repo.put_segment

    def slow(*arguments):
        paths[1].unlink(missing_ok=True)
        return put(*arguments)

    monkeypatch.setattr(repo, "put_segment", slow)
    assert ours.once().segments == 2
    assert ship.held(repo, DOMAIN, JOURNAL) == [(1, 12), (25, 36)]


def test_the_rate_is_kept_and_stopping_is_quick(repo, scribe):
    scribe.disks = {"vda": 64 << 20}
    dice = random.Random(5)
    for _ in range(4):
        scribe.write("vda", 0, dice.randbytes(200_000))
        scribe.seal()
    began = time.monotonic()
    assert shipper(repo, scribe, rate=1_000_000).once().segments == 4
    assert time.monotonic() - began > 0.55  # the first one is free
    for ref in repo.segments():
        repo.delete_segment(ref)
    stop = threading.Event()
    ours = shipper(repo, scribe, rate=20_000, stop=stop)
    thread = threading.Thread(target=lambda: done.append(ours.once()))
    done = []
    thread.start()
    time.sleep(0.2)
    stop.set()
    thread.join(5)
    assert done
    assert done[0].segments < 4


def test_two_shippers_and_two_fetchers_at_once(place, scribe, tmp_path):
    paths = fill(scribe, 6)
    with Repository.open(place, cache=tmp_path / "a", key=KEY) as repo:
        results, back = [], tmp_path / "back"

        def both():
            results.append(shipper(repo, scribe).once())
            results.append(ship.fetch(repo, DOMAIN, JOURNAL, back, 0, 72).verify())

        threads = [threading.Thread(target=both) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(results) == 6
        assert sorted(names(back.iterdir())) == names(paths)
        assert len(repo.segments(whole=False)) == 6
        assert check(repo, read_data=True).ok
