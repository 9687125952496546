"""`rewind image` from a point to a machine that has never seen the client: one boot, of the client's own kernel.

The disks that boot are the points themselves, served by a view below a throw-away overlay: nothing is restored first,
and nothing is written to them before the client's own system runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from appliance.config import Home
from appliance.process import lives, run
from appliance.restore import hydrations
from tests.guests import clients
from tests.support import libvirt, world
from tests.support.imageproof import boot, compare, expected, watch
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.targets import TARGETS, Medium

OVMF = Path("/usr/share/OVMF")


@pytest.fixture(scope="module")
def imagery(libvirt_uri, request):
    """Of the first client, or of the one that a test asks for."""
    images = world.images_folder("image")
    try:
        with Imagery(images, clients.build(getattr(request, "param", "mbr"))) as found:
            yield found
    finally:
        shutil.rmtree(images, ignore_errors=True)


def proves(imagery, target, instant, folder, medium="", start=""):
    """Build, boot, compare: I1's conditions for one cell of its matrix. `start` is what is started in a folder."""
    imagery.add_target(target)
    medium = medium or ("esp" if target.firmware == "uefi" else "iso")
    built = imagery.build(target, instant, medium, folder / "image")
    (file,) = [one for one in built["files"] if one["name"] == medium]
    with imagery.disk(instant, folder / "disk.qcow2") as disk:
        proof = boot(target, disk, Medium(medium, Path(file["path"], start)), folder)
    assert proof.up, proof
    assert proof.kernels == [imagery.client.kernel], proof
    assert compare(proof, expected(imagery.client, instant)) == [], proof
    return built


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("imagery", ["mbr", "dracut"], indirect=True)
@pytest.mark.parametrize("instant", ["first", "second"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_the_matrix(imagery, name, instant, tmp_path):
    """I1: every target, both clients, both instants."""
    proves(imagery, TARGETS[name], instant, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("ahci-e1000e-bios", "boot.ipxe"),  # SeaBIOS, and iPXE in the card
        ("ahci-virtio-uefi", "rewind.efi"),  # OVMF alone: its own driver and network
        ("ahci-e1000e-uefi", "boot.ipxe"),  # OVMF, and iPXE in the card
    ],
)
def test_network_boot(imagery, name, start, tmp_path):
    """P6-20: a folder on a TFTP server is enough, with BIOS and with UEFI; and the disk's root is found as ever."""
    proves(imagery, TARGETS[name], "second", tmp_path, "pxe", start)


@pytest.mark.timeout(120)
def test_two_instants_and_two_targets_give_four_images(imagery, tmp_path):
    """P6-05, P6-07, P6-08, P6-10, P6-11, P6-15, I2: what is in an image is what the plan says; again gives the same."""
    digests = {}
    targets = [TARGETS["nvme-vmxnet3-uefi"], TARGETS["megasas-rtl8139-bios"]]
    for target in targets:
        imagery.add_target(target)
        for instant in ("first", "second"):
            built = imagery.build(target, instant, "usb", tmp_path / f"{target.name}-{instant}")
            plan = imagery.plan(target, instant)
            assert built["modules"] == plan["load"]
            assert set(target.modules[:1]) <= {Path(one).name.split(".")[0].replace("-", "_") for one in plan["load"]}
            assert plan["counts"]["out"] > 300
            digests[target.name, instant] = {one["name"]: one["sha256"] for one in built["files"]}
            report = json.loads((tmp_path / f"{target.name}-{instant}" / "report.json").read_text())["run"]
            assert report["template_created"] < report["requested"] < report["created"]
    assert len({one["usb"] for one in digests.values()}) == 4
    again = imagery.build(targets[0], "first", "usb", tmp_path / "again")
    assert {one["name"]: one["sha256"] for one in again["files"]} == digests[targets[0].name, "first"]


@pytest.mark.timeout(120)
def test_bad_input_is_told_in_one_sentence(imagery, tmp_path):
    """Every verb of `image`: one sentence, a hint, its exit code, and nothing is written."""
    imagery.add_target(TARGETS["nvme-vmxnet3-uefi"])
    at = ("--at", imagery.points["first"])
    new, nvme = tmp_path / "new", ("--target", "nvme-vmxnet3-uefi")
    cases = [
        (61, ("image", "plan", imagery.name, *at, "--target", "nobody")),
        (62, ("image", "plan", imagery.name, *at, *nvme, "--template", "ffff")),
        (41, ("image", "plan", imagery.name, "--at", "feedbeef", *nvme)),
        (22, ("image", "plan", "nobody", *at, *nvme)),
        (60, ("image", "build", imagery.name, *at, *nvme, "--media", "tape", "--into", new)),
        (55, ("image", "build", imagery.name, *at, *nvme, "--into", tmp_path)),
        (15, ("image", "start", imagery.name, *at, *nvme, "--name", "n", "--into", new)),
        (35, ("image", "target", "add", "nvme-vmxnet3-uefi", "--profile", "generic-uefi")),
        (3, ("image", "target", "add", "two", "--profile", "generic-uefi", "--domain", imagery.name)),
        (63, ("image", "target", "add", "x", "--profile", "abacus")),
        (61, ("image", "target", "remove", "nobody")),
        (62, ("image", "template", "remove", "nobody")),
        (60, ("image", "drivers", "remove", "nobody")),
        (3, ("image", "forget", "nobody")),
    ]  # fmt: skip
    for code, words in cases:
        (line,) = imagery.rewind(*words, code=code)
        print(line["message"], "|", line["hint"])
        assert line["type"] == "error"
        assert "?" not in line["message"] and "\n" not in line["message"]
    assert not (tmp_path / "x").exists()


_HARDWARE = """<domain type="qemu"><name>rack</name><memory unit="MiB">768</memory><vcpu>2</vcpu>
<os><type arch="x86_64" machine="q35">hvm</type><loader readonly="yes" type="pflash">{code}</loader>
<nvram template="{vars}"/></os><features><acpi/></features>
<cpu mode="custom"><model>qemu64</model></cpu><devices>
<disk type="file" device="disk"><source file="/nowhere"/><target dev="sda" bus="sata"/></disk>
<interface type="user"><mac address="52:54:00:7a:33:01"/><model type="e1000e"/></interface>
<serial type="file"><source path="{folder}/console.log"/><target port="0"/></serial>
<serial type="file"><source path="{folder}/proof.log"/><target port="1"/></serial>
</devices></domain>"""


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_point_runs_at_once_as_a_domain_of_libvirt(imagery, tmp_path):
    """P6-13, P6-14, P6-17, P6-25: BIOS becomes UEFI, virtio becomes SATA; it runs from the repository until its own
    disk is filled, through the death of the view, and then needs nobody."""
    where = imagery.images / "new"
    where.mkdir(mode=0o777)
    where.chmod(0o777)
    xml = tmp_path / "rack.xml"
    xml.write_text(_HARDWARE.format(code=OVMF / "OVMF_CODE_4M.fd", vars=OVMF / "OVMF_VARS_4M.fd", folder=where))
    imagery.rewind("image", "target", "add", "rack", "--xml", xml)
    words = ("--at", imagery.points["second"], "--target", "rack", "--name", "twin", "--into", where / "files")
    try:
        (started,) = imagery.rewind("image", "start", imagery.name, *words, "--background", "--rate", "20M")
        assert started["type"] == "image-started"
        view, _, _ = _state(imagery, "twin")["view"].partition(":")
        os.kill(int(view), signal.SIGKILL)
        _stand_still(imagery, where / "console.log")
        proof = watch("rack", where, 200)
        assert "I/O error" not in proof.console
        assert proof.kernels == [imagery.client.kernel], proof
        assert compare(proof, expected(imagery.client, "second", efi=True)) == [], proof
        deadline = time.monotonic() + limit(100)
        while (now := imagery.rewind("image", "list")[0])["phase"] != "done":
            assert time.monotonic() < deadline, now
            time.sleep(1)
        assert not lives(_state(imagery, "twin")["view"])
        (disk,) = started["disks"].values()
        info = json.loads(run(["qemu-img", "info", "-U", "--output=json", disk]))
        assert "backing-filename" not in info
        imagery.rewind("image", "forget", "twin")
    finally:
        libvirt.virsh("destroy", "twin", check=False)
        libvirt.virsh("undefine", "twin", "--nvram", check=False)


def _stand_still(imagery, console):
    """While it boots nobody serves its disk, for longer than it can do without; then it is resumed."""
    deadline = time.monotonic() + limit(100)
    while "Run /init as init process" not in console.read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = _state(imagery, "twin")
    for key in (found["key"], found["view"]):
        os.kill(int(key.partition(":")[0]), signal.SIGKILL)
    time.sleep(15)  # with a libvirt that hands on for how long QEMU waits, ten of them are that
    assert libvirt.virsh("domstate", "--reason", "twin").stdout.strip() == "paused (I/O error)"
    said = console.read_text(errors="replace")
    time.sleep(2)
    assert console.read_text(errors="replace") == said and "proof: " not in said, "it needs no view"
    imagery.rewind("image", "resume", "twin")


def _state(imagery, name):
    return hydrations.state(Home(imagery.home), name)
