"""Segments of journals as objects: opaque bytes in, the same bytes out, or an error that names the part."""

from __future__ import annotations

import random

import pytest

from appliance.errors import AlreadyExists, IntegrityError, ObjectNotFound, VersionUnsupported
from appliance.store import Key, Repository
from appliance.store.backend.memory import MemoryBackend
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.store.parted import FRAME, PART
from appliance.store.segments import SegmentRef
from tests.support.store import DOMAIN, expect, read, take

KEY = Key(bytes(range(32)))
JOURNAL = "0f" * 16
LENGTHS = (0, 1, FRAME - 1, FRAME, FRAME + 1, PART, PART + 1, 2 * PART + 3 * FRAME + 5)


@pytest.fixture(params=[KEY, None], ids=["encrypted", "plain"])
def repo(request, tmp_path):
    place = MemoryBackend(f"segments-{request.node.nodeid}")
    with Repository.create(place, cache=tmp_path / "cache", key=request.param) as repo:
        yield repo


@pytest.fixture
def make(tmp_path):
    """A file of so many bytes: every other frame of it compresses."""

    def made(length, seed=1):
        dice = random.Random(seed)
        frames = [
            dice.randbytes(FRAME) if n % 2 else bytes([seed, n]) * (FRAME // 2) for n in range(length // FRAME + 1)
        ]
        path = tmp_path / f"{seed}-{length}"
        path.write_bytes(b"".join(frames)[:length])
        return path

    return made


def put(repo, path, first=1, last=9):
    return repo.put_segment(DOMAIN, JOURNAL, first, last, path)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_file_comes_back_as_it_was(repo, make, tmp_path, length):
    """P5-30: journals leave the host."""
    path = make(length)
    ref = put(repo, path)
    assert repo.segments(DOMAIN) == [ref] == repo.segments()
    (listed,) = repo.segments(DOMAIN)
    assert (listed.stored, listed.parts) == (ref.stored, ref.parts) == (ref.stored, max(1, -(-length // PART)))
    assert ref.stored == sum(info.size for info in repo.backend.list("segments/"))
    repo.fetch_segment(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["cache", "out", path.name])


def test_a_range_is_read_without_the_rest(repo, make):
    path = make(2 * PART + 5)
    data, ref = path.read_bytes(), put(repo, path)
    ranges = [
        (0, 10),
        (FRAME - 3, 6),
        (PART - 3, 6),
        (2 * PART + 1, 99),
        (5, 0),
        (len(data) + 9, 4),
        (-72, 72),
        (-3, 1),
    ]
    for offset, length in ranges:
        expected = data[offset : offset + length] if offset >= 0 else data[offset:][:length]
        assert repo.read_segment(ref, offset, length) == expected, (offset, length)
    assert repo.read_segment(ref) == data


def test_content_is_neither_readable_nor_movable(repo, make, tmp_path):
    """With a key nothing of it shows; and with or without one no segment passes for another."""
    path = make(3 * FRAME)
    ref = put(repo, path)
    data = repo.backend.get(ref.name)
    assert (path.read_bytes()[FRAME : FRAME + 64] in data) != repo.encrypted
    other = SegmentRef(DOMAIN, JOURNAL, 10, 18)
    repo.backend.put(other.name, data)
    with pytest.raises(IntegrityError, match="00010-0"):
        repo.fetch_segment(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_put_is_the_first_one_again(repo, make):
    """P5-09: nothing is written twice, nothing is replaced."""
    path = make(PART + 5)
    ref = put(repo, path)
    before = {info.name: repo.backend.get(info.name) for info in repo.backend.list("segments/")}
    assert put(repo, path).stored == ref.stored
    assert {info.name: repo.backend.get(info.name) for info in repo.backend.list("segments/")} == before
    with pytest.raises(AlreadyExists):
        put(repo, make(PART + 5, seed=2))
    with pytest.raises(AlreadyExists):
        put(repo, make(5))
    assert {info.name: repo.backend.get(info.name) for info in repo.backend.list("segments/")} == before


def test_parts_without_the_first_are_no_segment_and_are_used_by_the_next_put(repo, make, tmp_path):
    path = make(2 * PART + 5)
    ref = put(repo, path)
    kept = repo.backend.get(f"{ref.name}.2")
    repo.backend.delete(ref.name)
    repo.backend.delete(f"{ref.name}.1")
    assert repo.segments(DOMAIN) == []
    assert [(one.name, one.whole) for one in repo.segments(DOMAIN, whole=False)] == [(ref.name, False)]
    with pytest.raises(ObjectNotFound):
        repo.fetch_segment(ref, tmp_path / "out")
    again = put(repo, path)
    assert (again.parts, repo.backend.get(f"{ref.name}.2")) == (3, kept)
    repo.fetch_segment(again, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("where", [0, 4, 9, 5000, -60, -32, -5, -1])
@pytest.mark.parametrize("part", [0, 1])
def test_damage_is_named_and_mended_by_the_next_put(repo, make, tmp_path, where, part):
    path = make(PART + 2 * FRAME)
    ref = put(repo, path)
    name = f"{ref.name}.{part}" if part else ref.name
    data = bytearray(repo.backend.get(name))
    data[where] ^= 64
    repo.backend.delete(name)
    repo.backend.put(name, data)
    with pytest.raises((IntegrityError, VersionUnsupported), match=name):
        repo.fetch_segment(ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [(one.kind, one.object) for one in check(repo, read_data=True).problems] == [("damaged-segment", ref.name)]
    if where != -1:  # the version: maybe a newer program wrote it
        put(repo, path)
        repo.fetch_segment(ref, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == path.read_bytes()


def test_a_part_that_is_gone_or_of_another_file_is_named(repo, make):
    one, two = make(PART + 7), make(PART + 7, seed=2)
    ref = put(repo, one)
    other = repo.backend.get(f"{ref.name}.1")
    repo.backend.delete(f"{ref.name}.1")
    report = check(repo)
    assert [(p.kind, p.object, p.points) for p in report.problems] == [("damaged-segment", ref.name, ())]
    assert f"{ref.name}.1" in report.problems[0].reason
    repo.delete_segment(ref)
    put(repo, two)
    repo.backend.delete(f"{ref.name}.1")
    repo.backend.put(f"{ref.name}.1", other)
    assert "of another file" in check(repo).problems[0].reason


def test_deleting_leaves_nothing_and_spares_the_neighbours(repo, make):
    refs = [put(repo, make(PART + 5), 10 * n + 1, 10 * n + 10) for n in range(3)]
    repo.delete_segment(refs[1])
    repo.delete_segment(refs[1])
    assert repo.segments() == [refs[0], refs[2]]
    assert len(list(repo.backend.list("segments/"))) == 4


def test_gc_keeps_segments_and_both_count_them(repo, make):
    """They belong to no point: only `delete_segment` removes them."""
    take(repo, "p1", {0: 1, 1: 2})
    ref = take(repo, "p2", {0: 3}, second=1)
    kept = [put(repo, make(PART + 5)), put(repo, make(9), 10, 18)]
    repo.delete_point("p1")
    report = gc(repo)
    assert gc(repo).deleted_packs + report.deleted_packs
    assert (report.segments, report.segment_bytes) == (2, sum(one.stored for one in kept))
    assert repo.segments() == kept
    assert read(repo, ref) == expect({0: 3})
    found = check(repo, read_data=True)
    assert found.ok, found
    assert found.segments == 2
    assert found.bytes_read > PART


def test_other_objects_below_the_prefix_are_left_alone(repo, make):
    ref = put(repo, make(5))
    repo.backend.put(f"segments/{DOMAIN}/note", b"x")
    repo.backend.put(f"segments/{DOMAIN}/{JOURNAL}/index", b"x")
    assert repo.segments(whole=False) == [ref]
    with pytest.raises(ValueError, match="no name of a segment"):
        repo.put_segment(DOMAIN, "not hex", 1, 2, make(5))
    with pytest.raises(ValueError, match="no name of a segment"):
        repo.put_segment(DOMAIN, JOURNAL, 5, 4, make(5))
