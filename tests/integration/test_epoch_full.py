"""Something is full in the middle of an epoch: the guest notices nothing, the point fails in one clear sentence, and
the next one is exact."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import replace

import pytest

from appliance.errors import NoSpace, PushFailed
from appliance.units import KiB, MiB
from tests.support import stamps, world
from tests.support.protect import Once, Protected, image_content
from tests.support.tiny import BareGuest, TinyDisk, make_disk


@pytest.fixture
def guest(tmp_path):
    disks = [
        TinyDisk(make_disk(tmp_path / "a.qcow2", 64 * MiB), iothread=True),
        TinyDisk(make_disk(tmp_path / "b.qcow2", 64 * MiB)),
    ]
    with BareGuest(tmp_path, disks, name="full", span=1 << 20) as guest:
        guest.boot()
        yield guest


def protected(guest, folder):
    told = zip(guest.targets, guest.disks, strict=True)
    uri = guest.uri + "".join(f"&disk={target}:{disk.format}:{disk.path}" for target, disk in told)
    return Protected(folder, uri, guest.name)


def scatter(guest, seed, count=200):
    answer = guest.ask(f"scatter vda {count} {seed} {16 * MiB} {64 * MiB}")
    assert answer["ok"], answer


def set_to(world, **settings):
    world.settings = replace(world.settings, **settings)


def exact(world, guest, point):
    state = stamps.check([world.reader(point, target) for target in guest.targets], guest.layout)
    assert state.exact, state.messages


def ends_well(world, guest):
    """The guest saw nothing; the next points are exact and compare nothing."""
    assert guest.ask("stats")["errors"] == 0
    world.nothing_left()
    exact(world, guest, world.point())
    guest.ask("stop")
    last = world.point()
    for target, disk in zip(guest.targets, guest.disks, strict=True):
        assert world.content(last, target) == image_content(disk.path), target
    assert guest.ask("stats")["errors"] == 0
    assert not any("compare" in note for point in world.repo.points() for note in point.notes)


@pytest.mark.timeout(60)
def test_full_scratch(guest, tmp_path):
    """P5-05, A5: the guest overwrites more during a slow push than `scratch_limit` lets us keep."""
    with protected(guest, tmp_path) as world:
        scatter(guest, 1)
        world.point()
        guest.ask("start 50")
        scatter(guest, 1)
        set_to(world, scratch_limit=8 * MiB, rate_limit=2 * MiB)
        used = []

        def overwrite():
            scatter(guest, 1)
            used.append(scratch_bytes(guest.pid))

        with pytest.raises(PushFailed) as caught:
            world.point(progress=Once(overwrite))
        print(caught.value.message, used)
        assert "overwrote more of vda during the push than the scratch may hold" in caught.value.message
        assert "4 MiB" in caught.value.message
        assert 2 * MiB < used[0] <= 8 * MiB
        set_to(world, scratch_limit=0, rate_limit=0)
        ends_well(world, guest)


def scratch_bytes(pid):
    """Of all unlinked scratch files that the process has open."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if "/scratch-" in os.readlink(path):
            stat = os.stat(path)
            found[stat.st_ino] = stat.st_blocks * 512
    assert found
    return sum(found.values())


def fill(folder):
    with contextlib.suppress(OSError), (folder / "somebody else's").open("wb", 0) as file:
        while file.write(bytes(64 * KiB)):
            pass


@pytest.mark.timeout(60)
def test_full_repository(guest, tmp_path):
    """P5-05, A5: the repository's disk is full in the middle of a push; when there is room again, all is well."""
    if not world.inside():
        pytest.skip("needs the private world of ./dev test")
    folder = tmp_path / "repo"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "rewind-test", folder], check=True)
    try:
        with protected(guest, tmp_path) as one:
            one.point()
            guest.ask("start 50")
            scatter(guest, 1, 400)
            set_to(one, rate_limit=8 * MiB)
            with pytest.raises(NoSpace) as caught:
                one.point(progress=Once(lambda: fill(folder)))
            set_to(one, rate_limit=0)
            print(caught.value.message)
            assert guest.ask("stats")["errors"] == 0
            one.nothing_left()
            (folder / "somebody else's").unlink()
            ends_well(one, guest)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
