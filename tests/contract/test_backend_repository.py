"""A whole repository on a real S3 store: what the layers above make of the contract."""

from __future__ import annotations

import random
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from appliance.model import DiskPoint, Point
from appliance.store import Key, Repository, open_backend
from appliance.store.backend.ahead import ReadingAhead
from appliance.store.backend.s3 import S3Backend
from appliance.store.backend.wrap import Counting, Retrying
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.units import CHUNK

CHUNKS = 4096


class History:
    """A disk of 256 MiB whose points are remembered chunk by chunk."""

    def __init__(self, url, tmp_path):
        self.url, self.tmp_path, self.key = url, tmp_path, Key.generate()
        self.random = random.Random(1)
        self.disk: dict[int, bytes] = {}
        self.copies: dict[str, dict[int, bytes]] = {}
        self.last: Point | None = None
        Repository.create(open_backend(url), cache=tmp_path / "first", key=self.key).close()

    def open(self, backend=None) -> Repository:
        """Each time with an empty cache, as after the loss of the appliance."""
        cache = self.tmp_path / secrets.token_hex(4)
        cache.mkdir()
        return Repository.open(backend or open_backend(self.url), cache=cache, key=self.key)

    def take_point(self, repo, count, threads=4) -> None:
        # Compressible like real data: half random, half zero.
        new = {index: self.random.randbytes(CHUNK // 2).ljust(CHUNK, b"\0")
               for index in sorted(self.random.sample(range(CHUNKS), count))}  # fmt: skip
        with repo.writer() as writer:
            with ThreadPoolExecutor(threads) as pool:
                ids = list(pool.map(writer.put, new.values()))
            changes = sorted(zip(new, ids, strict=True))
            ref = repo.write_map(self.last.disks[0].map if self.last else None, CHUNKS * CHUNK, changes, writer)
            writer.flush()
        number = len(self.copies)
        point = Point(
            id=f"{number:016x}", domain="web", domain_uuid="u", uri="test", timeline="t",
            time=NOW + timedelta(seconds=number), parent=self.last.id if self.last else None,
            disks=(DiskPoint("vda", CHUNKS * CHUNK, ref, changed=tuple(index for index, _ in changes)),),
        )  # fmt: skip
        repo.commit(point)
        self.disk |= new
        self.last, self.copies[point.id] = point, dict(self.disk)

    def verify(self, repo) -> None:
        assert {point.id for point in repo.points()} == set(self.copies)
        for point in repo.points():
            view = repo.map(point.disks[0].map)
            found = dict(view.items())
            assert set(found) == set(self.copies[point.id])
            for index, chunk in found.items():
                assert repo.read_chunk(chunk) == self.copies[point.id][index]


NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def history(ceph, tmp_path):
    return History(f"s3://contract/{secrets.token_hex(8)}?endpoint={ceph.endpoint}", tmp_path)


def test_points_are_recovered_from_the_bucket_alone(history):
    """P5-09, P5-12: nothing but the bucket and the key is needed."""
    with history.open() as repo:
        for count in (60, 20, 0, 20):
            history.take_point(repo, count)
    with history.open() as repo:
        history.verify(repo)
        assert check(repo, read_data=True).problems == []
        first = min(history.copies)
        repo.delete_point(first)
        del history.copies[first]
        gc(repo)
        gc(repo)
    with history.open() as repo:
        history.verify(repo)


def test_a_cold_read_of_an_instant_needs_few_requests(history):
    """Reading the disk in its order, after the cache was lost."""
    with history.open() as repo:
        history.take_point(repo, 500)
    counting = Counting(Retrying(S3Backend.from_url(history.url)))
    with history.open(ReadingAhead(counting)) as repo:
        items = list(repo.map(repo.points()[0].disks[0].map).items())
        before = counting.counts.requests
        for _, chunk in items:
            repo.read_chunk(chunk)
    assert len(items) == 500
    assert before < 20
    assert counting.counts.requests - before < 60


@pytest.mark.timeout(120)
def test_the_gateway_dies_while_points_are_taken(history, ceph):
    """A9, P5-11: what was acknowledged is there, and capture goes on without a new full."""
    stop = threading.Event()
    end = time.monotonic() + 2

    def disturb() -> None:
        # Not until the last point has ended: all its tries may meet a gateway that is not up yet.
        while time.monotonic() < end and not stop.wait(0.3):
            ceph.gateway.kill()
            ceph.restart_gateway()

    with history.open() as repo, ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        try:
            while time.monotonic() < end:
                history.take_point(repo, 20)
        finally:
            stop.set()
            disturbing.result()
    with history.open() as repo:
        history.verify(repo)
        assert check(repo, read_data=True).problems == []
