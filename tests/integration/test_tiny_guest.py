"""The tiny guest itself: tests of everything else rest on what it says."""

from __future__ import annotations

import pytest

from tests.support import stamps
from tests.support.tiny import BareGuest, LibvirtGuest, TinyDisk, make_disk


def exercise(guest, disks):
    guest.boot()
    hello = guest.ask("hello")
    assert [d["name"] for d in hello["disks"]] == guest.targets
    guest.ask("start 100")
    answer = guest.ask("sh sleep 1; echo hi")
    assert answer["output"] == "hi\n"
    stopped = guest.ask("stop")
    assert stopped["errors"] == 0
    assert min(stopped["seq"]) > 3
    state = guest.ask("state")
    assert state["exact"], state
    assert state["seq"] == stopped["seq"]
    guest.kill()
    seen = stamps.check([guest.reader(i) for i in range(disks)], guest.layout, stopped["seq"])
    assert seen.exact, seen.messages
    assert list(seen.seq) == state["seq"]
    return state


@pytest.mark.timeout(60)
def test_bare_guest_writes_what_the_host_reads(tmp_path):
    """Also: the next boot goes on where the last one ended."""
    paths = [make_disk(tmp_path / f"{name}.qcow2", 64 << 20) for name in "ab"]
    with BareGuest(tmp_path, [TinyDisk(paths[0]), TinyDisk(paths[1], iothread=True)]) as guest:
        state = exercise(guest, 2)
        guest.boot()
        assert guest.ask("state {} {} {}".format(*state["seq"]))["seq"] == state["seq"]
        reads = guest.ask("reads 0.5 8")
        assert reads["reads"] > 0
        assert reads["wrong"] == reads["errors"] == 0


@pytest.mark.timeout(60)
def test_wrong_blocks_are_noticed(tmp_path):
    """A checker that accepts everything would prove nothing: one old block among new ones, and one damaged byte."""
    disk = make_disk(tmp_path / "a.raw", 64 << 20, "raw")
    with BareGuest(tmp_path, [TinyDisk(disk, "raw")], span=1 << 20) as guest:
        guest.boot()
        guest.ask("start 50")
        guest.ask("sh sleep 0.5")
        guest.ask("stop")
        guest.kill()
        old = disk.read_bytes()
        guest.boot()
        guest.ask("start 100")
        guest.ask("sh sleep 1")
        guest.ask("stop")
        guest.kill()
    new = disk.read_bytes()
    assert stamps.check([lambda o, n: new[o : o + n]], guest.layout).exact
    at = next(i for i in range(1 << 20, guest.layout.end, 4096) if old[i : i + 4096] != new[i : i + 4096])
    mixed = new[:at] + old[at : at + 4096] + new[at + 4096 :]
    assert not stamps.check([lambda o, n: mixed[o : o + n]], guest.layout).exact
    stamp = new.find(b"RWSTAMP1", 1 << 20)
    damaged = bytearray(new)
    damaged[stamp + 300] ^= 1
    assert not stamps.check([lambda o, n: bytes(damaged[o : o + n])], guest.layout).exact


@pytest.mark.timeout(60)
def test_libvirt_guest(libvirt_images):
    paths = [make_disk(libvirt_images / f"{name}.qcow2", 64 << 20) for name in "abc"]
    disks = [TinyDisk(paths[0], iothread=True), TinyDisk(paths[1]), TinyDisk(paths[2], bus="scsi")]
    with LibvirtGuest(libvirt_images, disks) as guest:
        exercise(guest, 3)
