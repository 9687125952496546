"""A machine boots at once from a served point, its local disk fills meanwhile, and in the end it is alone."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from appliance.daemon import Daemon
from appliance.errors import ToolFailed
from appliance.process import lives, run
from appliance.restore import claim, control, kept, streams
from appliance.service import Session
from appliance.service.image import streaming
from tests.support.limits import limit
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
    streams.tidy(source.home, source.order.name)
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


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_power_cut_before_the_last_word(source, tmp_path):
    """P6-14: the power goes after the disk is complete and before it has its mark: the next boot ends the session, and
    the one after that needs no server."""
    iso, disk = source.image(tmp_path / "image"), source.local()
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    folder, mark = streams.folder(source.home, source.order.name), f"rewind {source.order.session} vda"
    wait_for(lambda: source.state()["phase"] == "done" and not lives(source.state()["key"]))
    fill = re.search(rb"^fill \w+$", (folder / control.CONTROL).read_bytes(), re.MULTILINE)[0].decode()
    for path, offset, before, after in (
        (folder / control.CONTROL, 0, "state detached\n", "state alone\n"),
        (disk, DISK_BYTES, f"{mark}\n", f"{mark} begun{fill.removeprefix('fill')}\n"),
    ):
        with path.open("r+b") as file:
            file.seek(offset)
            text = file.read(4096).rstrip(b"\0").decode()
            assert before in text
            file.seek(offset)
            file.write(text.replace(before, after).encode().ljust(4096, b"\0"))
    streams.launch(source.home, source.order)
    with Machine(iso, disk, tmp_path / "second") as machine:
        machine.wait_for("^up$")
        found = machine.said("found")
    assert {name: found.get(name) for name in written} == written
    assert "starting from them alone" in machine.console
    assert source.record().state == "detached"
    wait_for(lambda: not lives(source.state()["key"]), 30)
    is_alone(source, iso, disk, tmp_path / "third", written)


def test_nobody_else_can_connect(source):
    """P6-30: a client without the session's certificate gets nothing, and neither does one without encryption."""
    source.serve()
    place = f"127.0.0.1:{source.order.port}/claim"
    for uri in (f"nbd://{place}", f"nbds://{place}"):
        with pytest.raises(ToolFailed):
            run(["nbdinfo", uri], timeout=20)


def test_session_goes_on_after_this_host_was_restarted(source):
    """P6-14: what lived in memory is gone with the processes; the daemon has the machine served again, by the one that
    was granted before, and nobody else."""
    source.serve()
    where, boot = streams.folder(source.home, source.order.name), "0123456789abcdef"
    with (where / claim.CLAIM).open("r+b") as file:
        file.write(f"rewind 1\nboot {boot}\nmachine rack.1\nend\n".encode())
    wait_for(lambda: claim.read_answer(where / claim.CLAIM).granted == boot)
    before = source.state()["key"]
    for key in (before, source.state()["view"]):
        kept.kill(key)
    shutil.rmtree(source.home.run(source.order.uuid))
    assert streams.phase_of(source.home, source.order.name) == "stopped"
    events = []
    with Session(source.home) as session:
        Daemon(session, events.append).round()
        (line,) = streaming.listing(session)
    assert [(one.kind, one.domain) for one in events] == [("resumed", source.order.name)], events
    assert line.phase == "waiting" and line.answers and source.state()["key"] != before
    command = Path(f"/proc/{daemon_of(source)}/cmdline").read_text()
    assert f"name=vda-{boot}," in command and claim.read_answer(where / claim.CLAIM).granted == boot


def wait_for(wanted, seconds=20.0):
    deadline = time.monotonic() + limit(seconds)
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def unchanged_outside_the_root(source, disk) -> None:
    """What the client does not write is on the local disk as it is in the point, and its file system is whole."""
    new, old = disk.read_bytes()[:DISK_BYTES], source.disk.read_bytes()
    begin, end = 1 << 20, 49 << 20
    assert new[:begin] == old[:begin] and new[end:] == old[end:]
    part = disk.with_suffix(".part")
    part.write_bytes(new[begin:end])
    assert subprocess.run(["e2fsck", "-p", part]).returncode in (0, 1)  # its journal may have something left
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
                streams.launch(source.home, source.order)
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
@pytest.mark.parametrize("seed", [7, 8])
def test_power_cut_while_the_disk_fills(seed, source, tmp_path):
    """P6-14: two machines lose their power 10 times each, at random, while they boot, while their disks fill and when
    they are alone, and are booted again: all that was durable is there, from the session or, once the machine is alone,
    from its disk, and the rest of the disk is the point's."""
    chance = random.Random(seed)
    iso, disk = source.image(tmp_path / "image", region=128), source.local()
    written, cuts = {}, collections.Counter()
    for boot in range(10):
        with Machine(iso, disk, tmp_path / f"boot{boot}") as machine:
            if chance.random() < 0.25:
                time.sleep(chance.uniform(2, 16))
            else:
                machine.wait_for("^up$")
                found = machine.said("found")
                assert {name: found.get(name) for name in written} == written, f"boot {boot}: {machine.console[-3000:]}"
                time.sleep(chance.uniform(0.5, 12))
            machine.kill()
        written |= machine.said("wrote")
        assert "trouble" not in machine.proof and "failed" not in machine.proof and "another" not in machine.proof
        cuts[source.state()["phase"] if "\nup" in machine.proof else "not up"] += 1
    print(json.dumps({"power cuts": sum(cuts.values()), **cuts, "files": len(written)}))
    with Machine(iso, disk, tmp_path / "last") as machine:
        machine.wait_for("^end$", 300)
        machine.wait()
        found = machine.said("found")
        assert {name: found.get(name) for name in written} == written
        written |= machine.said("wrote")
    has_no_trouble(machine)
    assert source.state()["phase"] == "done" and source.state()["boots"] > 3
    unchanged_outside_the_root(source, disk)
    is_alone(source, iso, disk, tmp_path / "alone", written)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_second_machine_is_sent_away(source, tmp_path):
    """P6-14: two machines are started from one image. The second is refused while the first one lives, and its disk is
    left alone; it takes the place of one that is silent, which then can write nothing any more."""
    iso, disk, other = source.image(tmp_path / "image", region=256), source.local(), source.local()
    with Machine(iso, disk, tmp_path / "first") as first:
        first.wait_for("^up$")
        with Machine(iso, other, tmp_path / "second") as second:
            wait_for(lambda: "was refused: another machine" in source.state()["error"], 100)
            second.wait()
        assert re.search("CANNOT GO ON: another machine, .*, runs from this session", second.console), second.console
        assert second.proof == "" and not any(other.read_bytes())
        first.wait_for(f"^wrote {len(first.said('wrote')) + 1} ")
        first.hold()
        written = first.said("wrote")
        assert first.console.count("CANNOT GO ON") == 0 and "trouble" not in first.proof
        with Machine(iso, other, tmp_path / "third") as third:
            third.wait_for("^up$")
            found = third.said("found")
            assert {name: found.get(name) for name in written} == written
            first.go_on()
            first.wait_for("another machine is served instead of this one", where="console")
            third.wait_for("^end$", 300)
            third.wait()
        assert first.said("wrote") == written
    written |= third.said("wrote")
    has_no_trouble(third)
    assert source.state()["phase"] == "done"
    unchanged_outside_the_root(source, other)
    is_alone(source, iso, other, tmp_path / "fourth", written)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_session_that_is_over_on_another_machine(source, tmp_path):
    """P6-14: the disks of the client are in another machine: this one is told so and not started without them."""
    iso, disk = source.image(tmp_path / "image"), source.local()
    record = "rewind 1\nstate alone\nboots 1\nlocal vda nvme.elsewhere/196608\nend\n"
    with (streams.folder(source.home, source.order.name) / control.CONTROL).open("r+b") as file:
        file.write(record.encode())
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait()
    assert "CANNOT GO ON: the session is over, and disk vda is not in this machine: nvme.elsewhere" in machine.console
    assert machine.proof == "" and not any(disk.read_bytes()) and source.state()["phase"] == "done"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_disk_of_exactly_the_same_size(source, tmp_path):
    """P6-14: without room behind the client's last sector the mark is in the gap before its first partition, where it
    has nothing: the same medium starts it without the server all the same."""
    iso, disk = source.image(tmp_path / "image"), source.local(DISK_BYTES)
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    has_no_trouble(machine)
    gap = (1 << 20) - 4096
    with disk.open("r+b") as file:
        file.seek(gap)
        assert file.read(4096).rstrip(b"\0").decode() == f"rewind {source.order.session} vda\n"
    is_alone(source, iso, disk, tmp_path / "second", written)
    with disk.open("r+b") as file:
        file.seek(gap)
        file.write(bytes(4096))
    unchanged_outside_the_root(source, disk)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_copy_first(source, tmp_path):
    """P6-15: the local disk, which was full of something else, is the point's before the system starts; a power cut in
    the middle costs only what was not copied yet."""
    iso, disk = source.image(tmp_path / "image", "copy", overwrite=True), source.local()
    disk.write_bytes(b"\xff" * (DISK_BYTES + (8 << 20)))
    with Machine(iso, disk, tmp_path / "first") as machine:
        deadline = time.monotonic() + limit(120)
        while source.record().state != "copying" and time.monotonic() < deadline:
            time.sleep(0.02)
        machine.hold()
        time.sleep(6)  # as long as it goes on without telling how far it is
        machine.go_on()
        machine.wait_for(r"copying: \d+ of", where="console")
        wait_for(lambda: source.record().done)
        machine.kill()
    assert source.state()["phase"] == "copying"
    data = sum(one.length for one in source._extents() if not one.zero)
    with Machine(iso, disk, tmp_path / "second") as machine:
        machine.wait_for("^up$")
        assert re.search(r"root: /dev/nvme0n1p1 / ext4", machine.proof)
        assert source.state()["phase"] == "done"
        assert source.state()["read"] < data
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    unchanged_outside_the_root(source, disk)
    is_alone(source, iso, disk, tmp_path / "third", written)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["stream", "copy"])
def test_another_disk_that_says_the_same_of_itself(mode, source, tmp_path):
    """P6-15, P6-20: virtual disks may all have one serial number. One with somebody's data is not taken for the one
    that was half filled; one that is empty gets all, also what the other one had already."""
    iso, disk = source.image(tmp_path / "image", mode, region=256), source.local()
    full, empty = source.local(), source.local()
    with full.open("r+b") as file:
        file.write(b"somebody's data")
    before = full.read_bytes()
    with Machine(iso, disk, tmp_path / "first") as machine:
        machine.wait_for(r"(copying|filling the local disks): [1-9]\d* of", where="console")
        machine.kill()
    with Machine(iso, full, tmp_path / "second") as machine:
        machine.wait()
    assert "CANNOT GO ON: local disk nvme0n1 is not empty" in machine.console and full.read_bytes() == before
    with Machine(iso, empty, tmp_path / "third") as machine:
        machine.wait_for("^end$")
        machine.wait()
        written = machine.said("wrote")
    has_no_trouble(machine)
    unchanged_outside_the_root(source, empty)
    is_alone(source, iso, empty, tmp_path / "fourth", written)


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
        streams.tidy(source.home, source.order.name)
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
