"""The reader of journals: golden files of version 1, damage of every kind, and thousands of random mutations."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import RewindError, SegmentCorrupt, SequenceMissing
from appliance.journal import Journal, Kind, Segment, latest, pieces
from appliance.journal.index import Index
from appliance.journal.layout import ENTRY, FOOTER, RECORD, Entry, crc32c
from tests.support.journal import Scribe

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "journal-1"
SIZES = {"vda": 1 << 20, "vdb": 1 << 19}


def replay(journal, upto=None):
    images = {name: bytearray(size) for name, size in SIZES.items()}
    for record in journal.records(1, None if upto is None else upto + 1):
        if record.kind == Kind.WRITE:
            images[record.disk][record.offset : record.offset + record.length] = record.data
        elif record.kind in (Kind.ZERO, Kind.TRIM):
            images[record.disk][record.offset : record.offset + record.length] = bytes(record.length)
    return images


class TestGolden:
    """A journal that version 1 of the plugin wrote: read for ever. `expected` was noted when it was made."""

    def test_it_reads_as_it_did_when_it_was_written(self):
        expected = dict(line.split(" ", 1) for line in (GOLDEN / "expected").read_text().splitlines())
        with Journal(GOLDEN) as journal:
            assert journal.verify() == []
            assert journal.last == int(expected["last"])
            assert [part.path.name for part in journal.parts] == expected["files"].split()
            assert [f"{m.sequence}:{m.label}" for m in journal.marks()] == expected["marks"].split("|")
            assert len(journal.sessions()) == int(expected["sessions"])
            assert journal.disks() == SIZES
            for name, image in replay(journal).items():
                assert hashlib.sha256(image).hexdigest() == expected[name]
            assert {record.kind for record in journal.records()} == set(Kind)
            assert [f"{r.disk}:{r.offset}:{r.length}" for r in journal.lost()] == expected["lost"].split()

    def test_newest_content_is_what_a_replay_gives(self):
        with Journal(GOLDEN) as journal:
            for after, upto in [(0, journal.last), (3, 17), (10, 11), (5, 5)]:
                before, target = replay(journal, after), replay(journal, upto)
                for name in SIZES:
                    for touched in latest(journal, name, after, upto):
                        start = touched.index << 16
                        chunk = before[name][start : start + 65536]
                        touched.apply(journal, chunk)
                        before[name][start : start + 65536] = chunk
                    assert before[name] == target[name]

    def test_numbers_that_are_not_there(self):
        with Journal(GOLDEN) as journal:
            with pytest.raises(SequenceMissing, match="it is not there"):
                list(journal.records(1, journal.last + 2))
            assert list(journal.records(journal.last + 1)) == []
            with pytest.raises(SequenceMissing):
                list(latest(journal, "vda", 0, journal.last + 1))
            assert list(latest(journal, "vda", 7, 7)) == [] == list(latest(journal, "nobody", 0, journal.last))
            assert pieces(journal, "vda", 0, 10, 4, 4) == []


@pytest.fixture
def spool(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "spool")
    return tmp_path / "spool"


def sealed(spool):
    return sorted(spool.glob("*.rwj"))


class TestDamage:
    def test_a_lost_segment_is_named(self, spool):
        lost = sealed(spool)[1]
        with Segment(lost) as segment:
            first, last = segment.first, segment.last
        lost.unlink()
        with Journal(spool) as journal:
            assert journal.holes() == [(first, last)]
            assert [(p.first, p.last) for p in journal.verify()] == [(first, last)]
            assert next(journal.records(last + 1)).sequence == last + 1
            with pytest.raises(SequenceMissing):
                list(journal.records(first))
            with pytest.raises(SequenceMissing):
                list(latest(journal, "vda", 0, journal.last))

    @pytest.mark.parametrize("cut", [0, 1, 87, 100, 500, -1, -71, -72, -73, -100])
    def test_a_sealed_segment_that_is_cut_is_damaged(self, spool, cut):
        path = sealed(spool)[0]
        data = path.read_bytes()
        path.write_bytes(data[:cut] if cut >= 0 else data[: len(data) + cut])
        with Journal(spool) as journal:
            problems = journal.verify()
            assert len(problems) == 1 and problems[0].path == path and problems[0].first == 1

    def test_a_segment_under_the_name_of_another_is_found(self, spool):
        a, b = sealed(spool)[:2]
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
        assert len(Journal(spool).verify()) == 2

    def test_every_flipped_bit_of_a_sealed_segment_is_found(self, spool):
        """No byte of a sealed segment can change without being noticed, but the last word, which is kept for later."""
        path = min(sealed(spool), key=lambda one: one.stat().st_size)
        whole = path.read_bytes()
        dice = random.Random(4)
        last = len(whole) - 4
        for place in [*range(260), *range(last - 150, last), *(dice.randrange(last) for _ in range(400))]:
            data = bytearray(whole)
            data[place] ^= 1 << dice.randrange(8)
            path.write_bytes(data)
            assert Journal(spool).verify(), f"byte {place} of {len(whole)}"


@pytest.mark.timeout(120)
def test_random_mutations_give_an_error_or_a_true_prefix(spool):
    """Whatever a file holds: a sentence or records that were written, never another exception, never a wrong byte."""
    originals = {path: path.read_bytes() for path in [*sealed(spool), *spool.glob("*.open")]}
    with Journal(GOLDEN) as journal:
        truth = {r.sequence: (r.disk, r.offset, r.length, r.kind, bytes(r.data)) for r in journal.records()}
    dice = random.Random(20)
    for n in range(2000):
        path = dice.choice(list(originals))
        data = bytearray(originals[path])
        mutate(data, dice)
        path.write_bytes(data)
        try:
            read_everything(path, truth)
        except RewindError as error:
            assert isinstance(error, SegmentCorrupt), f"seed 20, round {n}: {error!r}"
        path.write_bytes(originals[path])


def mutate(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        kind = dice.randrange(6)
        place = dice.randrange(len(data)) if data and dice.random() < 0.6 else dice.randrange(min(len(data), 400) or 1)
        if kind == 0 and data:
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            word = dice.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x524A5752, dice.randrange(1 << 32)])
            data[place : place + 4] = struct.pack("<I", word)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:place] = dice.randbytes(dice.randrange(1, 100))
        elif kind == 4:
            length = dice.randrange(1, 200)
            data[place : place + length] = bytes(length)
        else:
            other = dice.randrange(len(data) or 1)
            data[place : place + 60] = data[other : other + 60]


def read_everything(path: Path, truth) -> None:
    with Segment(path) as segment:
        for record in segment.records():
            found = (record.disk, record.offset, record.length, record.kind, bytes(record.data))
            assert truth[record.sequence] == found
        for disk in ["vda", "vdb", ""]:
            for entry in segment.entries(disk):
                record = segment.record(entry.position, entry.sequence)
                assert truth[record.sequence][1:4] == (entry.offset, entry.length, entry.kind)
        segment.find("vda", 0, 1 << 20)
        segment.verify()


def test_the_index_finds_long_requests_that_begin_far_before():
    entries = [
        Entry(0, 1 << 30, 1000, 5, 0, Kind.ZERO, 0),
        Entry(512 << 20, 4096, 2000, 6, 0, Kind.WRITE, 0),
        Entry((512 << 20) + 4096, 4096, 3000, 7, 0, Kind.WRITE, 0),
        Entry(512 << 20, 4096, 4000, 8, 1, Kind.WRITE, 0),
        Entry(0, 5, 5000, 9, 0xFFFF, Kind.MARK, 0),
    ]
    index = Index.of(entries, 5)
    assert [e.sequence for e in index.find(0, 512 << 20, (512 << 20) + 1)] == [6, 5]
    assert [e.sequence for e in index.find(0, (512 << 20) + 4095, (512 << 20) + 4097)] == [7, 6, 5]
    assert [e.sequence for e in index.find(0, 1 << 30, 1 << 31)] == []
    assert [e.sequence for e in index.entries(1)] == [8] and index.disks() == {0, 1, 0xFFFF}
    assert Index.of(index.entries(0), 5).with_more(e for e in entries if e.disk).data == index.data


def test_sizes_and_the_checksum_are_those_of_the_format():
    assert (RECORD.size, ENTRY.size, FOOTER.size) == (48, 24, 72)
    assert crc32c(b"123456789") == 0xE3069283


def test_a_time_that_came_twice_is_the_earlier_one(tmp_path):
    """P5-02: the last record before anything later, also where the clock was set back inside a segment."""
    scribe = Scribe(tmp_path, {"vda": 1 << 20}, step=10**9)
    for wall in (100, None, 50, None, 200):
        scribe.wall = scribe.wall if wall is None else wall * 10**9
        for _ in range(3):
            scribe.write("vda", 0, b"x")
        scribe.seal()
        scribe.mono += 5 * 10**9
    with Journal(tmp_path) as journal:
        times = [record.wall_ns for record in journal.records()]
        for seconds in [*range(99, 110), *range(50, 60), 200, 201, 203, 999]:
            for after, upto in [(0, None), (0, 15), (4, 15), (8, 14)]:
                later = [n for n in range(after + 1, (upto or 15) + 1) if times[n - 1] > seconds * 10**9]
                assert journal.at(seconds * 10**9, after, upto) == (later[0] - 1 if later else upto or 15)
        with pytest.raises(SequenceMissing):
            journal.at(0, 3, 16)


def test_a_segment_that_gets_its_name_while_it_is_looked_at(spool):
    """P5-27: its file is begun under one number, and named by its first record as soon as that is known."""
    (opened,) = spool.glob("*.open")
    first = int(opened.stem)
    data = bytearray(opened.read_bytes())
    length = int.from_bytes(data[8:12], "little")
    data[48:56] = (first - 2).to_bytes(8, "little")
    data[80:84] = bytes(4)
    data[80:84] = crc32c(bytes(data[:length])).to_bytes(4, "little")
    opened.unlink()
    early = spool / f"{first - 2:020}.open"
    early.write_bytes(data)
    with Journal(spool) as journal:
        early.rename(spool / f"{first:020}.open")
        assert next(journal.records(first)).sequence == first
    with Journal(spool) as journal:
        (spool / f"{first:020}.open").unlink()
        with pytest.raises(SequenceMissing):
            next(journal.records(first))


def test_an_empty_folder_is_an_empty_journal(tmp_path):
    with Journal(tmp_path) as journal:
        assert (journal.first, journal.last, journal.at(1)) == (0, 0, 0)
        assert list(journal.records()) == [] == journal.verify()
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "nothing")


def test_latest_is_the_function_whatever_is_loaded_first():
    """Its module has the same name, and names are loaded when they are used."""
    look = "import appliance.journal as j; {first}; from appliance.journal import latest; print(callable(latest))"
    for first in ("j.Piece", "j.latest", "j.Journal", "j.pieces, j.latest, j.Touched"):
        done = subprocess.run([sys.executable, "-c", look.format(first=first)], capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
