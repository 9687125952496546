"""QEMU's own backup job as the intake's client, in a storage daemon: no guest, the same block layer."""

import shutil
import time

import pytest

from appliance import nbd
from appliance.process import Child, run
from appliance.units import CHUNK, MiB
from tests.filter.conftest import image
from tests.support.bare import Qmp
from tests.support.limits import limit

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon")

SIZE = 24 * MiB + 512 * 5


@pytest.fixture
def daemon(tmp_path):
    """A storage daemon with two qcow2 disks, each also exported so that the test can be their guest."""
    disks = {"vda": image(SIZE, 21, filled=0.3), "vdb": image(8 * MiB, 22)}
    words = ["qemu-storage-daemon", "--chardev", f"socket,id=m,path={tmp_path}/qmp,server=on,wait=off",
             "--monitor", "m", "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/guest"]  # fmt: skip
    for name, data in disks.items():
        (tmp_path / f"{name}.raw").write_bytes(data)
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / f"{name}.raw", tmp_path / f"{name}.qcow2"])
        file = f"file.driver=file,file.filename={tmp_path}/{name}.qcow2"
        words += ["--blockdev", f"qcow2,node-name={name},discard=unmap,{file}"]
        words += ["--export", f"nbd,id=x{name},node-name={name},name={name},writable=on"]
    with Child(words, name="qemu-storage-daemon") as child:
        deadline = time.monotonic() + 10
        while not (tmp_path / "qmp").exists():
            assert child.alive() and time.monotonic() < deadline, child.tail()
            time.sleep(0.02)
        yield Qmp(tmp_path / "qmp"), disks, tmp_path / "guest"


def push(monitor, intake, disks, **options):
    for name in disks:
        monitor.execute("blockdev-add", driver="nbd", node_name=f"to-{name}", export=name,
                        server={"type": "unix", "path": str(intake.socket)})  # fmt: skip
        monitor.execute("blockdev-backup", job_id=f"job-{name}", device=name, target=f"to-{name}",
                        on_target_error="report", x_perf={"max-workers": 1, "max-chunk": MiB}, **options)  # fmt: skip
    deadline = time.monotonic() + limit(25)
    while jobs := monitor.execute("query-jobs"):
        assert not any("error" in job for job in jobs), jobs
        assert time.monotonic() < deadline, jobs
        time.sleep(0.05)
    for name in disks:
        monitor.execute("blockdev-del", node_name=f"to-{name}")


def test_a_full_and_an_increment_are_exact_and_move_what_is_dirty(shop, daemon):
    """A4, A10, P5-03: all disks at once, a size off every boundary, holes, discards, unaligned writes."""
    monitor, disks, guest = daemon
    sizes = {name: len(data) for name, data in disks.items()}
    intake = shop.intake(**{name: (size, None) for name, size in sizes.items()})
    push(monitor, intake, disks, sync="full")
    intake.kill()
    base = shop.maps(intake, **{name: (size, None) for name, size in sizes.items()})
    assert_equal(shop, base, disks)
    assert intake.counters("vda")["moved"] < 0.5 * sizes["vda"]

    for name in disks:
        monitor.execute("block-dirty-bitmap-add", node=name, name="rw-test")
    dirty = dict.fromkeys(disks, 0)
    for name, data in disks.items():
        touched = set()
        with nbd.connect(guest, name) as disk:
            writes = [(512, 512), (5 * CHUNK - 512, 1024), (20 * CHUNK, 3 * CHUNK), (len(data) - 512, 512)]
            for offset, length in writes:
                data[offset : offset + length] = bytes(range(1, 256, 2)) * (length // 128)
                disk.pwrite(bytes(data[offset : offset + length]), offset)
                touched |= set(range(offset // CHUNK, -(-(offset + length) // CHUNK)))
            data[30 * CHUNK + 512 : 34 * CHUNK + 512] = bytes(4 * CHUNK)
            disk.zero(4 * CHUNK, 30 * CHUNK + 512)
            disk.flush()
        dirty[name] = len(touched | {30, 34}) * CHUNK
    intake = shop.intake(**{name: (size, base[name]) for name, size in sizes.items()})
    push(monitor, intake, disks, sync="bitmap", bitmap="rw-test", bitmap_mode="never")
    maps = shop.maps(intake, **{name: (size, base[name]) for name, size in sizes.items()})
    assert_equal(shop, maps, disks)
    for name in disks:
        assert intake.counters(name)["moved"] <= 1.02 * dirty[name]


def test_a_killed_intake_ends_the_job_and_nothing_else(shop, daemon):
    """A5: the job reports an error; the disk goes on; the next try is exact."""
    monitor, disks, guest = daemon
    size = len(disks["vda"])
    intake = shop.intake(vda=(size, None))
    monitor.execute("blockdev-add", driver="nbd", node_name="to", export="vda",
                    server={"type": "unix", "path": str(intake.socket)})  # fmt: skip
    monitor.execute("blockdev-backup", job_id="job", device="vda", target="to", sync="full", on_target_error="report",
                    speed=MiB, auto_dismiss=False)  # fmt: skip
    time.sleep(0.3)
    intake.kill()
    deadline = time.monotonic() + 10
    monitor.execute("block-job-set-speed", device="job", speed=0)
    while (job := monitor.execute("query-jobs")[0])["status"] != "concluded":
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    assert job["error"]
    monitor.execute("job-dismiss", id="job")
    monitor.execute("blockdev-del", node_name="to")
    with nbd.connect(guest, "vda") as disk:
        assert disk.pread(size, 0)[:size] == disks["vda"]
    intake = shop.intake(vda=(size, None))
    push(monitor, intake, ["vda"], sync="full")
    assert_equal(shop, shop.maps(intake, vda=(size, None)), {"vda": disks["vda"]})


def assert_equal(shop, maps, disks):
    view = shop.view(exports=maps)
    for name, data in disks.items():
        with nbd.connect(view.socket, name) as disk:
            assert disk.size() == len(data)
            assert disk.pread(len(data), 0) == data
    view.stop()
