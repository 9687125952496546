"""check names exactly what is wrong, which points it affects, and what the next capture makes whole again."""

from __future__ import annotations

import pytest

from appliance.errors import IntegrityError, VersionUnsupported
from appliance.store import Key, Repository
from appliance.store.backend.memory import MemoryBackend
from appliance.store.check import check
from appliance.store.gc import gc
from tests.support.store import expect, read, take

KEY = Key(bytes(range(32)))


@pytest.fixture(params=[KEY, None], ids=["encrypted", "plain"])
def repo(request, tmp_path):
    place = MemoryBackend(f"check-{request.node.nodeid}")
    with Repository.create(place, cache=tmp_path / "a", key=request.param) as repo:
        yield repo


@pytest.fixture
def points(repo):
    """p1 and p2 share one chunk (2: 3); p3 shares nothing. The pack of each is told by when it came."""
    seen: set[str] = set()

    def pack():
        (new,) = {info.name for info in repo.backend.list("packs/")} - seen
        seen.add(new)
        return new

    one = take(repo, "p1", {0: 1, 1: 2, 2: 3})
    first = pack()
    two = take(repo, "p2", {0: 4, 1: 5}, base=one, parent="p1", second=1)
    second = pack()
    three = take(repo, "p3", {0: 7}, second=2)
    return {"p1": (one, first), "p2": (two, second), "p3": (three, pack())}


def change(repo, name, edit):
    data = bytearray(repo.backend.get(name))
    repo.backend.delete(name)
    repo.backend.put(name, edit(data))


def flipped(offset):
    def edit(data):
        data[offset] ^= 1
        return data

    return edit


def whole(repo):
    report = check(repo, read_data=True)
    assert report.ok, report


def test_nothing_wrong(repo, points):
    """P5-10: proven, not assumed."""
    report = check(repo, read_data=True)
    assert report.ok
    assert (report.points, report.packs) == (3, 3)
    assert report.records_read == 3 + 1 + 2 + 1 + 1 + 1
    assert report.points_affected == ()


def test_a_lost_pack(repo, points):
    """A9: named, with the points that need it and no others."""
    repo.backend.delete(points["p2"][1])
    report = check(repo)
    assert [(problem.kind, problem.object) for problem in report.problems] == [("lost-pack", points["p2"][1])]
    assert report.points_affected == ("p2",)


def test_a_lost_pack_that_others_share(repo, points):
    repo.backend.delete(points["p1"][1])
    assert check(repo).points_affected == ("p1", "p2")


def test_a_lost_pack_without_any_cache(repo, points, tmp_path):
    repo.backend.delete(points["p3"][1])
    other = Repository.open(repo.backend, cache=tmp_path / "new", key=KEY if repo.encrypted else None)
    report = check(other)
    assert [problem.kind for problem in report.problems] == ["missing-block"]
    assert report.points_affected == ("p3",)


@pytest.mark.parametrize("keep", [0, 10, 100, 60_000, -1])
def test_a_truncated_pack(repo, points, keep):
    change(repo, points["p3"][1], lambda data: data[:keep])
    report = check(repo)
    assert [(problem.kind, problem.object) for problem in report.problems] == [("damaged-pack", points["p3"][1])]
    assert report.points_affected == ("p3",)
    assert read(repo, points["p2"][0]) == expect({0: 4, 1: 5, 2: 3})


@pytest.mark.parametrize("where", [30, 66_000, 131_000])
def test_a_flipped_bit_in_a_record(repo, points, where):
    """Only reading everything finds it; the chunk is named by its pack, the points by who needs it."""
    change(repo, points["p1"][1], flipped(where))
    assert check(repo).ok
    report = check(repo, read_data=True)
    assert [(problem.kind, problem.object) for problem in report.problems] == [("damaged-records", points["p1"][1])]
    # The records lie in the order they were put: chunks 1, 2, 3; only the third is in p2 as well.
    assert report.points_affected == ("p1",)


def test_a_flipped_bit_in_the_shared_chunk(repo, points):
    change(repo, points["p1"][1], flipped(150_000))
    assert check(repo, read_data=True).points_affected == ("p1", "p2")


@pytest.mark.parametrize("where", [0, 4, 8, 12, -1, -20, -40, -60])
def test_a_flipped_bit_in_header_table_or_footer(repo, points, where):
    change(repo, points["p3"][1], flipped(where))
    report = check(repo, read_data=True)
    assert [problem.object for problem in report.problems] == [points["p3"][1]]


def test_a_damaged_point(repo, points):
    name = next(info.name for info in repo.backend.list("points/") if info.name.endswith("p2"))
    for where in (0, 4, 40, 60, -1):
        change(repo, name, flipped(where))
        report = check(repo)
        assert [(problem.kind, problem.object) for problem in report.problems] == [("damaged-point", name)]
        assert report.points_affected == ("p2",)
        change(repo, name, flipped(where))
    damaged: list[IntegrityError] = []
    change(repo, name, flipped(40))
    assert [point.id for point in repo.points(damaged=damaged)] == ["p1", "p3"]
    assert len(damaged) == 1
    with pytest.raises(IntegrityError):
        repo.point("p2")


def test_a_chunk_of_another_name_is_not_taken(repo, points):
    """A pack copied over another one by an admin is noticed."""
    data = repo.backend.get(points["p1"][1])
    change(repo, points["p3"][1], lambda _: data)
    report = check(repo)
    assert [problem.object for problem in report.problems] == [points["p3"][1]]


@pytest.mark.parametrize("damage", ["lost", "truncated", "flipped"])
def test_a_later_capture_makes_points_whole(repo, points, damage):
    """P5-10: after check wrote it down, content that comes by again is stored again."""
    pack = points["p3"][1]
    if damage == "lost":
        repo.backend.delete(pack)
    else:
        change(repo, pack, flipped(1000) if damage == "flipped" else lambda data: data[:5000])
    report = check(repo, read_data=True, repair=True)
    assert report.points_affected == ("p3",)
    take(repo, "p4", {0: 7}, second=4)  # the same disk again
    if damage == "flipped":
        whole_but_for_the_record(repo, pack)
    assert read(repo, repo.point("p4").disks[0].map) == expect({0: 7})
    repo.delete_point("p3") if damage != "flipped" else None
    report = gc(repo)
    assert not report.waiting
    whole(repo)
    assert not list(repo.backend.list("damaged/"))


def whole_but_for_the_record(repo, pack):
    report = check(repo, read_data=True)
    assert report.points_affected == ()
    assert [problem.object for problem in report.problems] == [pack]


def test_newer_versions_are_refused(repo, points):
    """Formats have versions; what we cannot read is not called damaged."""
    name = next(info.name for info in repo.backend.list("points/") if info.name.endswith("p1"))

    def newer(data):
        data[4] = 2
        return data

    change(repo, name, newer)
    with pytest.raises(VersionUnsupported):
        repo.point("p1")
    assert [point.id for point in repo.points()] == ["p2", "p3"]
    assert "version 2" in check(repo).problems[0].reason
    change(repo, "config", lambda data: data.replace(b'"rewind_repository": 1', b'"rewind_repository": 7'))
    with pytest.raises(VersionUnsupported) as caught:
        Repository.open(repo.backend, cache=repo.cache, key=KEY)
    assert "version 7" in str(caught.value)


def test_packs_of_a_newer_version_are_refused(repo, points, tmp_path):
    def newer(data):
        data[4] = data[-1] = 2
        return data

    change(repo, points["p3"][1], newer)
    other = Repository.open(repo.backend, cache=tmp_path / "new", key=KEY if repo.encrypted else None)
    problem = check(other).problems[0]
    assert problem.object == points["p3"][1]
    assert "version 2" in problem.reason
