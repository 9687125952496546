"""Ingest when the store fails or many threads write at once; contents of all shapes are the property test's."""

import errno
import random
import threading

import pytest

from appliance.capture.changes import ChangesFile, read_changes, read_header
from appliance.capture.ingest import Ingest, errno_of, result_path
from appliance.errors import CaptureError, NoSpace, PermissionDenied, Temporary
from appliance.store import Repository, open_backend
from appliance.store.backend.faulty import Fault, Faulty
from appliance.timeline.view import DiskView
from appliance.units import CHUNK, MiB


@pytest.fixture
def fault():
    """The fault that puts of packs meet; none at first."""
    return {"put": None}


@pytest.fixture
def repo(tmp_path, fault):
    plan = lambda operation: fault["put"] if (operation.kind, operation.name[:5]) == ("put", "packs") else None  # noqa: E731
    backend = Faulty(open_backend(f"memory://{tmp_path.name}"), plan)
    with Repository.create(backend, cache=tmp_path / "cache", key=None) as repo:
        yield repo


def noise(length, seed=0):
    return memoryview(random.Random(seed).randbytes(length))


def stored(repo, folder, disk, size, base=None):
    with repo.writer() as writer:
        ref = repo.write_map(base, size, read_changes(result_path(folder, disk)), writer)
    return DiskView(repo, ref).pread(0, size)


@pytest.mark.parametrize(
    ("kind", "error", "number"),
    [
        (Fault.NO_SPACE, NoSpace, errno.ENOSPC),
        (Fault.DENY, PermissionDenied, errno.EIO),
        (Fault.REFUSE, Temporary, errno.EIO),
    ],
)
def test_the_first_error_is_everybody_s_and_nothing_is_sealed(repo, tmp_path, fault, kind, error, number):
    """A5: a store that failed once may have lost what was answered, so the whole result is refused."""
    ingest = Ingest(repo, {"vda": (4 * MiB, None), "vdb": (MiB, None)}, tmp_path)
    ingest.write("vda", 0, noise(MiB))
    fault["put"] = kind
    with pytest.raises(error) as caught:
        ingest.flush("vda")
    assert errno_of(caught.value) == number
    fault["put"] = None
    for call in (
        lambda: ingest.write("vdb", 0, noise(512)),
        lambda: ingest.zero("vda", 0, 512),
        lambda: ingest.read("vda", 0, 512),
        lambda: ingest.flush("vda"),
        lambda: ingest.flush("vdb"),
    ):
        with pytest.raises(error):
            call()
    with pytest.raises(CaptureError):
        list(read_changes(result_path(tmp_path, "vda")))
    ingest.close()


def test_errnos():
    assert errno_of(OSError(errno.ENOSPC, "")) == errno_of(OSError(errno.EDQUOT, "")) == errno.ENOSPC
    assert errno_of(OSError(errno.EBADF, "")) == errno_of(ValueError()) == errno.EIO


def test_the_changes_file_s_own_disk_may_be_full(repo, tmp_path, monkeypatch):
    ingest = Ingest(repo, {"vda": (MiB, None)}, tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError) as caught:
        ingest.write("vda", 0, noise(CHUNK))
    assert errno_of(caught.value) == errno.ENOSPC
    monkeypatch.undo()
    with pytest.raises(OSError):
        ingest.flush("vda")


def test_threads_that_share_chunks_lose_nothing(repo, tmp_path):
    """Eight clients write interleaved sectors of the same chunks, and flush in between."""
    size = 2 * MiB
    data = noise(size)
    ingest = Ingest(repo, {"vda": (size, None)}, tmp_path)
    failures = []

    def work(number):
        try:
            sectors = list(range(number, size // 512, 8))
            random.Random(number).shuffle(sectors)
            for count, sector in enumerate(sectors):
                ingest.write("vda", sector * 512, data[sector * 512 : sector * 512 + 512])
                if count % 200 == 199:
                    ingest.flush("vda")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    ingest.flush("vda")
    ingest.close()
    assert stored(repo, tmp_path, "vda", size) == data


def test_parts_kept_are_few_whatever_a_client_does(repo, tmp_path):
    size = 64 * MiB
    ingest = Ingest(repo, {"vda": (size, None)}, tmp_path)
    for index in range(size // CHUNK):
        ingest.write("vda", index * CHUNK + 512, memoryview(b"%512d" % index))
    assert len(ingest._disks["vda"]._parts) <= 64
    ingest.flush("vda")
    ingest.close()
    assert len(list(read_changes(result_path(tmp_path, "vda")))) == size // CHUNK


def test_sectors_in_order_become_one_put_each_chunk(repo, tmp_path):
    ingest = Ingest(repo, {"vda": (MiB, None)}, tmp_path)
    data = noise(MiB)
    for start in range(0, MiB, 4096):
        ingest.write("vda", start, data[start : start + 4096])
    ingest.flush("vda")
    stats = ingest._writer.stats
    assert (stats.new_chunks, stats.reused_chunks) == (16, 0)
    ingest.close()


def test_what_was_stored_before_a_kill_is_not_stored_again(repo, tmp_path):
    """A full that ended half-way goes on where its packs end."""
    size = 40 * MiB  # more than a pack
    data = noise(size)
    for expected in (0, 400):
        ingest = Ingest(repo, {"vda": (size, None)}, tmp_path)
        for start in range(0, size, MiB):
            ingest.write("vda", start, data[start : start + MiB])
        stats = ingest._writer.stats
        assert stats.reused_chunks >= expected and stats.reused_chunks + stats.new_chunks == size // CHUNK
        ingest.close()  # without a flush: as if it had been killed


def test_a_shrunk_disk_does_not_bring_its_end_back(repo, tmp_path):
    one = Ingest(repo, {"vda": (2 * CHUNK, None)}, tmp_path)
    one.write("vda", 0, noise(2 * CHUNK))
    one.flush("vda")
    one.close()
    with repo.writer() as writer:
        base = repo.write_map(None, 2 * CHUNK, read_changes(result_path(tmp_path, "vda")), writer)
    small = Ingest(repo, {"vda": (CHUNK + 512, base)}, tmp_path)
    small.flush("vda")
    small.close()
    with repo.writer() as writer:
        cut = repo.write_map(base, CHUNK + 512, read_changes(result_path(tmp_path, "vda")), writer)
    grown = Ingest(repo, {"vda": (2 * CHUNK, cut)}, tmp_path)
    grown.flush("vda")
    grown.close()
    assert stored(repo, tmp_path, "vda", 2 * CHUNK, cut) == bytes(noise(2 * CHUNK))[: CHUNK + 512] + bytes(CHUNK - 512)


def test_changes_are_kept_sparsely_and_come_in_order(tmp_path):
    size = 8 << 40
    changes = ChangesFile(tmp_path / "c", size)
    last = size // CHUNK - 1
    for index in (last, 5, 1 << 20, 300):
        changes.set(index, b"%016d" % index)
    changes.set(300, b"")
    changes.set(301, b"x" * 16)
    changes.set(301, None)
    assert changes.get(301) is None and changes.get(300) == b"" and changes.get(last) == b"%016d" % last
    assert changes.seal(changes.generation, {"moved": 5})
    expected = [(5, b"%016d" % 5), (300, b""), (1 << 20, b"%016d" % (1 << 20)), (last, b"%016d" % last)]
    assert list(read_changes(tmp_path / "c")) == expected
    assert read_header(tmp_path / "c") == {"size": size, "moved": 5}
    changes.zero(0, last, iter([7]))
    assert not changes.seal(changes.generation - 1, {})
    assert changes.seal(changes.generation, {})
    assert list(read_changes(tmp_path / "c")) == [(7, b""), expected[-1]]
    assert (tmp_path / "c").stat().st_blocks * 512 < MiB
    changes.close()


def test_zeroing_fills_no_holes_however_it_is_cut(tmp_path):
    size = 1 << 40
    changes = ChangesFile(tmp_path / "c", size)
    chunks = size // CHUNK
    for index in range(0, chunks, 65521):
        changes.set(index, b"x" * 16)
    before = (tmp_path / "c").stat().st_blocks
    for start in range(0, chunks, 65535):
        changes.zero(start, min(start + 65535, chunks), iter(()))
    assert (tmp_path / "c").stat().st_blocks <= before + 8
    assert changes.seal(changes.generation, {}) and list(read_changes(tmp_path / "c")) == []
    changes.close()
