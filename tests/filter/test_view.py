"""The view on a real nbdkit, read by the tools that people use."""

import ctypes
import json
import mmap
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from appliance import nbd
from appliance.errors import (
    ConfigError,
    ConnectError,
    IntegrityError,
    Interrupted,
    NbdFailed,
    TargetExists,
    ToolFailed,
)
from appliance.extents import Extent
from appliance.process import run
from appliance.restore.export import STATS_EXPORT, ViewServer
from appliance.restore.image import _direct, verify_image, write_image
from appliance.store.gc import gc
from appliance.timeline.view import write_pending
from appliance.units import CHUNK, MiB
from tests.filter.conftest import image
from tests.support.limits import limit


@pytest.fixture
def disks():
    return {"vda": bytes(image(9 * MiB + 512, 11)), "vdb": bytes(image(4 * MiB, 12))}


def test_tools_read_any_disk_and_its_allocation(shop, disks, tmp_path):
    """A10: nbdinfo, nbdcopy and qemu-img agree with an independent copy; holes are told truly."""
    view = shop.view(exports=shop.taken(**disks))
    for name, data in disks.items():
        (tmp_path / name).write_bytes(data)
        told = json.loads(run(["nbdinfo", "--json", "--map", view.uri(name)]))
        assert sum(one["length"] for one in told) == len(data)
        for one in told:
            for start in range(one["offset"], one["offset"] + one["length"], CHUNK):
                empty = not any(data[start : start + CHUNK])
                assert one["type"] == (3 if empty else 0)
        run(["nbdcopy", view.uri(name), tmp_path / f"{name}.copy"])
        assert (tmp_path / f"{name}.copy").read_bytes() == data
        run(["qemu-img", "compare", "-f", "raw", "-F", "raw", view.uri(name), tmp_path / name])
    assert set(nbd.exports(view.socket)) == set(disks)
    assert json.loads(run(["nbdinfo", "--json", view.uri("vda")]))["exports"][0]["can_multi_conn"]


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_many_readers_at_random_get_the_right_bytes(shop, disks):
    """A7: reads at depth 32 through four connections, with a cache much smaller than the disk."""
    data = disks["vda"]
    view = shop.view(exports=shop.taken(**disks), cache=MiB)
    wrong = []

    def read(seed):
        import random

        dice = random.Random(seed)
        with nbd.connect(view.socket, "vda") as disk:
            for _ in range(200):
                offset = dice.randrange(len(data))
                length = min(dice.choice([1, 512, 4096, CHUNK, 300000]), len(data) - offset)
                if disk.pread(length, offset) != data[offset : offset + length]:
                    wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    run([
        "fio", "--name=x", "--ioengine=nbd", f"--uri={view.uri('vda')}", "--rw=randread", "--bs=4k", "--iodepth=32",
        "--size=4M",
    ], timeout=limit(25))  # fmt: skip
    for thread in threads:
        thread.join()
    assert wrong == []


def test_served_bytes_are_counted_where_they_are_served(shop, disks):
    """A3: the counter at the server equals what the client read; it can be read at once, later, and after a kill."""
    view = shop.view(exports=shop.taken(**disks))
    with nbd.connect(view.socket, "vda") as disk:
        disk.pread(100_000, 5)
        disk.pread(CHUNK, 0)
    assert view.stats()["exports"]["vda"]["bytes"] == 100_000 + CHUNK
    assert view.stats()["exports"]["vda"]["requests"] == 2
    assert view.stats()["exports"]["vdb"]["bytes"] == 0
    deadline = time.monotonic() + 10
    while not view.stats_file.exists() or json.loads(view.stats_file.read_text()) != view.stats():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    view.kill()
    assert view.stats()["exports"]["vda"]["bytes"] == 100_000 + CHUNK
    assert ViewServer(shop.run, shop.spec, {}, socket=shop.run / "other.sock").stats() == {}


def test_pending_chunks_that_a_guest_touches_are_counted_and_their_neighbours_come_along(shop):
    """P5-08, P5-11: what the guest reads comes at once and is counted; what lies beside it comes along."""
    data = bytes(image(4 * MiB, 13, filled=1))
    pending = list(range(4, 60, 2))
    write_pending(shop.run / "pending", pending)
    view = shop.view(exports=shop.taken(vda=data), pending={"vda": shop.run / "pending"})
    with nbd.connect(view.socket, "vda") as disk:
        disk.pread(4096, 30 * CHUNK)
        disk.pread(4096, 31 * CHUNK)
        disk.pread(4096, 30 * CHUNK + 8192)
        deadline = time.monotonic() + 5
        while (stats := view.stats())["cache"]["ahead"] < 8:
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)
        for index in pending:  # the sweep
            assert disk.pread(CHUNK, index * CHUNK) == data[index * CHUNK : (index + 1) * CHUNK]
    told = view.stats()["exports"]["vda"]
    assert told["pending"] == told["touched"] == len(pending)
    assert told["touched_first"] == 1


def test_a_killed_view_is_started_again_at_the_same_socket(shop, disks):
    view = shop.view(exports=shop.taken(**disks))
    view.kill()
    assert not view.alive() and not view.answers(0.2)
    view.start()
    assert view.alive() and view.answers(5)
    view._server.signal(signal.SIGSTOP)
    assert view.alive() and not view.answers(0.2)
    view.kill()
    view.start()
    with nbd.connect(view.socket, "vdb") as disk:
        assert disk.pread(MiB, 0) == disks["vdb"][:MiB]


def test_a_lost_pack_is_an_error_for_its_chunks_alone(shop, disks):
    """P0-04: what is damaged is named in the log, everything else stays readable."""
    one = shop.taken(vda=disks["vda"])
    before = set(packs(shop))
    two = shop.taken(vdb=disks["vdb"])
    data_packs = sorted(set(packs(shop)) - before, key=lambda path: path.stat().st_size)
    view = shop.view(exports=one | two)
    with nbd.connect(view.socket, "vda") as vda, nbd.connect(view.socket, "vdb") as vdb:
        data_packs[-1].unlink()
        with pytest.raises(NbdFailed) as caught:
            vdb.pread(len(disks["vdb"]), 0)
        assert caught.value.fields["errno"] == 5
        assert vda.pread(MiB, 0) == disks["vda"][:MiB]
    assert "is damaged" in shop.log.read_text()


def packs(shop):
    return [path for path in (shop.folder / "repository" / "packs").rglob("*") if path.is_file()]


def test_a_writable_export_is_thrown_away(shop, disks, tmp_path):
    maps = shop.taken(**disks)
    view = shop.view(exports={"vda": maps["vda"]}, writable=True)
    size = len(disks["vda"])
    with nbd.connect(view.socket, "vda") as disk:
        assert disk.size() == size and not disk.read_only()
        disk.pwrite(b"mine" * 1024, 5 * CHUNK + 512)
        disk.pwrite(b"tail" * 128, size - 512)
        expected = bytearray(disks["vda"])
        expected[5 * CHUNK + 512 : 5 * CHUNK + 512 + 4096] = b"mine" * 1024
        expected[size - 512 :] = b"tail" * 128
        disk.flush()
    assert view.stats()["exports"]["vda"]["pending"] == 0
    with pytest.raises(ConnectError):
        nbd.connect(view.socket, STATS_EXPORT)
    with nbd.connect(view.socket, "vda") as disk:
        assert disk.pread(size, 0) == expected
    view.stop()
    view = shop.view(exports={"vda": maps["vda"]})
    with nbd.connect(view.socket, "vda") as disk:
        assert disk.read_only()
        assert disk.pread(size, 0) == disks["vda"]
    with pytest.raises(ConfigError):
        ViewServer(shop.run, shop.spec, maps, writable=True)


def test_a_sparse_terabyte_is_told_quickly(shop):
    intake = shop.intake(vda=(1 << 40, None))
    with nbd.connect(intake.socket, "vda") as disk:
        disk.pwrite(b"data" * (CHUNK // 4), 700 << 30)
        disk.flush()
    view = shop.view(exports=shop.maps(intake, vda=(1 << 40, None)))
    with nbd.connect(view.socket, "vda") as disk:
        begun = time.monotonic()
        assert disk.extents(0, 1 << 40) == [
            Extent(0, 700 << 30, zero=True),
            Extent(700 << 30, CHUNK),
            Extent((700 << 30) + CHUNK, (324 << 30) - CHUNK, zero=True),
        ]
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_a_disk_becomes_a_new_image(shop, disks, tmp_path, format):
    """P0-06: equal by hash, thin, private, and never over something that exists."""
    maps = shop.taken(**disks)
    view = shop.view(exports=maps)
    target = tmp_path / f"disk.{format}"
    told = []
    write_image(view, "vda", target, format, progress=told.append)
    (tmp_path / "vda").write_bytes(disks["vda"])
    run(["qemu-img", "compare", "-f", "raw", "-F", format, tmp_path / "vda", target])
    assert told[-1] == 1
    assert target.stat().st_mode & 0o777 == 0o600
    assert target.stat().st_blocks * 512 < len(disks["vda"]) * 0.8
    assert sorted(path.name for path in tmp_path.glob("*disk*")) == [target.name]
    with shop.spec.open() as repo:
        verify_image(repo, maps["vda"], target, format, shop.run)
        run(["qemu-io", "-f", format, "-c", "write -P 7 5M 512", target])
        with pytest.raises(IntegrityError, match=r"bytes from 5242880 are not the point's"):
            verify_image(repo, maps["vda"], target, format, shop.run)
        with pytest.raises(IntegrityError, match=f"bytes, not {len(disks['vdb'])}"):
            verify_image(repo, maps["vdb"], target, format, shop.run)
        with pytest.raises(ToolFailed, match="nothing"):
            verify_image(repo, maps["vdb"], tmp_path / "nothing", format, shop.run)
    with pytest.raises(TargetExists):
        write_image(view, "vda", target, format)


def cached(path):
    """Bytes of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), pages) == 0
        del first
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize(("whole", "able"), [(True, True), (True, False), (False, True)])
def test_an_image_goes_past_the_page_cache_where_it_can(shop, tmp_path, monkeypatch, format, whole, able):
    """P0-06: and where it cannot, or has half a block at its end, it is written as well."""
    data = bytes(image(4 * MiB + (0 if whole else 512), seed=9, filled=0.9))
    target = tmp_path / f"disk.{format}"
    (tmp_path / "same").write_bytes(data)
    target.touch()
    direct = _direct(target)
    target.unlink()
    if not able:
        monkeypatch.setattr("appliance.restore.image._direct", lambda _: False)
    write_image(shop.view(exports=shop.taken(vda=data)), "vda", target, format)
    assert cached(target) < 1 * MiB if direct and whole and able else cached(target) > 1 * MiB
    run(["qemu-img", "compare", "-f", "raw", "-F", format, tmp_path / "same", target])
    if format == "raw":
        assert target.stat().st_size == len(data)


def test_a_failed_or_interrupted_restore_leaves_no_image(shop, disks, tmp_path):
    view = shop.view(exports=shop.taken(**disks))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        write_image(view, "vda", tmp_path / "target", stop=stop, rate=MiB)
    with pytest.raises(ToolFailed, match="vdx"):
        write_image(view, "vdx", tmp_path / "target")
    with pytest.raises(ConfigError, match="floppy"):
        write_image(view, "vda", tmp_path / "target", "floppy")
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


def test_a_block_device_is_overwritten_only_when_told(shop, disks, tmp_path):
    device = loop_device(tmp_path / "backing", len(disks["vdb"]))
    try:
        view = shop.view(exports=shop.taken(**disks))
        with pytest.raises(TargetExists, match="already exists"):
            write_image(view, "vdb", device)
        write_image(view, "vdb", device, device=True)
        assert (tmp_path / "backing").read_bytes() == disks["vdb"]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def loop_device(path, size):
    from pathlib import Path

    if shutil.which("losetup") is None:
        pytest.skip("needs losetup (package mount)")
    path.write_bytes(os.urandom(1024) * (size // 1024))
    made = subprocess.run(["losetup", "--show", "--find", path], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    return Path(made.stdout.strip())


def test_a_key_that_came_by_descriptor_serves_restarts_too(shop, disks):
    import dataclasses

    maps = shop.taken(**disks)
    descriptor = os.memfd_create("key")
    os.write(descriptor, (shop.folder / "key").read_bytes())
    spec = dataclasses.replace(shop.spec, key_file=None, key_fd=descriptor)
    view = ViewServer(shop.run, spec, maps, log=shop.log)
    for _ in range(2):
        view.start()
        with nbd.connect(view.socket, "vdb") as disk:
            assert disk.pread(MiB, 0) == disks["vdb"][:MiB]
        view.kill()
    os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a socket away")
def test_the_socket_belongs_to_whom_it_is_for(shop, disks):
    view = shop.view(exports=shop.taken(**disks), owner=(65534, 65534))
    about = view.socket.stat()
    assert (about.st_uid, about.st_gid, about.st_mode & 0o777) == (65534, 65534, 0o600)
    view.stop()
    assert not view.socket.exists()
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        ViewServer(shop.run, shop.spec, {}, socket=shop.run / ("x" * 108))


def test_what_is_shown_is_not_collected(shop, disks):
    """P5-13: no point names these maps, as when one is deleted while it is shown; gc waits until the view has ended."""
    view = shop.view(exports=shop.taken(**disks), cache=MiB)
    with shop.spec.open() as repo:
        limit = time.monotonic() + 10
        while not any(holder.text.startswith("view") for holder in repo.locks.holders()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        report = gc(repo)
        assert report.condemned_packs and any(text.startswith("view") for text in report.waiting)
        with nbd.connect(view.socket, "vda") as disk:
            assert disk.pread(len(disks["vda"]), 0) == disks["vda"]
        view.stop()
        for server in shop.started:
            server.stop()
        assert not repo.locks.holders()
        assert gc(repo).deleted_packs
