"""Maps: canonical, sparse, cheap where little changes; writers and chunks; the index and its runs."""

from __future__ import annotations

import random
import resource
import threading
import time

import pytest

from appliance.errors import IntegrityError, PermissionDenied
from appliance.model import MapRef
from appliance.store import Key, Repository, manifest
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.wrap import Counting
from appliance.store.codec import Box, compress, decompress
from appliance.store.index import Index
from appliance.store.pack import CHUNK_RECORD, Entry
from appliance.units import CHUNK, MiB, TiB
from tests.support.store import chunk, expect, point, read, take


@pytest.fixture
def repo(request, tmp_path):
    place = MemoryBackend(f"map-{request.node.nodeid}")
    with Repository.create(place, cache=tmp_path, key=Key.generate()) as repo:
        yield repo


@pytest.fixture
def writer(repo):
    with repo.writer() as writer:
        yield writer


@pytest.fixture
def ids(writer):
    return [writer.put(n.to_bytes(4, "big")) for n in range(1, 400)]


def test_equal_disks_have_equal_roots_however_they_came_about(repo, writer, ids):
    chance = random.Random(1)
    state: dict[int, bytes] = {}
    ref = None
    for _ in range(30):
        changes = {chance.randrange(3000): chance.choice([*ids, b""]) for _ in range(chance.randrange(1, 60))}
        state |= changes
        ref = repo.write_map(ref, 3000 * CHUNK, sorted(changes.items()), writer)
    at_once = repo.write_map(None, 3000 * CHUNK, sorted((i, one) for i, one in state.items() if one), writer)
    assert at_once.root == ref.root
    assert list(repo.diff(ref, at_once)) == []
    assert repo.write_map(ref, ref.size, [], writer) == ref
    assert repo.write_map(ref, ref.size, [(5, state.get(5, b""))], writer) == ref


def test_a_disk_of_zeroes_needs_nothing(repo, writer, ids):
    empty = repo.write_map(None, 8 * TiB, [], writer)
    assert empty.root == b""
    full = repo.write_map(empty, 8 * TiB, [(77, ids[0])], writer)
    assert repo.write_map(full, 8 * TiB, [(77, b"")], writer).root == b""
    assert list(repo.map(empty).items()) == []
    assert repo.map(empty).get(3) == b""
    assert list(repo.diff(None, full)) == [77]
    assert list(repo.diff(None, None)) == []


def test_a_disk_of_no_bytes(repo, writer):
    assert repo.write_map(None, 0, [], writer) == MapRef(b"", 0)
    with pytest.raises(ValueError, match="of 0 chunks"):
        repo.write_map(None, 0, [(0, b"")], writer)


@pytest.mark.parametrize("changes", [[(3, b""), (3, b"")], [(4, b""), (3, b"")], [(10, b"")], [(-1, b"")]])
def test_changes_must_ascend_within_the_disk(repo, writer, changes):
    with pytest.raises(ValueError, match="change of chunk"):
        repo.write_map(None, 10 * CHUNK, changes, writer)


def test_a_map_of_chunks_that_are_nowhere_is_refused(repo, writer):
    with pytest.raises(IntegrityError):
        repo.write_map(None, 10 * CHUNK, [(1, b"x" * 16)], writer)


def test_a_point_of_a_map_that_is_not_there_is_refused(repo):
    for ref in (MapRef(b"x" * 16, CHUNK, 0), MapRef(b"x" * 16, CHUNK, 12345 << 14)):
        with pytest.raises(IntegrityError):
            repo.commit(point("p1", ref))
    assert not repo.points()


def test_a_point_that_is_not_flushed_is_refused(repo):
    with repo.writer() as writer:
        ref = repo.write_map(None, 10 * CHUNK, [(1, writer.put(chunk(1)))], writer)
        with pytest.raises(IntegrityError):
            repo.commit(point("p1", ref))
        writer.flush()
        repo.commit(point("p1", ref))


def test_growing_and_shrinking(repo, writer, ids):
    """The disk may be resized between points, over levels of the tree in both directions."""
    full = dict(enumerate(ids))
    sizes = [399, 400, 4096, 4097, 1 << 20, 17, 16, 15, 1, 300, 1]
    state, ref = dict(full), repo.write_map(None, 399 * CHUNK, sorted(full.items()), writer)
    for size in sizes:
        state = {index: one for index, one in state.items() if index < size}
        ref = repo.write_map(ref, size * CHUNK, [], writer)
        assert dict(repo.map(ref).items()) == state
        assert ref.root == repo.write_map(None, size * CHUNK, sorted(state.items()), writer).root


def test_ranges_of_items(repo, writer, ids):
    placed = {7 * i: one for i, one in enumerate(ids)}
    found = repo.map(repo.write_map(None, 100_000 * CHUNK, sorted(placed.items()), writer))
    for start, stop in ((0, 0), (0, 1), (5, 800), (799, 800), (0, None), (2800, 10**9)):
        bound = found.chunks if stop is None else stop
        assert dict(found.items(start, stop)) == {i: one for i, one in placed.items() if start <= i < bound}


def test_a_small_change_of_a_large_disk_costs_little(repo, writer, monkeypatch):
    """P5-13: ten scattered chunks of a TiB cost about 18 KB of map, and a diff reads only what differs."""
    monkeypatch.setattr(repo._rescue, "chunk", lambda one, writer: None)  # ids of chunks that are nowhere
    chance = random.Random(2)
    count = TiB // CHUNK
    base = repo.write_map(None, TiB, [(i, chance.randbytes(16)) for i in range(0, count, 256)], writer)
    before = writer.stats.stored_bytes
    places = sorted(chance.sample(range(0, count, 256), 10))
    changed = repo.write_map(base, TiB, [(i, chance.randbytes(16)) for i in places], writer)
    assert writer.stats.stored_bytes - before < 18_500
    assert list(repo.diff(base, changed)) == places


def test_a_sparse_disk_of_8_tib_in_little_memory(repo, writer, monkeypatch):
    """P5-13: memory is bounded by what is there, not by the size of the disk."""
    monkeypatch.setattr(repo._rescue, "chunk", lambda one, writer: None)
    chance = random.Random(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    changes = ((i * 4096, chance.randbytes(16)) for i in range(8 * TiB // CHUNK // 4096))
    ref = repo.write_map(None, 8 * TiB, changes, writer)
    assert sum(1 for _ in repo.map(ref).items()) == 32768
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024
    assert writer.stats.stored_bytes < 12 * MiB


def test_damage_below_is_an_error_not_zeroes(repo, tmp_path):
    ref = take(repo, "p1", {1: 1, 50: 2})
    (pack,) = [info.name for info in repo.backend.list("packs/")]
    data = repo.backend.get(pack)
    repo.backend.delete(pack)
    repo.backend.put(pack, bytes(len(data)))
    other = Repository.open(repo.backend, cache=tmp_path / "new", key=Key(repo.codec._master[:32]))
    with pytest.raises(IntegrityError):
        other.map(ref)


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_what_is_held_is_not_stored_again(repo, writer):
    """A4: stored at most what is new."""
    first = writer.put(chunk(1))
    assert writer.put(bytearray(chunk(1))) == first == writer.put(memoryview(chunk(1)))
    writer.flush()
    assert writer.put(chunk(1)) == first
    stats = writer.stats
    assert (stats.new_chunks, stats.new_bytes, stats.reused_chunks) == (1, CHUNK, 3)
    with repo.writer() as other:
        other.put(chunk(1))
        assert other.stats.new_chunks == 0


def test_zeroes_are_not_stored_and_short_data_is_padded(repo, writer):
    assert writer.put(bytes(CHUNK)) == writer.put(b"") == writer.put(bytes(512)) == b""
    assert repo.read_chunk(b"") == bytes(CHUNK)
    one = writer.put(b"abc")
    assert one == writer.put(b"abc" + bytes(CHUNK - 3))
    assert repo.read_chunk(one) == b"abc" + bytes(CHUNK - 3)
    with pytest.raises(ValueError, match="more than a chunk"):
        writer.put(bytes(CHUNK + 1))


def test_many_threads_put_and_read(repo, monkeypatch):
    """P5-12: answered means in a pack; flushed means durable; every thread's chunk is there."""
    monkeypatch.setattr("appliance.store.pack.PACK_SIZE", 1 * MiB)
    found: dict[int, bytes] = {}

    def work(first):
        for letter in range(first, first + 60):
            one = writer.put(chunk(letter))
            assert repo.read_chunk(one) == chunk(letter)
            found[letter] = one

    with repo.writer() as writer:
        threads = [threading.Thread(target=work, args=(1 + 30 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 150
    with Repository.open(repo.backend, cache=repo.cache / "other", key=Key(repo.codec._master[:32])) as other:
        for letter, one in found.items():
            assert other.read_chunk(one) == chunk(letter)


def test_another_process_finds_what_was_flushed(repo, tmp_path):
    other = Repository.open(repo.backend, cache=tmp_path / "b", key=Key(repo.codec._master[:32]))
    with repo.writer() as writer:
        one = writer.put(chunk(1))
        with pytest.raises(IntegrityError):
            other.read_chunk(one)
        writer.flush()
        assert other.read_chunk(one) == chunk(1)
    other.close()


def test_the_caches_may_go_or_lie(repo, tmp_path):
    """P5-09: deleting or damaging the index costs time, never data."""
    ref = None
    for step in range(40):
        ref = take(repo, f"p{step}", {step: step + 1}, base=ref, second=step)
    repo.index.refresh()
    repo.index.consolidated()
    folder = repo.index._folder
    (run,) = folder.glob("*.run")
    data = bytearray(run.read_bytes())
    for where in (3, 60, len(data) // 2, len(data) - 1):
        copy = bytearray(data)
        copy[where] ^= 255
        run.write_bytes(copy)
        for damaged in (bytes(copy), bytes(copy[:-5]), b""):
            run.write_bytes(damaged)
            with Repository.open(repo.backend, cache=tmp_path, key=Key(repo.codec._master[:32])) as other:
                assert read(other, ref) == expect({step: step + 1 for step in range(40)})
        for rest in folder.glob("*.run"):
            rest.unlink()
        run.write_bytes(data)


def test_a_chunk_from_a_slow_store_takes_one_request(repo, tmp_path):
    ref = take(repo, "p1", {1: 1})
    counting = Counting(repo.backend)
    other = Repository.open(counting, cache=tmp_path / "b", key=Key(repo.codec._master[:32]))
    read(other, ref)
    before = counting.counts.requests
    other.read_chunk(next(iter(other.map(ref).items()))[1])
    assert counting.counts.requests == before + 1


def test_compression_is_refused_where_it_saves_nothing():
    noise = chunk(1)
    assert len(compress(noise)) == CHUNK + 1
    assert decompress(compress(noise), CHUNK) == noise
    assert len(compress(b"a" * CHUNK)) < 100
    with pytest.raises(ValueError, match="the most"):
        decompress(compress(b"a" * CHUNK), CHUNK - 1)
    with pytest.raises(ValueError, match="unknown"):
        decompress(b"\x07abc", CHUNK)


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_record_opens_only_in_its_place_under_its_label(encrypted):
    box = Box(bytes(32), encrypted)
    sealed = box.seal(5, b"label", b"plain")
    assert box.open(5, b"label", sealed) == b"plain"
    wrong = [(6, b"label", sealed), (5, b"labex", sealed), (5, b"label", sealed[:-1] + b"x"), (5, b"label", b"")]
    for position, label, data in wrong:
        with pytest.raises(IntegrityError):
            box.open(position, label, data)


# --- index ------------------------------------------------------------------------------------------------------------


def test_runs_find_every_record(repo, tmp_path):
    """Every one of 60 000 records, in runs and while they are joined."""
    chance = random.Random(4)
    index = Index(repo.backend, repo.codec, tmp_path / "i")
    known = {}
    for _ in range(30):
        pack = chance.randbytes(16)
        entries = [Entry(CHUNK_RECORD, chance.randbytes(16), 24 + 10 * n, 10) for n in range(2000)]
        index.add(pack, 20_100, entries)
        known |= {entry.id: (pack, entry.offset, entry.length) for entry in entries}
        if chance.random() < 0.6:
            index.tidy()
    assert all(index.find(record) == place for record, place in known.items())
    assert index.find(bytes(16)) is None
    run = index.consolidated()
    assert run.count == len(known)
    assert all(index.find(record) == place for record, place in known.items())
    reopened = Index(repo.backend, repo.codec, tmp_path / "i")
    assert all(reopened.find(record) == place for record, place in known.items())


def test_a_cache_that_cannot_be_made_is_an_error_of_ours(repo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionDenied) as caught:
        Repository.open(repo.backend, cache=tmp_path / "file", key=Key(repo.codec._master[:32]))
    assert str(tmp_path / "file") in str(caught.value)


# --- points -----------------------------------------------------------------------------------------------------------


def test_points_are_what_was_committed(repo):
    ref = take(repo, "p1", {1: 1, 2: 2})
    assert repo.point("p1") == point("p1", ref, changed=(1, 2))
    assert repo.points() == [point("p1", ref)]
    repo.commit(point("p1", ref, changed=(1, 2)))
    with pytest.raises(Exception, match="already has"):
        repo.commit(point("p1", ref, changed=(1, 3)))
    assert repo.points("00000000-0000-0000-0000-000000000000") == []


def test_listing_does_not_read_the_lists_of_changes(tmp_path):
    """A8: ten thousand points can be listed because each costs one short read."""
    place, key = MemoryBackend("listing"), Key.generate()
    with Repository.create(place, cache=tmp_path / "one", key=key) as repo:
        ref = take(repo, "p0", {1: 1})
        for step in range(1, 20):
            repo.commit(point(f"p{step}", ref, parent="p0", second=step, changed=tuple(range(0, 300_000, 3))))
    counting = Counting(place)
    with Repository.open(counting, cache=tmp_path / "other", key=key) as repo:
        before, start = counting.counts.bytes_read, time.process_time()
        assert len(repo.points()) == 20
        assert 0 < counting.counts.bytes_read - before < 20 * 17_000
        assert time.process_time() - start < 1
        assert len(repo.point("p7").disks[0].changed) == 100_000


@pytest.mark.parametrize(
    "indexes", [None, (), (0,), (127,), (128,), (5, 6, 300), tuple(range(0, 1000, 127)), tuple(range(0, 1000, 128))]
)
def test_a_list_of_changed_chunks_is_read_back(indexes):
    """A7, A9: gaps of one byte and longer ones; the next list begins behind it, and one that is cut is noticed."""
    encoded = manifest._encode_list(indexes)
    assert manifest._decode_list(b"x" + encoded + b"\x02\x07", 1) == (indexes, 1 + len(encoded))
    assert manifest._decode_list(encoded + b"\x02\x07", len(encoded)) == ((7,), len(encoded) + 2)
    with pytest.raises(IndexError):
        manifest._decode_list(encoded[:-1], 0)
