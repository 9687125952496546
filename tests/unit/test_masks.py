"""Which parts of a disk a revert compares, and what it says of the rest."""

import random

import pytest

from appliance.config import Home
from appliance.restore import keeper, masks
from appliance.restore.intent import DiskIntent
from appliance.restore.patch import COARSE, FINE, FULL_MASK, patch_info, read_patch
from appliance.store import Repository, open_backend
from appliance.timeline.view import read_pending
from appliance.units import CHUNK

COUNT = 3000


@pytest.fixture
def repo(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "_EXACT", 256)
    with Repository.create(open_backend(f"memory://{tmp_path.name}"), cache=tmp_path, key=None) as repo:
        yield repo


def content(index, version):
    return random.Random(index << 8 | version).randbytes(256) * (CHUNK // 256)


def compared(repo, monkeypatch, little):
    """({chunk: mask}, chunks read, {chunk: the true mask}) of two disks whose chunks differ wholly, but those of
    `little` in one 2 KiB."""
    now, wanted, true = [], [], {}
    with repo.writer() as writer:
        for index in range(COUNT):
            old = content(index, 0)
            new = old[:4096] + bytes(2048) + old[6144:] if index in little else content(index, 1)
            now.append((index, writer.put(old)))
            wanted.append((index, writer.put(new)))
            true[index] = 1 << 2 if index in little else FULL_MASK
        maps = [repo.write_map(None, COUNT * CHUNK, ids, writer) for ids in (now, wanted)]
    read = []
    real = repo.read_chunk
    with monkeypatch.context() as patch:
        patch.setattr(repo, "read_chunk", lambda chunk: read.append(chunk) or real(chunk))
        found = [(index, mask) for index, mask, _ in masks.differing(repo, *maps, range(COUNT))]
    assert [index for index, _ in found] == sorted(index for index, _ in found)
    return dict(found), len(read), true


def bits(found):
    return sum(mask.bit_count() for mask in found.values())


def test_what_differs_everywhere_is_hardly_read(repo, monkeypatch):
    """A7: the guest does not wait for a comparison of what was written anew."""
    found, read, true = compared(repo, monkeypatch, ())
    assert found == true
    assert read < 2 * (256 + 7 * 16)


def test_what_differs_in_little_is_exact(repo, monkeypatch):
    """A3: scattered small changes move exactly, however many."""
    found, read, true = compared(repo, monkeypatch, range(COUNT))
    assert found == true
    assert read == 2 * COUNT


@pytest.mark.parametrize("share", [0.02, 0.06, 0.3])
def test_a_mixture_moves_little_in_vain(repo, monkeypatch, share):
    """A3: also where both lie side by side, at most a tenth more moves than differs; nothing is forgotten."""
    little = set(random.Random(3).sample(range(COUNT), int(share * COUNT)))
    found, _, true = compared(repo, monkeypatch, little)
    assert all(found[index] & true[index] == true[index] for index in true)
    assert bits(found) <= 1.1 * bits(true)


def test_an_area_of_each_kind(repo, monkeypatch):
    """A3: where the kind changes, at most one group is taken for the other."""
    found, read, true = compared(repo, monkeypatch, range(1500, COUNT))
    assert found.keys() == true.keys()
    assert bits(found) <= 1.1 * bits(true)
    assert read < 2 * 2200


def test_chunks_that_turn_out_to_be_equal_are_left_out(repo, monkeypatch):
    """In a group that is taken whole, and in one that is not."""
    monkeypatch.setattr(masks, "_EXACT", 0)
    with repo.writer() as writer:
        ids = [(index, writer.put(content(index, 0))) for index in range(200)]
        one = repo.write_map(None, 200 * CHUNK, ids, writer)
    assert list(masks.differing(repo, one, one, range(200))) == []


@pytest.mark.parametrize("step", [1, 3, 51])
def test_what_becomes_zero_is_told(repo, step):
    """Of chunks that lie close together, and far apart."""
    with repo.writer() as writer:
        ids = {index: writer.put(content(index, 0)) for index in range(0, 40 * step, step)}
        now = repo.write_map(None, COUNT * CHUNK, list(ids.items()), writer)
        gone = [(index, b"") for index in ids if index % 2]
        wanted = repo.write_map(now, COUNT * CHUNK, gone, writer)
    found = {index: zero for index, _, zero in masks.differing(repo, now, wanted, list(ids), coarse=True)}
    assert found == {index: bool(index % 2) for index in ids}


@pytest.mark.parametrize("layout", [FINE, COARSE])
def test_what_is_said_of_a_patch_is_what_it_holds(repo, monkeypatch, tmp_path, layout):
    """P5-20, A7: told, and kept for the view, without reading the patch again; the last chunk is not whole."""
    monkeypatch.setattr(masks, "layout_for", lambda *_: layout)
    size = COUNT * CHUNK - 5120
    with repo.writer() as writer:
        ids = [(index, writer.put(content(index, 0))) for index in range(COUNT - 300, COUNT)]
        now = repo.write_map(None, size, ids, writer)
        new = [(index, b"" if index % 3 else writer.put(content(index, 1))) for index, _ in ids[1::2]]
        wanted = repo.write_map(now, size, new, writer)
    home = Home(tmp_path / "home")
    home.revert("uuid").mkdir(parents=True)
    disk = DiskIntent("vda", "source", "qcow2", size, wanted, now, "vda.patch", "vda.overlay")
    told = masks.prepare_patch(home, repo, "uuid", disk, now)
    path = home.revert("uuid") / disk.patch
    assert told == patch_info(path)
    assert told.pending_bytes and told.zero_bytes
    pending = [chunk for chunk, data, _ in read_patch(path) if data]
    assert list(read_pending(keeper.view_files(home, "uuid", "vda"))) == pending
