"""gc and merge: what goes, what stays, and the writers beside them."""

from __future__ import annotations

import pytest

from appliance.errors import IntegrityError, Locked
from appliance.store import Key, Repository
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.wrap import Counting
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.store.merge import merge, tidy
from appliance.units import CHUNK
from tests.support.store import chunk, expect, point, read, take

KEY = Key(bytes(range(32)))


@pytest.fixture
def place(request):
    return MemoryBackend(f"gc-{request.node.nodeid}")


@pytest.fixture
def repo(place, tmp_path):
    with Repository.create(place, cache=tmp_path / "a", key=KEY) as repo:
        yield repo


@pytest.fixture
def other(place, repo, tmp_path):
    """Another appliance on the same repository."""
    with Repository.open(place, cache=tmp_path / "b", key=KEY) as other:
        yield other


def packs(place):
    return {info.name for info in place.list("packs/")}


def test_what_no_point_needs_goes(repo, place):
    """P5-09: deleting points gives their space back."""
    one = take(repo, "p1", {0: 1, 1: 2, 2: 3})
    two = take(repo, "p2", {0: 4, 1: 5}, base=one, parent="p1", second=1)
    repo.delete_point("p1")
    before = sum(info.size for info in place.list("packs/"))
    planned = gc(repo, dry_run=True)
    assert planned.condemned_packs
    assert sum(info.size for info in place.list("packs/")) == before
    report = gc(repo)
    assert report.deleted_packs == planned.condemned_packs
    after = sum(info.size for info in place.list("packs/"))
    # Live ratio of a half: the first pack had one live chunk of three.
    assert after < before - 1.9 * CHUNK
    assert read(repo, two) == expect({0: 4, 1: 5, 2: 3})
    assert not gc(repo).condemned_packs
    assert check(repo, read_data=True).ok


def test_nothing_is_left_without_points(repo, place):
    take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    gc(repo)
    assert not packs(place)
    assert [info.name for info in place.list("gc/")] == ["gc/0000000001.sweeping"]
    assert not list(place.list("locks/"))


def test_a_writer_that_relies_on_a_dead_chunk_keeps_it(repo, other, place):
    """The race that gc must not lose: a chunk is found dead, and at that moment a capture de-duplicates against it."""
    take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    writer = other.writer()
    reused = writer.put(chunk(1))
    assert writer.stats.reused_chunks == 1
    report = gc(repo)
    assert report.waiting
    assert not report.deleted_packs
    ref = other.write_map(None, 10 * CHUNK, [(5, reused)], writer)
    writer.flush()
    other.commit(point("p2", ref, second=5))
    assert gc(repo).waiting  # still: the writer is open
    writer.close()
    assert gc(repo).deleted_packs
    assert read(repo, ref) == expect({5: 1})
    assert check(repo, read_data=True).ok


def test_a_writer_that_comes_later_relies_on_nothing_condemned(repo, other):
    take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    with repo.writer():  # keeps the sweep from happening
        gc(other)
        with other.writer() as writer:
            writer.put(chunk(1))
            assert writer.stats.new_chunks == 1


def test_a_point_of_chunks_that_gc_took_meanwhile_is_refused(repo, other):
    """Never lie: the chunks were reused in a session that ended before the point, and gc came in between."""
    take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    with other.writer() as writer:
        reused = writer.put(chunk(1))
    assert gc(repo).deleted_packs
    with other.writer() as writer, pytest.raises(IntegrityError):
        other.write_map(None, 10 * CHUNK, [(5, reused)], writer)


def test_a_point_of_chunks_that_are_condemned_copies_them(repo, other):
    take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    first = other.writer()
    reused = first.put(chunk(1))
    gc(repo)
    first.close()
    # A session that gc does not wait for, with an id from one that it did wait for.
    with other.writer() as writer:
        ref = other.write_map(None, 10 * CHUNK, [(5, reused)], writer)
        assert writer.stats.new_chunks == 1
        writer.flush()
        other.commit(point("p2", ref, second=5))
    assert gc(repo).deleted_packs
    assert read(repo, ref) == expect({5: 1})


def test_commit_looks_again_at_a_map_that_was_made_before_gc_came(repo, other):
    base = take(repo, "p1", {0: 1, 1: 2})
    repo.delete_point("p1")
    with other.writer() as writer:
        ref = other.write_map(base, 100 * CHUNK, [(5, writer.put(chunk(9)))], writer)
    assert gc(repo).deleted_packs
    with pytest.raises(IntegrityError):
        other.commit(point("p2", ref, second=5, parent="p1"))
    assert not repo.points()


def test_a_capture_in_one_go_survives_gcs_at_every_step(repo, other):
    """P5-09: a long first full with gc at work all the time: condemned packs of a capture stay and are not copied."""
    with other.writer() as writer:
        changes = []
        for letter in range(1, 30):
            changes.append((letter, writer.put(chunk(letter))))
            if letter % 10 == 0:
                writer.flush()
                assert not gc(repo).deleted_packs
        ref = other.write_map(None, 100 * CHUNK, changes, writer)
        writer.flush()
        gc(repo)
        other.commit(point("p1", ref))
        gc(repo)
    report = gc(repo)
    assert report.copied_bytes == 0
    assert report.deleted_packs == 0
    assert read(repo, ref) == expect({n: n for n in range(1, 30)})


def test_two_gcs_do_not_work_at_once(repo, other):
    with repo.lock("maintenance", "gc"), pytest.raises(Locked) as caught:
        gc(other)
    assert "gc (process" in str(caught.value)
    with repo.lock("shared", "export"):
        gc(other)


def test_gc_drops_nothing_when_a_point_cannot_be_read(repo, place):
    ref = take(repo, "p1", {0: 1})
    take(repo, "p2", {1: 2}, base=ref, parent="p1", second=1)
    name = next(info.name for info in place.list("points/") if info.name.endswith("p1"))
    data = place.get(name)
    place.delete(name)
    place.put(name, data[:-1])
    with pytest.raises(IntegrityError):
        gc(repo)
    repo.delete_point("p1")
    gc(repo)
    assert [one.id for one in repo.points()] == ["p2"]


def test_merge_joins_small_packs_and_keeps_every_record(repo, place, other):
    """Many small points, then few objects; somebody who looked before finds everything after."""
    ref, letters = None, {}
    for step in range(20):
        ref = take(repo, f"p{step:02}", {step: step + 1}, base=ref, parent=f"p{step - 1:02}", second=step)
        letters[step] = step + 1
    assert len(packs(place)) == 20
    found = read(other, ref)  # its index knows the old packs now
    report = merge(repo)
    assert report.packs_before == 20
    assert len(packs(place)) == report.packs_after == 2
    assert read(other, ref) == found == expect(letters)
    assert not merge(repo).packs_before
    report = check(repo, read_data=True)
    assert report.ok, report
    assert not gc(repo).copied_bytes


def test_tidy_merges_when_it_is_due_and_never_fails(repo, other, place, caplog):
    ref = None
    for step in range(15):
        ref = take(repo, f"p{step:02}", {step: step + 1}, base=ref, second=step)
    tidy(repo)
    assert len(packs(place)) == 15
    take(repo, "p15", {15: 16}, base=ref, second=15)
    with other.lock("maintenance", "gc"):
        tidy(repo)
    assert len(packs(place)) == 16
    tidy(repo)
    assert len(packs(place)) == 2
    assert not caplog.records


def test_a_cold_reader_needs_few_requests_after_merge(repo, place, tmp_path):
    ref = None
    for step in range(40):
        ref = take(
            repo, f"p{step:02}", {step * 40: step + 1}, base=ref, size=5000, parent=f"p{step - 1:02}", second=step
        )

    def requests():
        counting = Counting(place)
        cold = Repository.open(counting, cache=tmp_path / f"cold-{len(packs(place))}", key=KEY)
        before = counting.counts.requests
        assert len(dict(cold.map(ref).items())) == 40
        return counting.counts.requests - before

    many = requests()
    merge(repo)
    assert requests() < many / 4


def test_a_parent_deleted_while_its_child_is_committed(repo, other, place, monkeypatch):
    """The child shares chunks with the parent that are in condemned packs; the parent goes at the worst moment."""
    take(repo, "p0", {2: 9})
    base = take(repo, "p1", {0: 1, 1: 2}, second=1)
    repo.delete_point("p1")
    held = other.lock("shared", "export")  # keeps the condemned packs for a while
    gc(repo)
    held.release()
    # The parent comes back, as by a commit that gc's mark did not see, and is deleted again during its child's commit.
    name = f"points/{point('p1', base).domain_uuid}/p1"
    repo.commit(point("p1", base, second=1))
    with repo.writer() as writer:
        ref = repo.write_map(base, 100 * CHUNK, [(5, writer.put(chunk(5)))], writer)
        writer.flush()
        put = place.put

        def put_and_delete(target, data):
            put(target, data)
            if target.endswith("/p2"):
                place.delete(name)

        monkeypatch.setattr(place, "put", put_and_delete)
        repo.commit(point("p2", ref, second=2, parent="p1"))
    monkeypatch.undo()
    gc(repo)
    gc(repo)
    assert read(repo, ref) == expect({0: 1, 1: 2, 5: 5})
    assert check(repo, read_data=True).ok


@pytest.mark.parametrize("chunks", [3, 40])
def test_equal_disks_that_were_come_to_from_two_sides_both_stay(repo, chunks):
    """P5-09: the same content from the journal and from a bitmap: equal nodes, each in blocks of its own. Marking one
    map beside the other must not pass over those."""
    numbers = {index * 2: index + 1 for index in range(chunks)}
    first = take(repo, "p1", numbers)
    second = take(repo, "p2", numbers, second=1)
    assert first.root == second.root and first.place != second.place
    third = take(repo, "p3", {1: 77}, base=second, parent="p2", second=2)
    gc(repo, live_ratio=1.0)
    assert check(repo, read_data=True).ok
    for ref, wanted in ((first, numbers), (second, numbers), (third, {**numbers, 1: 77})):
        assert read(repo, ref) == expect(wanted)


def test_what_was_learned_under_a_lock_that_was_lost_counts_for_no_other(repo, monkeypatch):
    """gc may have been through between the two: whoever goes on under the new one looks again."""
    session, refreshed = repo._session, []
    original = repo.index.refresh

    def refresh():
        refreshed.append(session._shared)
        if len(refreshed) == 1:
            session._shared.release()  # as a lock that its holder did not renew
            session.enter("another thread")
        original()

    monkeypatch.setattr(repo.index, "refresh", refresh)
    with repo.session("one"):
        session.learn(always=True)
        session.learn()
        session.learn()
        session.leave()
    assert len(refreshed) == 2 and refreshed[0] is not refreshed[1]
