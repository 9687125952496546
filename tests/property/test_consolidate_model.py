"""Journals of any shape against bytes: the point at any number is what the records up to it make of the base."""

from __future__ import annotations

import itertools
import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.capture.consolidate import consolidate
from appliance.journal import Journal
from appliance.model import DiskPoint, Point
from appliance.store import Repository, open_backend
from appliance.units import CHUNK, chunks_of
from tests.support.journal import Scribe, scribble

names = (f"memory://consolidate-model-{number}" for number in itertools.count())


def stored(repo, writer, image: bytes):
    pieces = enumerate(writer.put(image[at : at + CHUNK]) for at in range(0, len(image), CHUNK))
    return repo.write_map(None, len(image), [(index, chunk) for index, chunk in pieces if chunk], writer)


def content(repo, disk: DiskPoint) -> bytes:
    chunks = dict(repo.map(disk.map).items())
    return b"".join(repo.read_chunk(chunks.get(n, b"")) for n in range(chunks_of(disk.size)))[: disk.size]


def base_of(repo, scribe, images) -> Point:
    with repo.writer() as writer:
        disks = tuple(DiskPoint(name, len(image), stored(repo, writer, image)) for name, image in images.items())
    point = Point(
        "000000000001aaaa", "web", "8d0a4f0e-6f0c-4d8e-9d6e-000000000003", "test:///", datetime.now(UTC), "t", None,
        disks, journal=scribe.journal.hex(), sequence=scribe.sequence,
    )  # fmt: skip
    repo.commit(point)
    return point


class Play:
    """A base of random content, a journal over several segments and sessions, and every state in between."""

    def __init__(self, folder: Path, seed: int, records: int):
        dice = self.dice = random.Random(seed)
        (folder / "spool").mkdir()
        sizes = {f"vd{letter}": dice.randrange(1, 12 * CHUNK) for letter in "abcdef"[: dice.randint(1, 6)]}
        self.scribe = Scribe(folder / "spool", sizes, sequence=dice.choice([0, 0, 7, 10**6]))
        self.images = {name: bytearray(size) for name, size in sizes.items()}
        for image in self.images.values():
            if dice.random() < 0.7:
                image[: len(image) // 2] = dice.randbytes(len(image) // 2)
        url = next(names)
        Repository.create(open_backend(url), cache=folder / "cache", key=None).close()
        self.repo = Repository.open(open_backend(url), cache=folder / "cache", key=None)
        self.base = base_of(self.repo, self.scribe, self.images)
        self.records = list(self._records(records))

    def _records(self, count: int):
        before = {name: bytes(image) for name, image in self.images.items()}
        for number, name, offset, data in scribble(self.scribe, self.images, self.dice, count):
            yield number, name, offset, data
            if self.dice.random() < 0.1:
                self.scribe.seal()
            if self.dice.random() < 0.03:
                self.scribe.restart()
        if self.scribe.waiting:
            self.scribe.leave_open()
        self.before = before

    def state(self, upto: int) -> dict[str, bytes]:
        images = {name: bytearray(image) for name, image in self.before.items()}
        for number, name, offset, data in self.records:
            if name and number <= upto:
                images[name][offset : offset + len(data)] = data
        return {name: bytes(image) for name, image in images.items()}

    def holds(self, point: Point) -> dict[str, bytes]:
        return {disk.disk: content(self.repo, disk) for disk in point.disks}


@given(seed=st.integers(0, 2**32), records=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_any_number_in_one_step_or_several(seed, records):
    """P5-02, P5-38, P5-39: base and records up to N; by way of a point in between it is the very same maps."""
    with tempfile.TemporaryDirectory() as folder:
        play = Play(Path(folder), seed, records)
        with play.repo, Journal(play.scribe.folder) as journal:
            first, last = play.base.sequence, play.scribe.sequence
            one, two = sorted(play.dice.randint(first, last) for _ in range(2))
            halfway = consolidate(play.repo, play.base, journal, one)
            assert play.holds(halfway) == play.state(one)
            there = consolidate(play.repo, halfway, journal, two, label="by way of another")
            direct = consolidate(play.repo, play.base, journal, two)
            assert play.holds(direct) == play.state(two)
            assert [disk.map.root for disk in there.disks] == [disk.map.root for disk in direct.disks]
            before = play.state(one)
            for disk in there.disks if two > one else ():
                old, new = before[disk.disk], play.state(two)[disk.disk]
                assert list(disk.changed) == [
                    n for n in range(chunks_of(disk.size))
                    if old[n * CHUNK : (n + 1) * CHUNK] != new[n * CHUNK : (n + 1) * CHUNK]
                ]  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_many_more_numbers():
    """P5-02: 300 journals of up to 600 records."""
    for seed in range(300):
        with tempfile.TemporaryDirectory() as folder:
            play = Play(Path(folder), seed, 600)
            with play.repo, Journal(play.scribe.folder) as journal:
                point = play.base
                for upto in sorted(play.dice.randint(play.base.sequence, play.scribe.sequence) for _ in range(4)):
                    point = consolidate(play.repo, point, journal, upto)
                    assert play.holds(point) == play.state(upto)
