"""A machine boots at once from a served point, its local disk fills meanwhile, and in the end it is alone."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time

import pytest

from appliance.errors import ToolFailed
from appliance.process import run
from appliance.restore import serve
from tests.support.streamed import DISK_BYTES, Machine, Source


@pytest.fixture
def source(tmp_path):
    with Source(tmp_path) as found:
        yield found


def has_no_trouble(machine) -> None:
    """No request failed, nothing was read that was not written, and the client did not notice the end of it."""
    assert "trouble:" not in machine.proof and "failed" not in machine.proof and "another" not in machine.proof
    assert "Remounting" not in machine.console and "EXT4-fs error" not in machine.console
    assert len(re.findall("Linux version", machine.console)) == 1


def is_alone(source, iso, disk, folder, written) -> None:
    """The same medium starts the client from its disk, with all that it wrote, and nobody serves it."""
    serve.tidy(source.home, source.order.name)
    with Machine(iso, disk, folder) as machine:
        machine.wait_for("^up$")
        found = machine.said("found")
    assert "starting from them alone" in machine.console
    assert {name: found.get(name) for name in written} == written


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_stream(source, tmp_path):
    """P6-13, P6-14: the root comes over the network and is written to; then it is on the local disk, and the client
    has neither a map to the server nor an address for it any more."""
    iso, disk = source.image(tmp_path / "image"), source.local()
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for("^up$")
        assert "root: /dev/mapper/rewind-vda1 / ext4 rw" in machine.proof
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    has_no_trouble(machine)
    assert written and "nic: lan7" in machine.proof
    assert sorted(re.findall("map: (.*)", machine.proof)) == ["control", "rewind-vda", "rewind-vda1"]
    assert "10.0.2.16" not in machine.proof
    state = source.state()
    assert state["phase"] == "done" and state["done"] == state["total"] == DISK_BYTES
    assert state["service"][1] < state["read"]
    is_alone(source, iso, disk, tmp_path / "second", written)


def test_nobody_else_can_connect(source, tmp_path):
    """P6-30: a client without the session's certificate gets nothing, and neither does one without encryption."""
    source.image(tmp_path / "image")
    place = f"127.0.0.1:{source.order.port}/vda"
    for uri in (f"nbd://{place}", f"nbds://{place}"):
        with pytest.raises(ToolFailed):
            run(["nbdinfo", uri], timeout=20)


def unchanged_outside_the_root(source, disk) -> None:
    """What the client does not write is on the local disk as it is in the point, and its file system is whole."""
    new, old = disk.read_bytes()[:DISK_BYTES], source.disk.read_bytes()
    begin, end = 1 << 20, 49 << 20
    assert new[:begin] == old[:begin] and new[end:] == old[end:]
    part = disk.with_suffix(".part")
    part.write_bytes(new[begin:end])
    run(["e2fsck", "-fn", part])


def daemon_of(source) -> int:
    """The process of the session's storage daemon, 0 when there is none."""
    parent = source.state()["key"].partition(":")[0]
    found = subprocess.run(["pgrep", "-P", parent, "qemu-storage"], capture_output=True, text=True).stdout.split()
    return int(found[0]) if found else 0


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_source_is_killed_and_comes_back(source, tmp_path):
    """P6-14: the storage daemon, or all of the server, is killed 20 times while the disk fills: requests wait, none
    fails, and the disk ends as the model has it."""
    chance = random.Random(6)
    iso, disk = source.image(tmp_path / "image", region=128), source.local()
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for("^up$")
        kills = 0
        while kills < 20 and "\nend" not in machine.proof:
            time.sleep(chance.uniform(0.3, 2.5))
            if chance.random() < 0.5 and (daemon := daemon_of(source)):
                os.kill(daemon, signal.SIGKILL)
            else:
                os.kill(int(source.state()["key"].partition(":")[0]), signal.SIGKILL)
                time.sleep(chance.uniform(0.1, 4))
                serve.launch(source.home, source.order)
            kills += 1
        machine.wait_for("^end$", 600)
        machine.wait()
        written = machine.said("wrote")
    print(f"killed {kills} times")
    assert kills == 20
    has_no_trouble(machine)
    unchanged_outside_the_root(source, disk)
    is_alone(source, iso, disk, tmp_path / "second", written)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_power_cut_while_the_disk_fills(source, tmp_path):
    """P6-14: the machine loses its power 20 times at random and is booted again: what was durable is there, from the
    session or, once it is alone, from its disk."""
    chance = random.Random(7)
    iso, disk = source.image(tmp_path / "image", region=256), source.local()
    written = {}
    for boot in range(20):
        with Machine(iso, disk, tmp_path / f"boot{boot}") as machine:
            machine.wait_for("^up$")
            found = machine.said("found")
            assert {name: found.get(name) for name in written} == written, f"boot {boot}: {machine.console[-3000:]}"
            time.sleep(chance.uniform(0.5, 40))
            machine.kill()
            written |= machine.said("wrote")
            assert "trouble" not in machine.proof and "failed" not in machine.proof
    if source.state()["phase"] != "done":
        with Machine(iso, disk, tmp_path / "last") as machine:
            machine.wait_for("^end$", 300)
            machine.wait()
            written |= machine.said("wrote")
        has_no_trouble(machine)
    assert source.state()["boots"] > 1
    is_alone(source, iso, disk, tmp_path / "alone", written)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_copy_first(source, tmp_path):
    """P6-15: the local disk, which was full of something else, is the point's before the system starts; a power cut in
    the middle costs only what was not copied yet."""
    iso, disk = source.image(tmp_path / "image", "copy", overwrite=True), source.local()
    disk.write_bytes(b"\xff" * (DISK_BYTES + (8 << 20)))
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for(r"copying: \d+ of", where="console")
        machine.kill()
    assert source.state()["phase"] == "copying"
    with Machine(iso, disk, tmp_path / "second") as machine:
        machine.wait_for("^up$")
        assert re.search(r"root: /dev/nvme0n1p1 / ext4", machine.proof)
        assert source.state()["phase"] == "done"
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    unchanged_outside_the_root(source, disk)
    is_alone(source, iso, disk, tmp_path / "third", written)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("small", "local disk nvme0n1 (64 MiB) is smaller than disk vda (96 MiB)"),
        ("full", "local disk nvme0n1 is not empty: --overwrite would give its content up for disk vda"),
        ("silent", "no answer"),
    ],
)
def test_what_cannot_be_is_refused_on_the_console(what, said, source, tmp_path):
    """P6-20: a disk that is too small or has something on it is left alone; a server that is not there is waited for
    and then named. The server's side hears of it where it can."""
    iso, disk = source.image(tmp_path / "image", patience=8), source.local(64 << 20 if what == "small" else DISK_BYTES)
    if what == "full":
        with disk.open("r+b") as file:
            file.write(b"somebody's data")
    before = disk.read_bytes()
    if what == "silent":
        serve.tidy(source.home, source.order.name)
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait()
    assert "CANNOT GO ON" in machine.console, machine.console[-3000:]
    if what == "silent":
        assert re.search(r"CANNOT GO ON: .*(refused|magic|Socket)", machine.console), machine.console[-3000:]
    else:
        assert said in machine.console
        assert source.state()["error"] == said
    assert disk.read_bytes() == before and machine.proof == ""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_address_that_a_server_gave(source, tmp_path):
    """P6-13: without an address of its own the machine asks for one, as somebody else than the client."""
    iso, disk = source.image(tmp_path / "image", own="dhcp"), source.local()
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for("^end$", 200)
        machine.wait()
    has_no_trouble(machine)
    assert "address: 2" not in machine.proof
