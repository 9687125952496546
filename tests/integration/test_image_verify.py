"""`rewind image verify`: a point is booted where it can harm nobody, and the evidence is kept beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.errors import ImageError
from appliance.restore import rehearsal
from appliance.restore.rehearsal import rehearse
from appliance.restore.stage import Layer, Stage, guest_user
from images.build import build_image
from images.model import Firmware
from images.verify.judge import Waiting
from images.verify.machine import machine_for
from tests.guests import clients
from tests.support import imagekit
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.targets import TARGETS


@pytest.fixture(scope="module", params=["mbr"])
def imagery(request, tmp_path_factory):
    from tests.support import world

    images = world.images_folder("verify")
    with Imagery(images, clients.build(request.param)) as found:
        (found.home / "rewind.yaml").write_text("accelerator: tcg\n")
        yield found


# --- the machine itself, with a client that boots in seconds ----------------------------------------------------------


@dataclass
class Tiny:
    """An image of the tiny client, and its disk behind an NBD server."""

    stage: Stage
    disk: Path
    folder: Path

    def rehearse(self, *, timeout=120.0, over=None, **changes):
        from dataclasses import replace

        folder = self.folder / f"stage{time.monotonic_ns()}"
        folder.mkdir(mode=0o700)
        waiting = over or Waiting().over
        outcome = rehearse(replace(self.stage, **changes), folder, timeout=limit(timeout), over=waiting)
        assert list(folder.iterdir()) == []
        return outcome


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for one in (folder, *folder.parents[:2]):
        one.chmod(0o711)  # QEMU's user passes through
    client, template = imagekit.client(), imagekit.template()
    inventory = imagekit.inventory(Firmware.BIOS).model_copy(update={"disk_bus": "sata"})
    machine = machine_for(inventory, ["vda"])
    plan = imagekit.plan(client, inventory, "ahci", "e1000e")
    built = build_image(plan, client.tree(), template, media=["iso"], folder=folder / "image")
    disk, socket = Path(shutil.copy(client.disk, folder / "disk")), folder / "disk.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", socket, "file", disk], stdin=subprocess.DEVNULL)
    try:
        while not socket.exists():
            time.sleep(0.05)
        os.chown(socket, *guest_user()[:2])
        layer = Layer(socket, "", disk.stat().st_size)
        stage = Stage(machine.machine, machine.words, [layer], built.files["iso"], 384 << 20, accelerator="tcg")
        yield Tiny(stage, disk, folder)
    finally:
        server.kill()
        server.wait()


def our_qemu():
    """Of all our children, however deep."""
    found, waiting = [], [os.getpid()]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            waiting += map(int, task.read_text().split())
        found += [pid for pid in waiting if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "qemu-system-x86_64"]
    return sorted(set(found))


@pytest.mark.timeout(120)
def test_a_machine_boots_where_it_harms_nobody(tiny):
    """P6-28: what it may do is looked up while it runs: no rights, a filter for system calls, the first to be killed,
    and no file of this host open but firmware's. Its disk is what it was, and nothing is left."""
    before, seen = hashlib.sha256(tiny.disk.read_bytes()).hexdigest(), {}
    waiting = Waiting()

    def over(console, report, now):
        if b"Linux version" in console and not seen:
            (pid,) = our_qemu()
            seen["status"] = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            seen["oom"] = Path(f"/proc/{pid}/oom_score_adj").read_text().strip()
            seen["files"] = {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir()}
            seen["words"] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return waiting.over(console, report, now)

    outcome = tiny.rehearse(over=over)
    assert outcome.console.count(b"Linux version") == 1, outcome.console[-3000:]
    assert b"reboot: Power down" in outcome.console and outcome.ended == "it went off, or started anew"
    assert outcome.screenshot.startswith(b"\x89PNG") and outcome.written > 0
    assert hashlib.sha256(tiny.disk.read_bytes()).hexdigest() == before
    status = seen["status"]
    assert status["Uid"].split() == [str(guest_user()[0])] * 4
    assert (status["NoNewPrivs"], status["Seccomp"], status["CapEff"]) == ("1", "2", "0" * 16)
    assert seen["oom"] == "1000"
    paths = {one for one in seen["files"] if one.startswith("/") and not one.startswith(("/dev/", "/memfd:"))}
    own = {one for one in paths if one.startswith(str(tiny.folder))}
    assert all(one.endswith(" (deleted)") or "/image/" in one for one in own), own
    assert {one for one in paths - own if not one.startswith("/usr/share/")} == set()
    networks = [word for word in seen["words"] if word.startswith("user,")]
    assert networks and all("restrict=on" in word for word in networks)
    assert "accel=kvm" not in seen["words"] and "kvm" not in seen["words"]
    assert our_qemu() == []


@pytest.mark.timeout(60)
def test_each_limit_ends_it(tiny, monkeypatch):
    """P6-28: time, disk and memory of a test are bounded."""
    assert tiny.rehearse(timeout=0.0).ended == "the time was over"
    monkeypatch.setattr(rehearsal, "_LEAST_SPACE", 0)
    monkeypatch.setattr(rehearsal, "_MOST_SPACE", 4096)
    assert tiny.rehearse().ended == "it wrote more than 0 MiB to its disks"
    monkeypatch.undo()
    with pytest.raises(ImageError, match="MiB of memory left, too little"):
        tiny.rehearse(memory=1 << 50)
    with pytest.raises(ImageError, match=r"QEMU does not start a test: .*nonsense"):
        tiny.rehearse(words=["-device", "nonsense"])
    assert our_qemu() == []


# --- a point ----------------------------------------------------------------------------------------------------------


def verified(imagery, instant, *words, code=0):
    lines = imagery.rewind("image", "verify", imagery.name, "--at", imagery.points[instant], *words, code=code)
    assert [line["type"] for line in lines] == ["image-verified", *(["error"] if code else [])], lines
    return lines[0]


def listed(imagery):
    """point → how `points` lists it."""
    return {one["id"]: one for one in imagery.rewind("points", imagery.name) if one["type"] == "point"}


@pytest.mark.timeout(300)
def test_a_point_is_proven_by_a_boot(imagery, tmp_path):
    """P6-27, P6-28: one kernel, the client's own; packages, users, services and /etc as in the point; the screen, the
    console and the report are kept; the point is `booted` from then on. The domain is gone: nobody asks for it."""
    found = verified(imagery, "second", "--memory", "768M", "--timeout", "9m")
    assert found["booted"] and found["reasons"] == [], found
    assert found["kernels"] == [imagery.client.kernel]
    assert (found["differences"], found["failed"]) == ([], []), found
    system, expected = found["system"], imagery.client.expected["second"]
    assert system["complete"] and system["host_name"] == expected["hostname"]
    assert system["machine_id"] == expected["machine_id"]
    assert "client.setting=43" in system["command_line"]
    assert "tcp 7070" in system["listening"], system
    assert int(system["packages"]) > 50
    assert listed(imagery)[imagery.points["second"]]["consistency"] == "booted"
    assert listed(imagery)[imagery.points["first"]]["consistency"] != "booted"
    (kept,) = imagery.rewind("image", "evidence", imagery.name, "--at", "latest", "--into", tmp_path / "evidence")
    files = {Path(path).name: Path(path) for path in kept["files"]}
    assert files["console.log"].read_bytes().count(b"Linux version") == 1
    assert files["screen.png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["evidence.json"].read_text())["booted"] is True


@pytest.mark.timeout(120)
def test_a_point_that_does_not_come_up_says_so(imagery):
    """P6-28: the error names the reason, the list says that it failed, and the evidence tells the rest."""
    found = verified(imagery, "first", "--memory", "512M", "--timeout", "1s", code=67)
    assert not found["booted"] and "the time was over" in "; ".join(found["reasons"])
    one = listed(imagery)[imagery.points["first"]]
    assert one["consistency"] != "booted" and "did not boot" in " ".join(one["notes"])
    (kept,) = imagery.rewind("image", "evidence", imagery.name, "--at", imagery.points["first"])
    assert kept["booted"] is False and kept["document"]["reasons"] == found["reasons"]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["pvscsi-vmxnet3-uefi", "nvme-e1000e-uefi-ports", "usb-virtio-bios"])
def test_a_point_is_proven_on_a_target(imagery, name):
    """P6-17, P6-28: the machine that stands for a target has its controller, its card and its firmware."""
    imagery.add_target(TARGETS[name])
    found = verified(imagery, "first", "--target", name, "--memory", "768M", "--timeout", "14m")
    assert found["booted"] and found["differences"] == [] and found["failed"] == [], found
    assert ("efi" in found["system"]) is (TARGETS[name].firmware == "uefi")
