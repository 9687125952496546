"""`rewind image build --settle`: after the first boot by the image, the disk boots on the new hardware by itself."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.service.image import making
from images.build import build_image
from images.settle.choice import After, with_steps
from tests.guests import clients, uefi
from tests.support import libvirt, settleboot, world
from tests.support.imageproof import boot, watch
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.settleboot import UNPACK, said, secure, settle, tools
from tests.support.targets import TARGETS, Medium

OVMF = Path("/usr/share/OVMF")
_EFI_TOOLS = ("lib/grub/x86_64-efi", "sbin/mkfs.vfat", "sbin/sfdisk")


@pytest.fixture(scope="module")
def imagery(request):
    """Of the first client, or of the one that a test asks for."""
    images = world.images_folder("settle")
    try:
        with Imagery(images, clients.build(getattr(request, "param", "mbr"))) as found:
            yield found
    finally:
        shutil.rmtree(images, ignore_errors=True)


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
        assert ("settle", "done") in said(console), console[-5000:]
        assert {("initramfs", "done"), ("host-name", "done"), ("nics", "done")} <= set(said(console))
        assert any(step == "initramfs" and "ahci" in text for step, text in said(console))
        assert ("loader", "/dev/sda has GRUB in its first sector: it starts by itself") in said(console)
        has_settled(alone(target, disk, tmp_path), imagery)


def built_with_tools(imagery, target, after, folder, *names):
    """An image whose client gets these programs and folders of /usr first, which it was built without."""
    folder.mkdir()
    imagery.add_target(target)
    with imagery.session() as session:
        point = imagery.points["first"]
        with making.prepared(session, imagery.name, point, target.name, "", (), None) as ready:
            plan, settings = with_steps(ready.planned.plan, after, "seed")
            extra = {"rewind/tools.tar": tools(folder / "tools", *names), "rewind/settle/steps/settle/01-tools": UNPACK}
            settings = replace(settings, run={**settings.run, **extra})
            built = build_image(
                plan, ready.guest.tree, ready.template, media=["iso"], folder=folder / "image", settings=settings
            )
            return Medium("iso", built.files["iso"])


def same_as_before(proof, imagery, boots=2):
    """By itself, on the new hardware, and who it was."""
    assert proof.up and proof.kernels == [imagery.client.kernel], proof
    expected, document = imagery.client.expected["first"], proof.document
    for name in ("hostname", "machine_id", "packages", "users", "fstab"):
        assert document[name] == expected[name], name
    assert (document["boots"], document["failed"]) == (boots, [])
    card = document["interfaces"][clients.ORIGINS[imagery.client.name].nic_name]
    assert card["carrier"] and document["gateway"]


def alone(target, disk, tmp_path, name="alone", extra=()):
    folder = tmp_path / name
    folder.mkdir()
    return boot(target, disk, None, folder, seconds=300, extra=extra)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("imagery", ["dracut"], indirect=True)
def test_dracut_on_a_larger_disk(imagery, tmp_path):
    """P6-17 to P6-19, P6-24: dracut makes the initramfs for NVMe, below LVM; the root takes the room of a larger disk.
    The control is test_clients: as it was it waits for its root there."""
    target = TARGETS["nvme-rtl8139-bios"]
    medium = built_with_tools(imagery, target, After(settle=True, grow=True), tmp_path / "made", "sbin/sfdisk")
    with imagery.disk("first", tmp_path / "disk.qcow2") as disk:
        subprocess.run(["qemu-img", "resize", "-q", disk, "+192M"], check=True)
        console = settle(target, disk, medium, tmp_path / "first")
        print(*said(console), sep="\n")
        assert ("settle", "done") in said(console), console[-5000:]
        assert {("initramfs", "done"), ("grow", "done"), ("nics", "done")} <= set(said(console))
        assert any(step == "initramfs" and "nvme" in text for step, text in said(console))
        assert any(re.fullmatch(r"the root has 1[5-9]\d MiB more", text) for _, text in said(console))
        same_as_before(alone(target, disk, tmp_path), imagery)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_disk_of_a_bios_gets_what_uefi_starts(imagery, tmp_path):
    """P6-17 to P6-19: in the room that a larger disk has left, the client makes an EFI system partition and puts its
    own GRUB there, and its root takes the rest. The control is test_clients: as it was UEFI finds nothing on it."""
    target = TARGETS["ahci-e1000e-uefi"]
    after = After(settle=True, identity="new", host_name="twin", grow=True)
    medium = built_with_tools(imagery, target, after, tmp_path / "made", *_EFI_TOOLS)
    with imagery.disk("first", tmp_path / "disk.qcow2") as disk:
        subprocess.run(["qemu-img", "resize", "-q", disk, "+192M"], check=True)
        console = settle(target, disk, medium, tmp_path / "first")
        print(*said(console), sep="\n")
        assert ("settle", "done") in said(console), console[-5000:]
        assert ("loader", "/dev/sda2 is a new EFI system partition") in said(console)
        assert {("loader", "done"), ("initramfs", "done"), ("grow", "done")} <= set(said(console))
        proof = alone(target, disk, tmp_path)
        has_settled(proof, imagery)
        assert proof.document["efi"] is True


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_power_is_cut_in_the_middle_of_each_step(imagery, tmp_path):
    """P6-18, P6-19: whatever was half done, the machine starts by the medium, goes on, and in the end by itself."""
    target = TARGETS["ahci-e1000e-uefi"]
    after = After(settle=True, identity="new", host_name="twin", grow=True)
    medium = built_with_tools(imagery, target, after, tmp_path / "made", *_EFI_TOOLS)
    # Each start of it, and seconds after which the power goes; no step is let through to its end.
    cuts = [(r"initramfs: the disk needs", 15), (r"loader: /dev/sda2 is a new", 0), (r"loader: done", 0.3)]
    with imagery.disk("first", tmp_path / "disk.qcow2") as disk:
        subprocess.run(["qemu-img", "resize", "-q", disk, "+192M"], check=True)
        for number, (where, later) in enumerate(cuts):
            console = settle(target, disk, medium, tmp_path / f"cut{number}", until=f"rewind: {where}", after=later)
            print(number, *said(console), sep="\n")
            assert re.search(where, console) and ("settle", "done") not in said(console), console[-5000:]
        console = settle(target, disk, medium, tmp_path / "last")
        print(*said(console), sep="\n")
        assert ("settle", "done") in said(console), console[-5000:]
        proof = alone(target, disk, tmp_path)
        assert proof.up and proof.document["efi"] and proof.document["hostname"] == "twin", proof
        assert proof.document["failed"] == []


# --- a client of UEFI -----------------------------------------------------------------------------------------------


def of_uefi(target, folder, media, after, *, secured=False):
    """The client's disk below an overlay, and the medium for it."""
    client = uefi.build()
    folder.mkdir()
    built = settleboot.build(client.disk(), target, after, media, folder, secured=secured)
    return client, clients.overlay(client, folder / "disk.qcow2"), Medium(media, built.files[media])


def is_the_uefi_client(proof, client, hostname):
    assert proof.up and proof.kernels == [client.kernel], proof
    document, expected = proof.document, client.expected["first"]
    assert (document["hostname"], document["failed"], document["boots"]) == (hostname, [], 2), document
    assert (document["packages"], document["users"]) == (expected["packages"], expected["users"])
    card = document["interfaces"]["lan0"]
    assert card["carrier"] and document["gateway"], document
    assert any(one.endswith(":22") for one in document["listening"]), document
    return card


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_client_of_uefi_with_secure_boot(tmp_path):
    """P6-17, P6-19, P6-24, P6-26: shim and GRUB are where firmware looks that knows nothing of this disk, and its list
    has an entry; the fixed address that was the old card's is the new card's; who it is has not changed."""
    target = TARGETS["nvme-e1000e-uefi-ports"]
    client, disk, medium = of_uefi(target, tmp_path / "made", "esp", After(settle=True), secured=True)
    console = settle(target, disk, medium, tmp_path / "first", secured=True)
    print(*said(console), sep="\n")
    assert ("settle", "done") in said(console), console[-5000:]
    assert {("cards", "done"), ("initramfs", "done"), ("loader", "done")} <= set(said(console))
    assert any("has the guest's own shimx64.efi as EFI/BOOT/BOOTX64.EFI" in text for _, text in said(console))
    assert any(r"the firmware has a new entry for \EFI\debian\shimx64.efi" in text for _, text in said(console))
    assert ("kept", "the host name uefi is kept") in said(console)
    folder = tmp_path / "alone"
    folder.mkdir()
    # Firmware that has forgotten everything.
    shutil.copy(OVMF / "OVMF_VARS_4M.ms.fd", folder / "OVMF_VARS.fd")
    proof = boot(target, disk, None, folder, seconds=300, change=secure)
    assert "Secure boot enabled" in proof.console
    assert is_the_uefi_client(proof, client, "uefi")["addresses"] == ["10.0.2.15/24"]
    assert proof.document["machine_id"] == client.expected["first"]["machine_id"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_gpt_of_a_client_of_uefi_starts_on_a_bios(tmp_path):
    """P6-17 to P6-19, P6-24: it gets a BIOS boot partition before its first one; by DHCP now, with its own keys."""
    target = TARGETS["ahci-e1000e-bios"]
    after = After(settle=True, identity="new", host_name="twin")
    client, disk, medium = of_uefi(target, tmp_path / "made", "iso", after)
    console = settle(target, disk, medium, tmp_path / "first")
    print(*said(console), sep="\n")
    assert ("settle", "done") in said(console), console[-5000:]
    assert {(one, "done") for one in ("addresses", "ssh-keys", "host-name", "loader")} <= set(said(console))
    assert ("loader", "/dev/sda has a BIOS boot partition now, at sector 34") in said(console)
    proof = alone(target, disk, tmp_path)
    is_the_uefi_client(proof, client, "twin")
    assert proof.document["machine_id"] != client.expected["first"]["machine_id"] and not proof.document["efi"]


# --- by the product's own command line ------------------------------------------------------------------------------

_ORIGIN = """<domain type="qemu"><name>{name}</name><memory unit="MiB">768</memory>
<os><type arch="x86_64" machine="pc">hvm</type></os><devices>
<disk type="file" device="disk"><driver name="qemu" type="qcow2"/><source file="{disk}"/>
<target dev="vda" bus="virtio"/></disk>
<interface type="user"><mac address="52:54:00:c1:1e:07"/><model type="virtio"/></interface></devices></domain>"""
_HARDWARE = """<domain type="qemu"><name>rack</name><memory unit="MiB">768</memory><vcpu>2</vcpu>
<os><type arch="x86_64" machine="q35">hvm</type></os><features><acpi/></features>
<cpu mode="custom"><model>qemu64</model></cpu><devices>
<disk type="file" device="disk"><source file="/nowhere"/><target dev="sda" bus="sata"/></disk>
<interface type="user"><mac address="52:54:00:7a:33:02"/><model type="e1000e"/></interface>
<serial type="file"><source path="{folder}/console.log"/><target port="0"/></serial>
<serial type="file"><source path="{folder}/proof.log"/><target port="1"/></serial>
</devices></domain>"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_domain_settles_and_starts_without_its_medium(imagery, tmp_path):
    """P6-13, P6-18, P6-19, P6-24: `image start --settle` on a smaller disk, `image settle`, and libvirt starts it from
    its own disk: no medium, no repository."""
    where = imagery.images / "new"
    where.mkdir(mode=0o777)
    where.chmod(0o777)
    xml = tmp_path / "rack.xml"
    xml.write_text(_HARDWARE.format(folder=where))
    imagery.rewind("image", "target", "add", "rack", "--xml", xml)
    with larger(imagery) as (name, point):
        words = (name, "--at", point, "--target", "rack", "--name", "twin", "--into", where / "files", "--settle")
        chosen = ("--identity", "new", "--keep", "machine-id", "--background")
        settles_and_starts(imagery, where, words, chosen)


def settles_and_starts(imagery, where, words, chosen):
    try:
        refused = imagery.rewind("image", "start", *words, *chosen, "--size", "vda=1G", code=60)
        assert refused[-1]["hint"] == "`--size vda=2048M` is the least" and not (where / "files").exists()
        (started,) = imagery.rewind("image", "start", *words, *chosen, "--size", "vda=2048M")
        assert _ended(where, 600), (where / "console.log").read_text(errors="replace")[-5000:]
        console = (where / "console.log").read_text(errors="replace")
        print(*said(console), sep="\n")
        assert ("settle", "done") in said(console) and ("kept", "done") in said(console)
        deadline = time.monotonic() + limit(200)
        while (now := imagery.rewind("image", "list")[0])["phase"] != "done":
            assert time.monotonic() < deadline, now
            time.sleep(1)
        (refused,) = imagery.rewind("image", "settle", "twin", code=3)
        assert "runs, so its disk cannot be read" in refused["message"]
        libvirt.virsh("destroy", "twin")
        (settled,) = imagery.rewind("image", "settle", "twin")
        assert settled["type"] == "image-settled" and settled["alone"] is True, settled
        assert "cdrom" not in libvirt.virsh("dumpxml", "twin").stdout
        (disk,) = started["disks"].values()
        (where / "files" / "rewind.iso").unlink(missing_ok=True)
        for name in ("console.log", "proof.log"):
            (where / name).unlink()
        imagery.rewind("image", "forget", "twin")
        libvirt.virsh("start", "twin")
        proof = watch("rack", where, 300)
        assert proof.up and proof.kernels == [imagery.client.kernel], proof
        document, expected = proof.document, imagery.client.expected["first"]
        assert (document["hostname"], document["boots"], document["failed"]) == ("twin", 2, []), document
        assert document["machine_id"] == expected["machine_id"]
        size = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", disk], text=True)
        assert '"virtual-size": 2147483648' in size and "backing-filename" not in size
    finally:
        libvirt.virsh("destroy", "twin", check=False)
        libvirt.virsh("undefine", "twin", check=False)


@contextlib.contextmanager
def larger(imagery):
    """The client as another domain, whose disk has 512 MiB more than its partition, and a point of it."""
    name, disk = "client-larger", imagery.images / "larger.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", imagery.client.disk("first"), disk], check=True)
    subprocess.run(["qemu-img", "resize", "-q", disk, "2560M"], check=True)
    disk.chmod(0o666)
    xml = imagery.images / "larger.xml"
    xml.write_text(_ORIGIN.format(name=name, disk=disk))
    libvirt.virsh("define", xml)
    try:
        imagery.rewind("protect", name)
        (point,) = [one for one in imagery.rewind("point", name) if one["type"] == "point"]
        yield name, point["id"]
    finally:
        libvirt.virsh("undefine", name)


def _ended(where, seconds):
    deadline = time.monotonic() + limit(seconds)
    console = where / "console.log"
    while time.monotonic() < deadline:
        if console.exists() and re.search(r"rewind: settle: (done|not all)", console.read_text(errors="replace")):
            return True
        time.sleep(1)
    return False
