"""The intake on a real nbdkit, filled by the clients that people and QEMU use."""

import errno
import random
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from appliance import nbd
from appliance.capture.changes import read_changes
from appliance.errors import CaptureError, NbdFailed, ToolFailed
from appliance.process import run
from appliance.store import RepositorySpec
from appliance.timeline.view import DiskView
from appliance.units import CHUNK, MiB
from tests.filter.conftest import Shop, image, uri
from tests.support.limits import limit


def holds(shop: Shop, ref, data: bytes) -> bool:
    with shop.spec.open() as repo:
        view = DiskView(repo, ref)
        return view.size == len(data) and view.pread(0, len(data)) == data


@pytest.mark.parametrize(
    "command",
    [
        ["nbdcopy", "--flush", "{file}", "{uri}"],
        ["nbdcopy", "--flush", "--request-size=1048576", "--connections=2", "{file}", "{uri}"],
        ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "{file}", "{uri}"],
        ["qemu-img", "convert", "-n", "-W", "-m", "8", "-S", "512", "-f", "raw", "-O", "raw", "{file}", "{uri}"],
    ],
    ids=["nbdcopy", "nbdcopy-1M", "qemu-img", "qemu-img-parts"],
)
def test_a_disk_sent_whole_is_stored_whole(shop, command, tmp_path):
    """P5-02: whatever client sends it, whatever size it has."""
    size = 12 * MiB + 512 * 3
    data = image(size)
    # Holes inside chunks: `-S 512` makes qemu-img send parts and zeroes of less than a chunk.
    for start in range(0, size, 7 * 4096):
        data[start : start + 2048] = bytes(min(2048, size - start))
    (tmp_path / "disk").write_bytes(data)
    intake = shop.intake(vda=(size, None))
    run([word.format(file=tmp_path / "disk", uri=uri(intake.socket, "vda")) for word in command], timeout=limit(25))
    maps = shop.maps(intake, vda=(size, None))
    assert holds(shop, maps["vda"], data)
    zero = [i for i in range(-(-size // CHUNK)) if not any(data[i * CHUNK : (i + 1) * CHUNK])]
    assert zero and not {index for index, _ in intake.changes("vda")} & set(zero)


def test_an_increment_is_joined_with_its_base(shop):
    """A4, P5-03: parts of chunks, zeroes and unchanged rewrites over a base; only what differs is a change."""
    before = image(8 * MiB, seed=2, filled=0.8)
    base = shop.taken(vda=before)["vda"]
    after = bytearray(before)
    intake = shop.intake(vda=(len(after), base))
    with nbd.connect(intake.socket, "vda") as disk:
        for offset, length in [(512, 1024), (3 * CHUNK - 512, 1024), (10 * CHUNK, CHUNK)]:
            after[offset : offset + length] = b"\x55" * length
            disk.pwrite(bytes(after[offset : offset + length]), offset)
        after[20 * CHUNK + 512 : 25 * CHUNK + 512] = bytes(5 * CHUNK)
        disk.zero(5 * CHUNK, 20 * CHUNK + 512)
        disk.pwrite(bytes(after[30 * CHUNK : 40 * CHUNK]), 30 * CHUNK)
        disk.flush()
    maps = shop.maps(intake, vda=(len(after), base))
    assert holds(shop, maps["vda"], after)
    assert [index for index, _ in intake.changes("vda")] == [
        index for index in range(len(after) // CHUNK)
        if after[index * CHUNK : (index + 1) * CHUNK] != before[index * CHUNK : (index + 1) * CHUNK]
    ]  # fmt: skip
    assert intake.counters("vda")["moved"] == 2048 + 11 * CHUNK


def test_a_disk_read_again_after_a_lost_bitmap_stores_and_changes_nothing(shop):
    """A whole disk against its base yields only what differs, and no chunk is stored twice."""
    before = image(8 * MiB, seed=3)
    base = shop.taken(vda=before)["vda"]
    packs = stored(shop)
    intake = shop.intake(vda=(len(before), base))
    with nbd.connect(intake.socket, "vda") as disk:
        disk.pwrite(bytes(before), 0)
        disk.flush()
    assert list(intake.changes("vda")) == []
    assert stored(shop) == packs
    assert shop.maps(intake, vda=(len(before), base))["vda"].root == base.root


def test_all_disks_of_a_domain_go_through_one_process(shop):
    disks = {"vda": image(5 * MiB, 4), "vdb": image(3 * MiB + 512, 5), "sda": bytearray(64 * MiB)}
    intake = shop.intake(**{name: (len(data), None) for name, data in disks.items()})

    def send(name):
        with nbd.connect(intake.socket, name) as disk:
            disk.pwrite(bytes(disks[name]), 0)
            disk.flush()

    threads = [threading.Thread(target=send, args=(name,)) for name in disks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Reads see what was written here, sealed or not.
    with nbd.connect(intake.socket, "vda") as disk:
        assert disk.pread(disk.size(), 0) == disks["vda"]
    maps = shop.maps(intake, **{name: (len(data), None) for name, data in disks.items()})
    for name, data in disks.items():
        assert holds(shop, maps[name], data)
    assert maps["sda"].root == b""


def test_a_sparse_terabyte_costs_nothing(shop):
    size = 1 << 40
    intake = shop.intake(vda=(size, None))
    begun = time.monotonic()
    with nbd.connect(intake.socket, "vda") as disk:
        disk.pwrite(b"data" * (CHUNK // 4), 700 << 30)
        disk.zero(1 << 30, (700 << 30) - MiB)
        disk.pwrite(b"data" * (CHUNK // 4), 900 << 30)
        disk.zero(400 << 30, 0)
        disk.flush()
    assert time.monotonic() - begun < 5
    assert [index for index, _ in intake.changes("vda")] == [(900 << 30) // CHUNK]
    assert (shop.run / "intake" / "vda.changes").stat().st_blocks * 512 < MiB


def test_memory_does_not_grow_with_the_disk(shop):
    """A8: several packs' worth of incompressible data through four connections; well under 200 MiB."""
    size = 128 * MiB
    intake = shop.intake(vda=(size, None))
    pattern = random.Random(9).randbytes(4 * MiB)

    def send(number):
        with nbd.connect(intake.socket, "vda") as disk:
            for offset in range(number * size // 4, (number + 1) * size // 4, MiB):
                start = (offset // MiB * 1009) % (3 * MiB)
                disk.pwrite(pattern[start : start + MiB], offset)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with nbd.connect(intake.socket, "vda") as disk:
        disk.flush()
    assert intake.counters("vda")["stored"] > size // 2
    status = Path(f"/proc/{intake.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 200 << 10


def test_a_result_outlives_its_writer_and_is_whole_or_refused(shop):
    """A5: killed after the flush nothing is missing; killed before it nothing is pretended."""
    data = image(4 * MiB, 6, filled=1)
    intake = shop.intake(vda=(len(data), None), vdb=(len(data), None))
    with nbd.connect(intake.socket, "vda") as vda, nbd.connect(intake.socket, "vdb") as vdb:
        vda.pwrite(bytes(data), 0)
        vdb.pwrite(bytes(data), 0)
        vda.flush()
        intake.kill()
    assert holds(shop, shop.maps(intake, vda=(len(data), None))["vda"], data)
    with pytest.raises(CaptureError, match=r"vdb\.changes is not complete"):
        list(intake.changes("vdb"))
    with pytest.raises(CaptureError, match=r"vdc\.changes"):
        intake.counters("vdc")


def test_what_is_written_after_a_flush_unseals_the_result(shop):
    intake = shop.intake(vda=(MiB, None))
    with nbd.connect(intake.socket, "vda") as disk:
        for data, offset in [(b"a" * CHUNK, 0), (b"b" * 512, CHUNK)]:
            disk.pwrite(data, offset)
            with pytest.raises(CaptureError):
                list(intake.changes("vda"))
            disk.flush()
            assert list(intake.changes("vda"))


def test_killed_at_any_moment_the_repository_opens_and_the_epoch_is_repeated(shop):
    """A5: kill -9 in the middle of a busy ingest."""
    data = image(24 * MiB, 7, filled=1)
    for pause in (0.01, 0.1, 0.25):
        intake = shop.intake(vda=(len(data), None))
        client = threading.Thread(target=send_ignoring_errors, args=(intake.socket, data))
        client.start()
        time.sleep(pause)
        intake.kill()
        client.join(20)
        assert not client.is_alive(), "the client hangs"
    intake = shop.intake(vda=(len(data), None))
    send_ignoring_errors(intake.socket, data)
    assert holds(shop, shop.maps(intake, vda=(len(data), None))["vda"], data)


def send_ignoring_errors(socket, data):
    try:
        with nbd.connect(socket, "vda") as disk:
            for offset in range(0, len(data), MiB):
                disk.pwrite(bytes(data[offset : offset + MiB]), offset)
            disk.flush()
    except Exception:
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_repository_is_told_as_such_and_poisons_the_result(tmp_path, small_disk):
    """A5: ENOSPC at the client, no hang, no sealed result, and the earlier point is untouched."""
    shop = Shop(tmp_path, url=str(small_disk / "repository"))
    try:
        first = random.Random(8).randbytes(2 * MiB)
        kept = shop.taken(vda=first)["vda"]
        intake = shop.intake(vda=(64 * MiB, kept))
        with nbd.connect(intake.socket, "vda") as disk:
            with pytest.raises(NbdFailed) as caught:
                for offset in range(0, 64 * MiB, MiB):
                    disk.pwrite(random.Random(offset).randbytes(MiB), offset)
                disk.flush()
            assert caught.value.fields["errno"] == errno.ENOSPC
            with pytest.raises(NbdFailed) as caught:
                disk.flush()
            assert caught.value.fields["errno"] == errno.ENOSPC
        assert "no space left" in shop.log.read_text()
        with pytest.raises(CaptureError):
            list(intake.changes("vda"))
        assert holds(shop, kept, first)
    finally:
        shop.end()


def test_a_lost_repository_is_an_error_and_no_hang(shop):
    intake = shop.intake(vda=(256 * MiB, None))
    shutil.rmtree(shop.url)
    begun = time.monotonic()
    with nbd.connect(intake.socket, "vda") as disk, pytest.raises(NbdFailed) as caught:
        disk.pwrite(random.Random(1).randbytes(MiB), 0)
        disk.flush()
    assert caught.value.fields["errno"] == errno.EIO
    assert time.monotonic() - begun < 20


def test_an_intake_that_cannot_start_says_why(shop):
    from appliance.capture.intake import Intake

    wrong = RepositorySpec(str(shop.folder / "nothing"), shop.folder / "cache", None)
    with pytest.raises(ToolFailed, match="no repository at"):
        Intake(shop.run, wrong, {"vda": (MiB, None)}).start()
    with pytest.raises(ToolFailed, match="encrypted"):
        Intake(shop.run, RepositorySpec(shop.url, shop.folder / "cache", None), {"vda": (MiB, None)}).start()


def test_only_ordered_disks_are_taken_in(shop):
    intake = shop.intake(vda=(MiB, None))
    with pytest.raises(Exception, match="vdx"):
        nbd.connect(intake.socket, "vdx")
    assert (intake.socket.stat().st_mode & 0o777) == 0o600


def test_changes_can_be_read_by_another_process_from_the_file(shop):
    intake = shop.intake(vda=(MiB, None))
    with nbd.connect(intake.socket, "vda") as disk:
        disk.pwrite(b"x" * CHUNK, 3 * CHUNK)
        disk.flush()
    intake.stop()
    assert [index for index, _ in read_changes(shop.run / "intake" / "vda.changes")] == [3]


def stored(shop: Shop) -> int:
    with shop.spec.open() as repo:
        return sum(info.size for info in repo.backend.list("packs/"))
