"""From journal to point: what it keeps, what it refuses, and that a point is there whole or not at all."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from appliance.capture.consolidate import consolidate
from appliance.errors import InGap, JournalError, SegmentCorrupt, SequenceMissing
from appliance.journal import Journal
from appliance.model import Consistency, DiskKind, DiskPoint, MapRef, Point
from appliance.store import Repository, open_backend
from appliance.store.backend.faulty import Crashed, Fault, Faulty, at
from appliance.store.gc import gc
from appliance.units import CHUNK
from tests.support.journal import START_NS, Scribe

SIZES = {"vda": 9 * CHUNK + 512, "vdb": 3 * CHUNK}
UUID = "8d0a4f0e-6f0c-4d8e-9d6e-000000000002"
names = (f"memory://consolidate-{number}" for number in itertools.count())


def base_of(repo, scribe, sequence=0) -> Point:
    """A point of empty disks at that number, with a TPM whose state belongs to it."""
    moment = datetime.fromtimestamp(START_NS // 10**9, UTC)
    with repo.writer() as writer:
        tpm = repo.write_map(None, 100, [(0, writer.put(b"tpm"))], writer)
    disks = [DiskPoint(name, size, MapRef(b"", size), attributes={"bus": "virtio", "bitmap": "rw-1-2"})
             for name, size in scribe.disks.items()]  # fmt: skip
    point = Point(
        "000000000001aaaa", "web", UUID, "test:///", moment, "t", None,
        (*disks, DiskPoint("tpm", 100, tpm, DiskKind.TPM)), Consistency.OFFLINE, label="begin", xml="<domain/>",
        journal=scribe.journal.hex(), sequence=sequence,
    )  # fmt: skip
    repo.commit(point)
    return point


def content(repo, disk: DiskPoint) -> bytes:
    chunks = dict(repo.map(disk.map).items())
    whole = b"".join(repo.read_chunk(chunks.get(n, b"")) for n in range(-(-disk.size // CHUNK)))
    return whole[: disk.size]


@pytest.fixture
def scribe(tmp_path):
    (tmp_path / "spool").mkdir()
    return Scribe(tmp_path / "spool", SIZES)


@pytest.fixture
def repo(tmp_path):
    url = next(names)
    Repository.create(open_backend(url), cache=tmp_path / "cache", key=None).close()
    with Repository.open(open_backend(url), cache=tmp_path / "cache", key=None) as repo:
        yield repo


def consolidated(repo, base, scribe, upto, **more):
    with Journal(scribe.folder) as journal:
        return consolidate(repo, base, journal, upto, **more)


def test_a_point_says_where_it_is_and_what_it_took_over(repo, scribe):
    """P5-02, P5-03: place in the journal, time, changes against the base; an untouched disk keeps its map."""
    base = base_of(repo, scribe)
    scribe.write("vda", 10, b"abc")
    scribe.write("vda", 5 * CHUNK - 1, b"xy")
    scribe.seal()
    scribe.write("vda", 0, b"later")
    scribe.leave_open()
    point = consolidated(repo, base, scribe, 2, label="found")
    assert point == repo.point(point.id)
    assert (point.journal, point.sequence) == (scribe.journal.hex(), 2)
    assert point.time == base.time + timedelta(milliseconds=2)
    assert (point.parent, point.timeline, point.xml, point.label) == (base.id, "t", "<domain/>", "found")
    assert point.reason == "journal" and point.consistency is Consistency.CRASH
    assert point.disk("vda").changed == (0, 4, 5) and point.disk("vda").changed_bytes == 3 * CHUNK
    assert point.disk("vda").attributes == {"bus": "virtio"}
    assert point.disk("vdb").map == base.disk("vdb").map and point.disk("vdb").changed == ()
    assert point.disk("tpm").map == base.disk("tpm").map
    assert point.notes == (f"tpm as of point {base.id}: the journal has the disks only",)
    expected = bytearray(SIZES["vda"])
    expected[10:13], expected[5 * CHUNK - 1 : 5 * CHUNK + 1] = b"abc", b"xy"
    assert content(repo, point.disk("vda")) == expected


def test_what_was_written_back_to_what_it_was_is_no_change(repo, scribe):
    """P5-03: nothing is stored for it, and the map is the base's."""
    base = base_of(repo, scribe)
    scribe.write("vda", 3 * CHUNK, b"a" * CHUNK)
    scribe.write("vda", 3 * CHUNK, bytes(1000))
    scribe.trim("vda", 3 * CHUNK + 1000, CHUNK - 1000)
    scribe.seal()
    point = consolidated(repo, base, scribe, 3)
    assert point.disk("vda").map == base.disk("vda").map and point.disk("vda").changed == ()
    assert point.stats.new_chunks == 0


def test_asked_again_it_is_the_same_point(repo, scribe):
    """P5-02: also when the journal is gone but for its last record; the base's own number is the base."""
    base = base_of(repo, scribe)
    for n in range(6):
        scribe.write("vda", n * CHUNK, b"x" * 100)
        if n in (2, 4):
            scribe.seal()
    scribe.leave_open()
    first = consolidated(repo, base, scribe, 6)
    stored = len(list(repo.backend.list("packs/")))
    for path in scribe.folder.glob("*.rwj"):
        path.unlink()
    assert consolidated(repo, base, scribe, 6) == first
    assert consolidated(repo, base, scribe, 0) is base
    assert len(list(repo.backend.list("packs/"))) == stored
    with pytest.raises(SequenceMissing, match="write 1"):
        consolidated(repo, base, scribe, 6, label="another")
    with pytest.raises(SequenceMissing, match="it is not there"):
        consolidated(repo, base, scribe, 7)
    with pytest.raises(SequenceMissing, match="is younger"):
        consolidated(repo, first, scribe, 5)


def test_from_a_branch_the_target_counts(repo, scribe):
    """P5-37: what a point is based on may be the target of a revert, at the number of the switch."""
    base = base_of(repo, scribe)
    scribe.write("vda", 0, b"1")
    scribe.write("vda", 0, b"2")
    scribe.write("vda", 100, b"3")
    scribe.seal()
    one = consolidated(repo, base, scribe, 1)
    branch = replace(one, sequence=2, timeline="other")
    point = consolidated(repo, branch, scribe, 3)
    assert point.timeline == "other" and point.parent == one.id and point.sequence == 3
    assert content(repo, point.disk("vda"))[:101] == b"1" + bytes(99) + b"3"


def test_a_lost_request_is_a_gap(repo, scribe):
    """P5-38: nothing after it is claimed; before it everything is."""
    base = base_of(repo, scribe)
    scribe.write("vda", 0, b"1")
    scribe.lost("vdb", 0, 512)
    scribe.write("vda", 0, b"2")
    scribe.seal()
    assert content(repo, consolidated(repo, base, scribe, 1).disk("vda"))[:1] == b"1"
    with pytest.raises(InGap, match="refused a request on vdb, write 2") as caught:
        consolidated(repo, base, scribe, 3)
    assert caught.value.hint == f"nearest: point {base.id} and write 1"
    assert len(repo.points()) == 2


@pytest.mark.parametrize("disks", [{"vda": 10 * CHUNK}, {"vda": 9 * CHUNK + 512}, {**SIZES, "vdc": CHUNK}])
def test_other_disks_or_sizes_are_a_gap(repo, scribe, disks):
    """P5-38: a resize, a disk that came or went."""
    base = base_of(repo, scribe)
    scribe.write("vda", 0, b"1")
    scribe.restart(**disks)
    scribe.write("vda", 0, b"2")
    scribe.seal()
    assert consolidated(repo, base, scribe, 1).sequence == 1
    with pytest.raises(InGap, match=f"vda of {disks['vda']} bytes"):
        consolidated(repo, base, scribe, 2)


def test_another_journal_and_a_point_without_one(repo, scribe):
    base = base_of(repo, scribe)
    scribe.journal = bytes(16)
    scribe.write("vda", 0, b"1")
    path = scribe.seal()
    with pytest.raises(JournalError, match="is not of journal"):
        consolidated(repo, base, scribe, 1)
    with pytest.raises(JournalError, match="without a journal"):
        consolidated(repo, replace(base, journal="", sequence=None), scribe, 1)
    scribe.journal = bytes(range(16))
    scribe.sequence = 0
    scribe.write("vda", 0, b"1" * 100)
    data = bytearray(scribe.seal().read_bytes())
    data[88 + 80 + 48 + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(SegmentCorrupt):
        consolidated(repo, base, scribe, 1)
    assert len(repo.points()) == 1


def test_a_crash_at_any_call_leaves_no_point_or_a_whole_one(tmp_path, scribe):
    """P5-36: after each, a repetition makes the point, and what was stored is not stored again."""
    for n in range(9):
        scribe.write("vda", n * CHUNK, bytes([n + 1]) * 5000)
    scribe.seal()
    for number in itertools.count(1):
        url = next(names)
        Repository.create(open_backend(url), cache=tmp_path / f"{number}", key=None).close()
        with Repository.open(open_backend(url), cache=tmp_path / f"{number}", key=None) as repo:
            base = base_of(repo, scribe)
            packs = len(list(repo.backend.list("packs/")))
        faulty = Faulty(open_backend(url), at(number, Fault.CRASH_AFTER))
        crashed = False
        try:
            consolidated(Repository.open(faulty, cache=tmp_path / f"{number}", key=None), base, scribe, 9)
        except Crashed:
            crashed = True
        with Repository.open(open_backend(url), cache=tmp_path / f"{number}b", key=None) as repo:
            there = [point for point in repo.points() if point.sequence == 9]
            uploaded = len(list(repo.backend.list("packs/"))) > packs
            point = consolidated(repo, base, scribe, 9)
            assert there or point.stats.new_chunks == (0 if uploaded else 9)
            assert there in ([], [replace(point, disks=there[0].disks if there else ())])
            assert content(repo, point.disk("vda")) == b"".join(
                (bytes([n + 1]) * 5000).ljust(CHUNK, b"\0") for n in range(9)
            ) + bytes(512)
        if not crashed:
            assert number > 5
            return


def test_two_that_ask_at_the_same_moment_get_the_same_point(repo, tmp_path, scribe):
    """P5-36: whoever comes second finds the other's, whatever it cost him."""
    base = base_of(repo, scribe)
    for n in range(4):
        scribe.write("vda", n * CHUNK, b"x" * (n + 1))
    scribe.seal()
    with Repository.open(open_backend(repo.url), cache=tmp_path / "other", key=None) as other:
        found = []

        def meanwhile(done, _disk):
            if done == 2:
                found.append(consolidated(other, base, scribe, 4))

        point = consolidated(repo, base, scribe, 4, progress=meanwhile)
    assert len(repo.points()) == 2 and repo.point(point.id) == point == found[0]


def test_what_is_stored_outlives_a_gc_before_it_is_committed(repo, tmp_path, scribe, monkeypatch):
    """P5-09: no point refers to it yet, and gc waits for whoever is about to make one."""
    base = base_of(repo, scribe)
    scribe.write("vda", 0, b"a" * CHUNK)
    scribe.seal()
    commit, waiting = Repository.commit, []

    def late(self, point):
        with Repository.open(open_backend(repo.url), cache=tmp_path / "other", key=None) as other:
            waiting.extend(gc(other).waiting)
        commit(self, point)

    monkeypatch.setattr(Repository, "commit", late)
    point = consolidated(repo, base, scribe, 1)
    assert content(repo, point.disk("vda"))[:CHUNK] == b"a" * CHUNK
    assert len(waiting) == 1 and "writes of web up to 1" in waiting[0]


def test_memory_does_not_grow_with_the_journal(tmp_path, scribe):
    """P5-02: 160 MiB of journal in half of that, which is mostly packs on their way."""
    scribe.disks = {"vda": 512 << 20}
    data = random.Random(1).randbytes(1 << 20)
    for n in range(160):
        scribe.write("vda", n * 3 % 512 << 20, data[n:] + data[:n])
        if n % 16 == 15:
            scribe.seal()
    Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path / "cache", key=None).close()
    with Repository.open(open_backend(str(tmp_path / "r")), cache=tmp_path / "cache", key=None) as repo:
        base = base_of(repo, scribe)
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmHWM")
        point = consolidated(repo, base, scribe, 160)
        assert point.disk("vda").changed_bytes == 160 << 20
        assert _memory("VmHWM") - before < 80 << 20


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
