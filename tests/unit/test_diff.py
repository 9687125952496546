"""What `refine` promises beyond the masks, which the property test checks."""

import pytest

from appliance.extents import Extent
from appliance.store import Repository, open_backend
from appliance.timeline.diff import changed_extents, full_mask, refine
from appliance.units import CHUNK


@pytest.fixture
def repo(tmp_path):
    with Repository.create(open_backend(f"memory://{tmp_path.name}"), cache=tmp_path, key=None) as repo:
        yield repo


def disk_of(repo, chunks, size):
    with repo.writer() as writer:
        return repo.write_map(None, size, [(index, writer.put(data)) for index, data in chunks.items()], writer)


def test_units_of_every_size(repo):
    a = disk_of(repo, {0: b"a" * CHUNK}, CHUNK)
    b = disk_of(repo, {0: b"b" + b"a" * (CHUNK - 2) + b"b"}, CHUNK)
    for power in range(9, 17):
        unit = 1 << power
        assert dict(refine(repo, a, b, [0], unit)) == {0: 1 | 1 << CHUNK // unit - 1}
    for unit in (256, 3000, 2 * CHUNK):
        with pytest.raises(ValueError, match="unit"):
            list(refine(repo, a, b, [0], unit))


def test_equal_chunks_are_left_out_and_zero_is_compared_too(repo):
    a = disk_of(repo, {0: b"x" * CHUNK, 2: b"y" * 4096}, 4 * CHUNK)
    assert dict(refine(repo, a, a, [0, 1, 2])) == {}
    assert dict(refine(repo, a, None, [0, 1, 2])) == {0: full_mask(4096), 2: 1}
    assert dict(refine(repo, None, a, [2])) == {2: 1}


def test_beyond_the_budget_everything_differs_and_nothing_is_read(repo, monkeypatch):
    chunks = {index: b"%d" % index for index in range(50)}
    a = disk_of(repo, chunks, 50 * CHUNK)
    asked = []
    real = repo.read_chunk
    monkeypatch.setattr(repo, "read_chunk", lambda chunk: asked.append(chunk) or real(chunk))
    found = list(refine(repo, a, None, range(50), budget=10))
    assert found == [(index, 1 if index < 10 else full_mask(4096)) for index in range(50)]
    assert len(asked) == 10
    assert list(refine(repo, a, None, range(3), budget=0)) == [(index, full_mask(4096)) for index in range(3)]


def test_only_a_bounded_number_of_chunks_is_read_before_they_are_wanted(repo, monkeypatch):
    a = disk_of(repo, {index: b"%d" % index for index in range(300)}, 300 * CHUNK)
    asked = []
    real = repo.read_chunk
    monkeypatch.setattr(repo, "read_chunk", lambda chunk: asked.append(chunk) or real(chunk))
    masks = refine(repo, a, None, range(300))
    next(masks)
    masks.close()
    assert len(asked) < 50


def test_extents_are_joined_and_cut_at_the_size(repo):
    size = 3 * CHUNK + 512
    a = disk_of(repo, {0: b"a" * CHUNK}, size)
    b = disk_of(repo, {0: b"a" * 8192 + b"b" * (CHUNK - 8192), 1: b"b" * 4096, 3: b"c" * 512}, size)
    assert list(changed_extents(repo, a, b)) == [Extent(0, 2 * CHUNK), Extent(3 * CHUNK, 512)]
    assert list(changed_extents(repo, a, b, 4096)) == [
        Extent(8192, CHUNK - 8192 + 4096),
        Extent(3 * CHUNK, 512),
    ]
    assert list(changed_extents(repo, a, a, 4096)) == []
    assert list(changed_extents(repo, None, None)) == []
