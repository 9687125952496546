"""What the view does with slow packs and many readers; the contents are the property test's."""

import threading
import time

import pytest

from appliance.errors import IntegrityError
from appliance.store import Repository, open_backend
from appliance.timeline.pending import Touches
from appliance.timeline.view import ChunkCache, DiskView, read_pending, write_pending
from appliance.units import CHUNK, MiB


class Packs:
    """Chunks that are `delay` seconds away, and behind a gate; knows how often each was asked for, and how many at
    once."""

    def __init__(self, delay=0.0, content=lambda chunk: chunk.ljust(CHUNK, b"\0")):
        self.delay = delay
        self.gate = threading.Event()
        self.gate.set()
        self._content = content
        self.asked = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def read(self, chunk):
        with self._lock:
            self.asked.append(chunk)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.delay)
        assert self.gate.wait(20)
        with self._lock:
            self._now -= 1
        if chunk.startswith(b"bad"):
            raise IntegrityError(object="chunk", reason="test")
        return self._content(chunk)


def at_once(packs, count, work):
    """The errors of so many threads that are all in `work` before a pack answers."""
    failures, arrived = [], threading.Barrier(count + 1)
    packs.gate.clear()

    def one():
        arrived.wait(20)
        try:
            work()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    arrived.wait(20)
    time.sleep(0.2)  # from there into `work`
    packs.gate.set()
    for thread in threads:
        thread.join()
    return failures


def test_a_chunk_that_many_want_is_loaded_once():
    packs = Packs()
    cache = ChunkCache(packs.read)
    assert at_once(packs, 8, lambda: cache.get(b"one")) == []
    assert packs.asked == [b"one"]
    assert cache.get(b"one").startswith(b"one")
    assert (cache.loads, cache.hits) == (1, 1)


def test_an_error_reaches_everyone_who_waits_and_is_tried_again_by_the_next():
    packs = Packs()
    cache = ChunkCache(packs.read)
    assert len(at_once(packs, 4, lambda: cache.get(b"bad"))) == 4
    assert packs.asked == [b"bad"]
    with pytest.raises(IntegrityError):
        cache.get(b"bad")
    assert packs.asked == [b"bad"] * 2


def test_the_cache_forgets_what_was_not_used_for_longest():
    packs = Packs()
    cache = ChunkCache(packs.read, 2 * CHUNK)
    for chunk in (b"a", b"b", b"a", b"c", b"a", b"b"):
        cache.get(chunk)
    assert packs.asked == [b"a", b"b", b"c", b"b"]


def test_what_is_queued_is_on_its_way_and_a_reader_may_begin_it_himself():
    packs = Packs()
    cache = ChunkCache(packs.read)
    wanted = [b"%d" % number for number in range(40)]
    packs.gate.clear()
    cache.prefetch(wanted)
    cache.prefetch(wanted)
    reader = threading.Thread(target=cache.get, args=(wanted[39],))
    reader.start()
    limit = time.monotonic() + 10
    while wanted[39] not in packs.asked and time.monotonic() < limit:
        time.sleep(0.005)
    assert wanted[39] in packs.asked, "behind the rounds of the pool"
    packs.gate.set()
    reader.join()
    for chunk in wanted:
        cache.get(chunk)
    assert sorted(packs.asked) == sorted(wanted)
    assert packs.most > 8
    cache.close()


@pytest.fixture
def repo(tmp_path):
    with Repository.create(open_backend(f"memory://{tmp_path.name}"), cache=tmp_path, key=None) as repo:
        yield repo


def disk_of(repo, chunks, size=None):
    with repo.writer() as writer:
        changes = [(index, writer.put(b"%d" % index)) for index in chunks]
        return repo.write_map(None, size or (max(chunks) + 1) * CHUNK, changes, writer)


@pytest.fixture
def slow(repo, monkeypatch):
    """The repository's chunks, 5 ms away."""
    packs = Packs(0.005, repo.read_chunk)
    monkeypatch.setattr(repo, "read_chunk", packs.read)
    return packs


def test_reading_in_order_looks_ahead_where_packs_are_slow(repo, slow):
    view = DiskView(repo, disk_of(repo, range(200)))
    for start in range(0, 200 * CHUNK, 16384):
        view.pread(start, 16384)
    assert len(slow.asked) == len(set(slow.asked)) == 200
    assert slow.most > 4
    assert view._cache.ahead > 150
    view.close()


def test_reading_at_random_does_not(repo, slow):
    view = DiskView(repo, disk_of(repo, range(200)))
    for index in range(0, 200, 3):
        view.pread((index * 7 % 200) * CHUNK + 512, 4096)
    assert view._cache.ahead == 0


def test_fast_packs_are_not_read_ahead(repo):
    view = DiskView(repo, disk_of(repo, range(100)))
    view._cache._took.extend([0.0] * 15)
    for index in range(8):
        view.pread(index * CHUNK, CHUNK)
    assert view._cache.ahead == 0


def test_one_long_request_loads_its_chunks_at_once_where_packs_are_slow(repo, slow):
    view = DiskView(repo, disk_of(repo, range(64)))
    for index in range(4):
        view.pread(index * 3 * CHUNK, 1)
    assert slow.most == 1
    view.pread(16 * CHUNK, 2 * MiB)
    assert slow.most > 4
    view.close()


def test_a_sweep_in_order_touches_nothing_first():
    touches = Touches([3, 7, 8, 20])
    assert [touches.touch(index) for index in (3, 4, 7, 7, 8, 20, 21)] == [False, None, False, None, False, False, None]


def test_a_touch_out_of_turn_is_the_guest_s():
    """P5-08: what the guest reads comes at once, out of the sweep's turn."""
    touches = Touches(range(0, 100, 5))
    assert touches.touch(0) is False
    assert touches.touch(50) is True
    assert touches.touch(50) is None
    assert touches.touch(5) is False
    assert touches.neighbours(50) == [55, 60, 65, 70, 75, 80, 45, 40]
    assert touches.following(5, 3) == [10, 15, 20]
    assert touches.following(45, 2) == [55, 60]
    assert [touches.touch(index) for index in range(10, 50, 5)] == [False] * 8
    assert touches.touch(55) is False  # the sweep goes on behind what was touched first
    assert touches.neighbours(1000) == []


def test_pending_neighbours_of_a_touched_chunk_are_loaded(repo):
    """P5-11, P5-12: co-located pending blocks come next, by other threads."""
    view = DiskView(repo, disk_of(repo, range(64)))
    view.set_pending(range(10, 40, 2))
    view.pread(20 * CHUNK, 4096)
    deadline = time.monotonic() + 5
    while view._cache.loads < 1 + 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    view.close()
    assert view._cache.loads == 1 + 8
    assert view.stats().touched_first == 1
    assert view.stats().pending == 15


def test_pending_chunks_go_to_another_process_by_file(tmp_path):
    write_pending(tmp_path / "pending", [1, 5, 1 << 40])
    assert list(read_pending(tmp_path / "pending")) == [1, 5, 1 << 40]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, CHUNK + 513), (CHUNK + 512, 1)])
def test_nothing_is_beyond_the_end(repo, offset, length):
    view = DiskView(repo, disk_of(repo, [0, 1], CHUNK + 512))
    with pytest.raises(ValueError, match="beyond the end"):
        view.pread(offset, length)
    assert view.pread(CHUNK + 512, 0) == b""
    with pytest.raises(ValueError, match="no bytes"):
        view.first_extent(CHUNK + 512, 1)
