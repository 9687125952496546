"""`rewind image build --settle`: after the first boot by the image, the disk boots on the new hardware by itself."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import replace

import pytest

from appliance.service.image import making
from images.build import build_image
from images.settle.choice import After, with_steps
from tests.guests import clients
from tests.support.imageproof import arguments, boot
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.targets import TARGETS, Medium


@pytest.fixture(scope="module")
def imagery():
    from tests.support import world

    with Imagery(world.images_folder("settle"), clients.build("mbr")) as found:
        yield found


def settle(target, disk, medium, folder, seconds=600):
    """Boot by the image until the client says what came of it; its console."""
    folder.mkdir()
    with (folder / "qemu.log").open("wb") as log:
        command = arguments(target, disk, medium, folder)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline, console = time.monotonic() + limit(seconds), folder / "console.log"
        while process.poll() is None and time.monotonic() < deadline:
            text = console.read_text(errors="replace") if console.exists() else ""
            if re.search(r"rewind: settle: (done|not all)", text):
                break
            time.sleep(0.5)
    finally:
        # As a power cut: what it says is done must be on the disk.
        process.kill()
        process.wait(30)
    return console.read_text(errors="replace")


def has_settled(proof, imagery):
    """By itself, on the new hardware, as somebody else, with all that it had."""
    assert proof.up and proof.kernels == [imagery.client.kernel], proof
    expected, document = imagery.client.expected["first"], proof.document
    assert document["hostname"] == document["running_hostname"] == "twin"
    assert document["machine_id"] != expected["machine_id"] and re.fullmatch("[0-9a-f]{32}", document["machine_id"])
    assert (document["packages"], document["users"]) == (expected["packages"], expected["users"])
    assert (document["boots"], document["failed"]) == (2, [])
    assert document["interfaces"]["ens3"]["carrier"] and document["gateway"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_disk_boots_by_itself_on_its_new_hardware(imagery, tmp_path):
    """P6-19, P6-24: the client's own tool makes an initramfs for this controller, `MODULES=dep` as it is set; the disk
    then needs no image, and has the new identity. The control is test_clients: as it was it does not boot there."""
    target = TARGETS["ahci-e1000e-bios"]
    imagery.add_target(target)
    words = ("--at", imagery.points["first"], "--target", target.name, "--into", tmp_path / "image")
    (built,) = imagery.rewind(
        "image", "build", imagery.name, *words, "--settle", "--identity", "new", "--host-name", "twin"
    )
    (iso,) = [one["path"] for one in built["files"] if one["name"] == "iso"]
    with imagery.disk("first", tmp_path / "disk.qcow2") as disk:
        console = settle(target, disk, Medium("iso", iso), tmp_path / "first")
        said = re.findall(r"rewind: (\S+): (.*?)\r?\n", console)
        assert ("settle", "done") in said, console[-5000:]
        assert {("initramfs", "done"), ("host-name", "done"), ("nics", "done")} <= set(said)
        assert any(step == "initramfs" and "ahci" in text for step, text in said), said
        assert ("loader", "/dev/sda has GRUB in its first sector: it starts by itself") in said
        alone = tmp_path / "alone"
        alone.mkdir()
        has_settled(boot(target, disk, None, alone, seconds=300), imagery)


# Unpacks what the packages grub-efi-amd64-bin, dosfstools and fdisk would have put there: the client is built without.
_TOOLS = b"tar -C / -xf /run/rewind/tools.tar && say unpacked"


def tools(path):
    """The programs of this machine, which has the client's release."""
    needed = subprocess.check_output(["ldd", "/usr/sbin/sfdisk"], text=True)
    libraries = re.findall(r"=> /(?:usr/)?(lib/\S*/lib(?:fdisk|readline)\.so\.\d+) ", needed)
    files = ["lib/grub/x86_64-efi", "sbin/mkfs.vfat", "sbin/sfdisk", *libraries]
    files = [f"usr/{one}" for one in files]
    subprocess.run(["tar", "-C", "/", "--dereference", "--hard-dereference", "-cf", path, *files], check=True)
    return path.read_bytes()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_disk_of_a_bios_gets_what_uefi_starts(imagery, tmp_path):
    """P6-17 to P6-19: in the room that a larger disk has left, the client makes an EFI system partition and puts its
    own GRUB there, and its root takes the rest. The control is test_clients: as it was UEFI finds nothing on it."""
    target = TARGETS["ahci-e1000e-uefi"]
    imagery.add_target(target)
    with imagery.session() as session:
        point = imagery.points["first"]
        with making.prepared(session, imagery.name, point, target.name, "", (), None) as ready:
            after = After(settle=True, identity="new", host_name="twin", grow=True)
            plan, settings = with_steps(ready.planned.plan, after, "seed")
            extra = {"rewind/tools.tar": tools(tmp_path / "tools"), "rewind/settle/steps/settle/01-tools": _TOOLS}
            settings = replace(settings, run={**settings.run, **extra})
            built = build_image(
                plan, ready.guest.tree, ready.template, media=["iso"], folder=tmp_path / "image", settings=settings
            )
    with imagery.disk("first", tmp_path / "disk.qcow2") as disk:
        subprocess.run(["qemu-img", "resize", "-q", disk, "+192M"], check=True)
        console = settle(target, disk, Medium("iso", built.files["iso"]), tmp_path / "first")
        said = re.findall(r"rewind: (\S+): (.*?)\r?\n", console)
        print(*said, sep="\n")
        assert ("settle", "done") in said, console[-5000:]
        assert ("loader", "/dev/sda2 is a new EFI system partition") in said, said
        assert {("loader", "done"), ("initramfs", "done"), ("grow", "done")} <= set(said), said
        alone = tmp_path / "alone"
        alone.mkdir()
        proof = boot(target, disk, None, alone, seconds=300)
        has_settled(proof, imagery)
        assert proof.document["efi"] is True
