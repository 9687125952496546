"""What is not allocated costs nothing: a huge raw disk is taken in full, and compared, by what is in its file."""

from __future__ import annotations

import os
import subprocess

import pytest

from appliance.capture import allocation
from appliance.capture.changes import read_header
from appliance.units import CHUNK, GiB, MiB, TiB
from tests.support import stamps
from tests.support.protect import Once, Protected
from tests.support.tiny import BareGuest, TinyDisk, make_disk


@pytest.fixture
def guest(tmp_path):
    disks = [
        TinyDisk(make_disk(tmp_path / "a.raw", TiB, "raw"), "raw", iothread=True),
        TinyDisk(make_disk(tmp_path / "b.qcow2", GiB, backing=TinyDisk(make_disk(tmp_path / "below.qcow2", GiB)))),
    ]
    write_below(tmp_path / "below.qcow2")
    with BareGuest(tmp_path, disks, name="sparse", span=1 << 20) as guest:
        guest.boot()
        yield guest


def write_below(path):
    """Data in the backing image that the image above does not have."""
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 {600 * MiB} 1M", str(path)]
    subprocess.run(command, check=True, capture_output=True)


def protected(guest, folder):
    told = zip(guest.targets, guest.disks, strict=True)
    uri = guest.uri + "".join(f"&disk={target}:{disk.format}:{disk.path}" for target, disk in told)
    return Protected(folder, uri, guest.name)


def counters(world, target):
    return read_header(world.home.run(world.domain.uuid) / "intake" / f"{target}.changes")


def scatter(guest, seed):
    for target, end in zip(guest.targets, (TiB, GiB), strict=True):
        answer = guest.ask(f"scatter {target} 60 {seed} {16 * MiB} {end - 16 * MiB}")
        assert answer["ok"], answer


def raw_is_as_taken(world, point, path):
    """Every chunk that the point or the file has is the same in both."""
    held = {index for index, _ in world.repo.map(point.disk("vda").map).items()}
    there = {index for first, stop in allocation.allocated(path) for index in range(first, stop)}
    read = world.reader(point, "vda")
    with path.open("rb") as file:
        for index in held | there:
            file.seek(index * CHUNK)
            assert read(index * CHUNK, CHUNK) == file.read(CHUNK).ljust(CHUNK, b"\0"), index


@pytest.mark.timeout(90)
def test_holes_cost_nothing(guest, tmp_path):
    """P5-04, P5-10, A4: first points and comparisons of a terabyte send what is allocated, and are exact."""
    raw = guest.disks[0].path
    with protected(guest, tmp_path) as world:
        scatter(guest, 1)
        guest.ask("start 100")
        # Also what is written into holes while the map is read and the disk is pushed.
        first = world.point(progress=Once(lambda: scatter(guest, 2)))
        state = stamps.check([world.reader(first, target) for target in guest.targets], guest.layout)
        assert state.exact, state.messages
        for target in guest.targets:
            told = counters(world, target)
            print(target, told)
            assert told["moved"] < 64 * MiB
            assert told["zeroes"] < 100
        # Of the backing image, seen through what the guest wrote above it: scattered blocks of 4 KiB.
        below = world.reader(first, "vdb")(600 * MiB, MiB)
        assert below.count(b"\x07") > MiB // 2
        guest.ask("stop")
        raw_is_as_taken(world, world.point(), raw)
        world.nothing_left()
        assert guest.ask("stats")["errors"] == 0
        # Shut off, a raw disk has no bitmap; what was data may have become a hole.
        guest.kill()
        (start, stop), *_ = [run for run in allocation.allocated(raw) if run[0] > 100]
        command = ["fallocate", "--punch-hole", "--offset", str(start * CHUNK), "--length", str((stop - start) * CHUNK)]
        subprocess.run([*command, str(raw)], check=True)
        with raw.open("r+b") as file:
            file.seek(TiB // 2)
            file.write(os.urandom(CHUNK))
        guest.boot()
        point = world.point()
        assert any(note.startswith("compare of vda") for note in point.notes), point.notes
        raw_is_as_taken(world, point, raw)
        told = counters(world, "vda")
        print("compared", told)
        assert told["moved"] < 64 * MiB
        assert told["zeroes"] < 500 + TiB // (1 << 31)
        assert point.stats.new_chunks <= 2
        assert not world.repo.map(point.disk("vda").map).get(start)
        world.nothing_left()
        scatter(guest, 3)
        last = world.point()
        assert last.notes == ()
        raw_is_as_taken(world, last, raw)
