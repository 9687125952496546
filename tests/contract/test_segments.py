"""Segments of journals in every place that keeps objects, and shipping into places that are slow, fail or go away."""

from __future__ import annotations

import random
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from appliance.capture import ship
from appliance.errors import AlreadyExists, ConfigError, ObjectNotFound, StoreError
from appliance.store import Key, Repository, open_backend
from appliance.store.backend.faulty import Crashed, Fault, Faulty, at
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.wrap import Retrying
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.store.parted import FRAME, PART
from tests.support.journal import Scribe
from tests.support.store import DOMAIN, take

KEY = Key(bytes(range(32)))
JOURNAL = bytes(range(16)).hex()
MiB = 1 << 20


@pytest.fixture
def repo(place, tmp_path):
    with Repository.create(place.open(), cache=tmp_path / "cache", key=KEY) as repo:
        yield repo


@pytest.fixture
def files(tmp_path):
    """One of two parts, one of a few bytes."""
    dice = random.Random(1)
    content = [dice.randbytes(FRAME) + bytes(PART), b"short"]
    paths = [tmp_path / "long", tmp_path / "short"]
    for path, data in zip(paths, content, strict=True):
        path.write_bytes(data)
    return paths


def sealed(folder, count, size=MiB, seed=1):
    """A spool of sealed segments with one random record each."""
    folder.mkdir()
    scribe, dice = Scribe(folder, {"vda": 64 * MiB}), random.Random(seed)
    paths = []
    for turn in range(count):
        scribe.write("vda", turn * 4096, dice.randbytes(size))
        paths.append(scribe.seal())
    return paths


def test_segments_are_kept_listed_read_and_deleted(repo, place, files, tmp_path):
    """P5-30: in a folder and in a bucket alike, seen by another process, beside points, gc and check."""
    kept = [repo.put_segment(DOMAIN, JOURNAL, n + 1, n + 1, path) for n, path in enumerate(files)]
    take(repo, "p1", {0: 1})
    repo.delete_point("p1")
    gc(repo)
    assert gc(repo).segments == 2
    with Repository.open(place.open(), cache=tmp_path / "other", key=KEY) as other:
        assert other.segments(DOMAIN) == kept == other.segments()
        assert [(ref.stored, ref.parts) for ref in other.segments()] == [(ref.stored, ref.parts) for ref in kept]
        for ref, path in zip(kept, files, strict=True):
            other.fetch_segment(ref, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == path.read_bytes()
        assert other.read_segment(kept[0], FRAME - 8, 16) == files[0].read_bytes()[FRAME - 8 : FRAME + 8]
        assert check(other, read_data=True).ok
        other.delete_segment(kept[0])
        assert repo.segments() == kept[1:]
        with pytest.raises(ObjectNotFound):
            repo.read_segment(kept[0])
        assert len(list(repo.backend.list("segments/"))) == 1


def test_a_segment_is_put_once_by_any_number_of_writers(place, repo, files):
    repos = [Repository.open(place.open(), cache=repo.cache.parent, key=KEY) for _ in range(3)]
    start = threading.Barrier(3)

    def contend(one):
        start.wait()
        return one.put_segment(DOMAIN, JOURNAL, 1, 1, files[0])

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(contend, repos))
    assert {ref.stored for ref in results} == {repo.segments()[0].stored}
    assert check(repo, read_data=True).ok
    with pytest.raises(AlreadyExists):
        repos[0].put_segment(DOMAIN, JOURNAL, 1, 1, files[1])


def test_shipping_into_any_place_and_back(repo, tmp_path):
    paths = sealed(tmp_path / "spool", 3)
    assert ship.Shipper(repo, DOMAIN, tmp_path / "spool").once().segments == 3
    assert ship.Shipper(repo, DOMAIN, tmp_path / "spool").once().segments == 0
    back = ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / "back", 0, 3)
    assert [part.path.read_bytes() for part in back.parts] == [path.read_bytes() for path in paths]
    assert ship.retire(repo, DOMAIN, JOURNAL, 2)[0] == 2
    assert ship.held(repo, DOMAIN, JOURNAL) == [(3, 3)]


def test_the_newest_ledger_counts_and_the_others_go(repo, place):
    """P5-30: a copy of what was captured lies beside the segments."""
    assert repo.ledger(DOMAIN) is None
    assert repo.captured() == []
    for number in range(3):
        repo.put_ledger(DOMAIN, f"{number}".encode() * 5000)
    repo.put_ledger("other", b"")
    with Repository.open(place.open(), cache=repo.cache.parent, key=KEY) as other:
        assert (other.ledger(DOMAIN), other.ledger("other")) == (b"2" * 5000, b"")
        assert other.captured() == sorted([DOMAIN, "other"])
        other.put_ledger(DOMAIN, b"another host's")
        repo.put_ledger(DOMAIN, b"last")
        assert other.ledger(DOMAIN) == b"last"
        assert check(other).ok
        gc(other)
    assert len(list(repo.backend.list("ledgers/"))) == 2


@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_AFTER])
def test_death_while_the_ledger_is_replaced_leaves_one_of_both(tmp_path, fault):
    number = 0
    crashed = True
    while crashed:
        number += 1
        name = secrets.token_hex(8)
        with Repository.create(MemoryBackend(name), cache=tmp_path / "c", key=KEY) as repo:
            repo.put_ledger(DOMAIN, b"old")
            repo.backend = Faulty(repo.backend, at(number, fault))
            crashed = False
            try:
                repo.put_ledger(DOMAIN, b"new")
            except Crashed:
                crashed = True
            repo.backend = MemoryBackend(name)
            assert repo.ledger(DOMAIN) == (b"old" if crashed and number < 3 - (fault is Fault.CRASH_AFTER) else b"new")
            repo.put_ledger(DOMAIN, b"next")
            assert (repo.ledger(DOMAIN), len(list(repo.backend.list("ledgers/")))) == (b"next", 1)
    assert number > 3


@pytest.mark.parametrize("seed", range(4))
def test_a_place_that_is_slow_and_fails_in_every_way(tmp_path, seed):
    """P5-31: whatever the place does, what is told to be shipped is there, and in the end everything is."""
    name, dice, lock = secrets.token_hex(8), random.Random(seed), threading.Lock()
    faults = [Fault.REFUSE, Fault.LOSE, Fault.REPEAT, Fault.NO_SPACE, Fault.DENY]
    Repository.create(MemoryBackend(name), cache=tmp_path / "c", key=KEY).close()

    def plan(_):
        with lock:
            return dice.choice(faults) if dice.random() < 0.35 else None

    paths = sealed(tmp_path / "spool", 5, size=200_000)
    told, failed = 0, 0
    with Repository.open(MemoryBackend(name), cache=tmp_path / "d", key=KEY) as repo:
        repo.backend = Retrying(Faulty(repo.backend, plan, seconds=0.002), attempts=2, sleep=lambda _: None)
        ours = ship.Shipper(repo, DOMAIN, tmp_path / "spool")
        while ours.shipped() < 5:
            try:
                told += ours.once().segments
            except StoreError:
                failed += 1
            with Repository.open(MemoryBackend(name), cache=tmp_path / "e", key=KEY) as sound:
                assert ours.shipped() <= len(sound.segments())
    assert told <= 5
    assert failed
    with Repository.open(MemoryBackend(name), cache=tmp_path / "e", key=KEY) as repo:
        assert check(repo, read_data=True).ok
        back = ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / "back", 0, 5)
        assert [part.path.read_bytes() for part in back.parts] == [path.read_bytes() for path in paths]


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_the_gateway_dies_while_segments_are_shipped(ceph, tmp_path):
    """P5-31: a real S3 store that is killed again and again; the spool is only read and nothing is lost or torn."""
    url = f"s3://contract/{secrets.token_hex(8)}?endpoint={ceph.endpoint}"
    Repository.create(open_backend(url), cache=tmp_path / "c", key=KEY).close()
    paths = sealed(tmp_path / "spool", 24, size=3 * MiB)
    long = sealed(tmp_path / "long", 1, size=40 * MiB)
    stop = threading.Event()

    def disturb():
        while not stop.wait(0.7):
            ceph.gateway.kill()
            ceph.restart_gateway()

    with Repository.open(open_backend(url), cache=tmp_path / "d", key=KEY) as repo, ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        end = time.monotonic() + 120
        try:
            for folder, domain in ((tmp_path / "spool", DOMAIN), (tmp_path / "long", "long")):
                ours = ship.Shipper(repo, domain, folder)
                while ours.once().segments and time.monotonic() < end:
                    ours = ship.Shipper(repo, domain, folder)
        finally:
            stop.set()
            disturbing.result()
    with Repository.open(open_backend(url), cache=tmp_path / "e", key=KEY) as repo:
        assert check(repo, read_data=True).ok
        back = ship.fetch(repo, DOMAIN, JOURNAL, tmp_path / "back", 0, 24)
        assert [part.path.read_bytes() for part in back.parts] == [path.read_bytes() for path in paths]
        assert repo.read_segment(repo.segments("long")[0]) == long[0].read_bytes()


def test_blobs_are_kept_listed_read_and_deleted(repo, place, files, tmp_path):
    """P6-06: a library beside the points, seen by another process; gc leaves it alone, check names what is damaged."""
    repo.put_blob("templates", "a1", files[0])
    repo.put_blob("targets", "rack-7", files[1])
    repo.put_blob("targets", "rack-7", files[1])  # again is no error
    with pytest.raises(AlreadyExists):
        repo.put_blob("targets", "rack-7", files[0])
    with pytest.raises(ConfigError, match=r"name '\.\./up'"):
        repo.put_blob("targets", "../up", files[1])
    gc(repo)
    with Repository.open(place.open(), cache=tmp_path / "other", key=KEY) as other:
        assert [(ref.kind, ref.name) for ref in other.blobs()] == [("targets", "rack-7"), ("templates", "a1")]
        (template,) = other.blobs("templates")
        assert template.stored > FRAME
        other.fetch_blob(template, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == files[0].read_bytes()
        assert other.read_blob(other.blobs("targets")[0]) == b"short"
    assert check(repo, read_data=True).ok
    repo.backend.delete(f"{template.object}.1")
    assert [problem.kind for problem in check(repo).problems] == ["damaged-blob"]
    repo.delete_blob(template)
    assert check(repo).ok
    assert [ref.kind for ref in repo.blobs()] == ["targets"]
