"""The host is gone: the repository gives back the newest instant that it can prove, and claims nothing else."""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from appliance.capture import salvage, ship
from appliance.capture.consolidate import consolidate
from appliance.config import Home
from appliance.errors import InGap, IntegrityError, NoSuchPoint
from appliance.model import DiskPoint, MapRef, Point
from appliance.service.instant import resolve
from appliance.service.session import Session
from appliance.service.setup import init
from appliance.store import Key, Repository, open_backend
from appliance.store.check import check
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK
from tests.support.journal import SECOND, Scribe, scribble
from tests.support.store import DOMAIN

SIZES = {"vda": 40 * CHUNK + 512, "vdb": 5 * CHUNK}
KEY = Key(bytes(range(32)))


class Host:
    """A host whose capture is shipped to `url`; `states` by number is what the disks were then."""

    def __init__(self, folder, url):
        self.folder, self.url = folder, url
        (folder / "spool").mkdir()
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.scribe = Scribe(folder / "spool", dict(SIZES))
        self.journal = self.scribe.journal.hex()
        self.images = {name: bytearray(size) for name, size in SIZES.items()}
        self.states = {0: self.copy()}
        self.dice = random.Random(4)
        Repository.create(open_backend(url), cache=folder / "cache", key=KEY).close()

    @property
    def now(self):
        self.scribe.wall += SECOND // 1000
        return datetime.fromtimestamp(self.scribe.wall / SECOND, UTC)

    def copy(self):
        return {name: bytes(image) for name, image in self.images.items()}

    def begin(self):
        self.ledger.began(self.journal, self.scribe.sequence, self.now)

    def look(self):
        self.ledger.confirmed(self.journal, self.scribe.sequence, self.now)

    def write(self, records):
        for number, *_ in scribble(self.scribe, self.images, self.dice, records):
            self.states[number] = self.copy()

    def ship(self):
        if self.scribe.waiting:
            self.scribe.seal()
        with self.open() as repo:
            return ship.Shipper(repo, DOMAIN, self.scribe.folder, ledger=self.ledger).once()

    def open(self, cache="cache"):
        return Repository.open(open_backend(self.url), cache=self.folder / cache, key=KEY)

    def point(self, name, *, timeline="t", based=True):
        """At the present."""
        time = self.now
        with self.open() as repo:
            with repo.writer() as writer:
                disks = []
                for disk, image in self.copy().items():
                    chunks = [(n, image[n * CHUNK : (n + 1) * CHUNK]) for n in range(-(-len(image) // CHUNK))]
                    changes = [(n, writer.put(data.ljust(CHUNK, b"\0"))) for n, data in chunks if data.strip(b"\0")]
                    ref = repo.write_map(None, len(image), changes, writer) if changes else MapRef(b"", len(image))
                    disks.append(DiskPoint(disk, len(image), ref))
            point = Point(
                name, "web", DOMAIN, "test:///", time, timeline, None, tuple(disks),
                journal=self.journal, sequence=self.scribe.sequence,
            )  # fmt: skip
            repo.commit(point)
        if based:
            self.ledger.based(self.journal, self.scribe.sequence, time, name)
        return point

    def round(self, records):
        self.write(records)
        self.look()
        return self.ship()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path, f"memory://{tmp_path}")
    host.begin()
    return host


def content(repo, point):
    found = {}
    for disk in point.disks:
        chunks = dict(repo.map(disk.map).items())
        whole = b"".join(repo.read_chunk(chunks.get(n, b"")) for n in range(-(-disk.size // CHUNK)))
        found[disk.disk] = whole[: disk.size]
    return found


def assert_given_back(host, upto, reason="", timeline="t"):
    """By a repository that was opened anew, with nothing of the host."""
    elsewhere = host.folder / f"new-{random.random()}"
    with host.open(elsewhere.name) as repo:
        found = salvage.newest(repo, DOMAIN, elsewhere)
        assert (found.upto, found.reason) == (upto, reason)
        made = found.base
        if found.journal is not None:
            made = consolidate(repo, found.base, found.journal, found.upto)
        assert (made.sequence, content(repo, made), made.timeline) == (upto, host.states[upto], timeline)
        if found.journal is not None and found.upto != found.base.sequence:
            repo.delete_point(made.id)


def test_the_last_shipped_record_is_given_back(host):
    """P5-30, P5-33: the repository alone is enough, whatever was in the spool besides."""
    host.point("p1")
    host.round(40)
    host.point("p2")
    host.round(30)
    host.round(20)
    host.write(10)
    host.scribe.leave_open()
    assert_given_back(host, 90)
    with host.open() as repo:
        ship.retire(repo, DOMAIN, host.journal, 40)
    assert_given_back(host, 90)


def test_nothing_was_shipped_yet(host):
    with host.open() as repo, pytest.raises(NoSuchPoint):
        salvage.newest(repo, DOMAIN, host.folder / "x")
    host.write(5)
    host.point("p1")
    assert_given_back(host, 5, "no ledger was shipped")
    host.write(5)
    host.scribe.leave_open()
    host.look()
    assert_given_back(host, 5, "no ledger was shipped")


def test_records_that_were_not_confirmed_stay_here(host):
    """A mirror may have died a moment ago while another one goes on: nobody has looked yet."""
    host.point("p1")
    host.round(20)
    host.write(10)
    assert host.ship().segments == 0
    with host.open() as repo:
        assert ship.held(repo, DOMAIN, host.journal) == [(1, 20)]
    host.ledger.ended(host.journal, None, None, "the mirror of vda has ended")
    assert host.ship().segments == 1  # the end is known there as well
    assert_given_back(host, 20, "the mirror of vda has ended")


def test_the_end_of_a_span_leaves_the_host_before_what_follows_it(host, monkeypatch):
    """Also when the repository fails between the two."""
    host.point("p1")
    host.round(20)
    host.ledger.ended(host.journal, None, None, "it was killed")
    host.write(10)

    def refused(*_):
        raise IntegrityError(object="ledger", reason="on request")

    with monkeypatch.context() as patch:
        patch.setattr(Repository, "put_ledger", refused)
        with pytest.raises(IntegrityError):
            host.ship()
    assert_given_back(host, 20)
    host.ship()
    host.begin()
    host.round(10)
    assert_given_back(host, 20, "it was killed")
    host.write(2)
    host.point("p2")
    host.round(3)
    assert_given_back(host, 45)


def test_a_point_that_nobody_looked_after_is_not_counted_from(host):
    host.point("p1")
    host.round(20)
    host.write(5)
    host.scribe.seal()
    host.look()
    host.point("p2")
    host.ship()
    assert_given_back(host, 25)
    with host.open() as repo:
        found = salvage.newest(repo, DOMAIN, host.folder / "y")
        assert (found.base.id, found.journal) == ("p2", None)  # the point itself stays what it is


def test_a_refused_record_ends_it(host):
    host.point("p1")
    host.write(20)
    host.scribe.lost("vda", 0, 512)
    host.round(20)
    assert_given_back(host, 20, "write 21 was refused by the journal")


def test_a_number_that_was_not_shipped_ends_it(host):
    host.point("p1")
    for _ in range(3):
        host.round(10)
    host.ledger.event("note", host.now, "so that the copy is new")
    host.ship()
    with host.open() as repo:
        repo.delete_segment(repo.segments()[1])
    assert_given_back(host, 10, "what follows was not shipped")
    with host.open() as repo:
        repo.delete_segment(repo.segments()[0])
    assert_given_back(host, 0, "what follows was not shipped")


def test_a_revert_is_followed_to_where_it_went(host):
    """The records behind it stand on the target."""
    host.point("p1")
    host.round(10)
    target = host.point("p2")
    there = host.copy()
    host.round(10)
    host.ledger.branch(host.journal, host.scribe.sequence, host.now, target.id, "t2")
    host.images = {name: bytearray(image) for name, image in there.items()}
    host.round(10)
    host.look()
    host.round(10)
    assert_given_back(host, 40, timeline="t2")


def test_a_point_without_a_journal_is_the_newest_itself(host):
    host.point("p1")
    host.round(10)
    point = host.point("p2")
    plain = replace(point, id="p9", time=point.time + timedelta(seconds=9), journal="", sequence=None)
    with host.open() as repo:
        repo.commit(plain)
        found = salvage.newest(repo, DOMAIN, host.folder / "x")
    assert (found.base.id, found.journal, found.upto) == ("p9", None, 0)


def test_a_new_home_takes_the_ledger_over(host):
    """So that every verb finds every instant that was shipped, not only the newest."""
    host.point("p1")
    host.round(10)
    host.round(10)
    with host.open("new") as repo:
        path = host.folder / "elsewhere.jsonl"
        assert salvage.adopt(repo, DOMAIN, path)
        assert not salvage.adopt(repo, DOMAIN, path)
        assert not salvage.adopt(repo, "another-domain", host.folder / "other.jsonl")
        (span,) = Ledger(path).spans()
        assert (span.first, span.last, span.base_points) == (0, 20, ("p1",))
        assert check(repo).ok
        assert len(list(repo.backend.list("ledgers/"))) == 1


def test_a_home_that_joins_the_repository_finds_every_shipped_instant(tmp_path):
    """P5-30, P5-33: what a person types after the loss: init, and any write or time."""
    host = Host(tmp_path, str(tmp_path / "r"))
    host.begin()
    host.point("p1")
    host.round(30)
    host.point("p2")
    host.round(30)
    KEY.save(tmp_path / "key")
    shutil.rmtree(host.folder / "spool")
    with tempfile.TemporaryDirectory() as short:
        home = Home(Path(short, "h"))
        settings = tmp_path / "none.yaml"
        with Session(home, settings_file=settings) as session:
            assert not init(session, host.url, key_file=tmp_path / "key").created
        with Session(home, settings_file=settings) as session:
            for number in (1, 17, 30, 31, 59, 60):
                point = resolve(session, "web", f"#{number}")
                assert (point.sequence, content(session.repository, point)) == (number, host.states[number])
            with pytest.raises(InGap):
                resolve(session, "web", "#61")


def test_a_damaged_copy_is_named_and_nothing_is_claimed(host):
    host.point("p1")
    host.round(10)
    with host.open() as repo:
        (info,) = repo.backend.list("ledgers/")
        data = bytearray(repo.backend.get(info.name))
        data[-1] ^= 1
        repo.backend.delete(info.name)
        repo.backend.put(info.name, data)
        assert [(one.kind, one.object) for one in check(repo).problems] == [("damaged-ledger", info.name)]
        with pytest.raises(IntegrityError, match="ledgers/"):
            salvage.newest(repo, DOMAIN, host.folder / "x")
