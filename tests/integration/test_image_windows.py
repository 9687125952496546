"""A Windows on other hardware, by the program as it is typed, with a disk that only looks like one.

It is not booted."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from appliance.errors import GuestUnreadable
from images.guest import open_guest
from images.guest.appliance import build_appliance, kept
from images.guest.confine import user
from images.guest.reader import ConfinedTree
from images.guest.sources import serve_disks
from images.guest.windows import IsWindows
from tests.guests import packages
from tests.support import libvirt, windowsdisk
from tests.support.guestdisk import partitioned
from tests.support.imagery import ROOT
from tests.support.targets import TARGETS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1500)]

_DOMAIN = """<domain type="qemu"><name>{name}</name><memory unit="MiB">256</memory>
<os><type arch="x86_64" machine="{machine}">hvm</type></os><devices>
<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="{disk}"/>
<target dev="{dev}" bus="{bus}"/></disk></devices></domain>"""
_DRIVERS = {"storahci": 3, "atapi": 0, "intelide": 3}


@pytest.fixture
def rewind(libvirt_uri, tmp_path, appliance):
    home = Path(tempfile.mkdtemp(prefix="windows-"))

    def call(*words, code=0):
        command = [sys.executable, "-m", "appliance.cli", "--home", home, "--connect", libvirt.URI, "--json", *words]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        return [json.loads(line) for line in done.stdout.splitlines()]

    call("init", "--repository", home / "repo")
    (home / "cache/reader").symlink_to(appliance.parent)
    yield call
    shutil.rmtree(home)


@pytest.fixture
def appliance():
    from tests.integration.test_guest_reader import made_appliance

    digest = packages.sources_digest([Path(build_appliance.__code__.co_filename)], packages.kernel_package("amd64"))
    return kept(packages.cached(f"guestfs-{digest}", made_appliance) / "made").folder


def define(folder, name, machine, disk, dev, bus):
    path = folder / f"{name}.xml"
    path.write_text(_DOMAIN.format(name=name, machine=machine, disk=disk, dev=dev, bus=bus))
    return path


def starts(disk, folder, appliance):
    """Of each driver on a disk."""
    with pytest.raises(IsWindows) as it, open_guest({"hda": disk}, folder, appliances=appliance.parent):
        pass
    return {name: one.start for name, one in it.value.windows.services.items()}


def test_it_starts_by_drivers_that_it_has_and_its_point_stays(rewind, libvirt_images, tmp_path, appliance):
    tmp_path.chmod(0o755)
    disk, folder = libvirt_images / "win.raw", libvirt_images / "new"
    windowsdisk.windows(disk, _DRIVERS)
    disk.chmod(0o666)
    before = hashlib.sha256(disk.read_bytes()).digest()
    libvirt.virsh("define", define(tmp_path, "win", "pc", disk, "hda", "ide"))
    rewind("protect", "win")
    rewind("point", "win", "--label", "off")
    rewind("image", "target", "add", "ahci", "--xml", define(tmp_path, "rack", "q35", "/dev/null", "sda", "sata"))
    try:
        (plan,) = rewind("image", "plan", "win", "--at", "off", "--target", "ahci")
        assert plan["type"] == "image-windows-plan" and plan["buildable"] and plan["experimental"]
        assert (plan["product"], plan["firmware"], plan["host"]) == ("Windows 10 Pro", "bios", "DESK")
        assert [one["driver"] for one in plan["drivers"]] == ["storahci"]
        words = ("image", "start", "win", "--at", "off", "--target", "ahci", "--name", "win2", "--into", folder)
        error = rewind(*words, "--settle", code=69)[-1]
        assert "--settle is for Linux guests only" in error["message"] and not folder.exists()
        (started, *_) = rewind(*words, "--background")
        assert any("never promised" in one for one in started["warnings"])
        _check_domain(ET.fromstring(libvirt.virsh("dumpxml", "win2").stdout), folder)
        libvirt.virsh("destroy", "win2")
        new = starts(f"qcow2:{folder / 'win2-sda.qcow2'}", tmp_path, appliance)
        assert new == {**_DRIVERS, "storahci": 0}
        (again,) = rewind("image", "plan", "win", "--at", "off", "--target", "ahci")
        assert again == plan and "will start at boot" in again["drivers"][0]["reason"]
        assert hashlib.sha256(disk.read_bytes()).digest() == before
    finally:
        for name in ("win2", "win"):
            subprocess.run(["virsh", "-c", libvirt.URI, "destroy", name], capture_output=True)
            subprocess.run(["virsh", "-c", libvirt.URI, "undefine", name], capture_output=True)


def _check_domain(xml, folder):
    (one,) = xml.findall("devices/disk")
    assert one.get("device") == "disk" and one.find("target").get("bus") == "sata"
    assert one.find("boot").get("order") == "1" and one.find("source").get("file") == str(folder / "win2-sda.qcow2")


def test_what_cannot_start_is_refused_with_every_reason(rewind, libvirt_images, tmp_path):
    """Hibernated, another firmware, and NVMe without its driver; nothing is written, and Linux's verbs say what it
    is."""
    disk, folder, target = libvirt_images / "win.raw", libvirt_images / "new", TARGETS["nvme-vmxnet3-uefi"]
    windowsdisk.windows(disk, _DRIVERS, hibernated=True)
    disk.chmod(0o666)
    libvirt.virsh("define", define(tmp_path, "win", "pc", disk, "hda", "ide"))
    words = ["qemu-system-x86_64", *target.hardware(tmp_path), *target.disk_args(Path("/dev/null")), "-m", "256"]
    (tmp_path / "cmd").write_text(shlex.join(map(str, words)))
    try:
        rewind("protect", "win")
        rewind("point", "win", "--label", "asleep")
        rewind("image", "target", "add", "nvme", "--qemu", tmp_path / "cmd")
        plan, error = rewind("image", "plan", "win", "--at", "asleep", "--target", "nvme", code=69)
        assert not plan["buildable"] and len(plan["reasons"]) == 3
        for reason in ("set up for BIOS and the target has UEFI", "hibernated", "no service stornvme"):
            assert reason in error["message"]
        more = ("--at", "asleep", "--target", "nvme", "--into", folder)
        error = rewind("image", "build", "win", *more, code=65)[-1]
        assert "it is Windows 10 Pro, on hda2, and this is for Linux guests" in error["message"]
        assert not folder.exists()
    finally:
        libvirt.virsh("undefine", "win")


def test_damaged_hives_are_refused_or_read_and_the_parent_goes_on(tmp_path, appliance):
    """Eight in one caged reader: should one take it down, the others are refused by its end."""
    tmp_path.chmod(0o755)
    dice, disks = random.Random(3), {}
    for disk in ("vda", "vdb"):
        parts = [("7", _damaged(tmp_path / f"{disk}{number}", dice)) for number in range(4)]
        disks[disk] = f"raw:{partitioned(tmp_path / disk, parts)}"
    with serve_disks(disks, tmp_path, user()) as sockets, ConfinedTree.general(sockets, appliance) as tree:
        found = [_looked_at(tree, volume.name) for volume in tree.volumes() if volume.fs == "ntfs"]
    assert len(found) == 8 and all(found), found


def _damaged(folder, dice):
    folder.mkdir()
    hive = windowsdisk.system(folder / "SYSTEM", _DRIVERS)
    raw = bytearray(hive.read_bytes())
    for _ in range(dice.randrange(1, 30)):
        raw[dice.randrange(4096, len(raw))] = dice.randrange(256)
    hive.write_bytes(raw)
    files = {"Windows/System32/config/SYSTEM": hive}
    return windowsdisk.ntfs(folder / "ntfs", files, 8 << 20)


def _looked_at(tree, name):
    try:
        found = tree.windows(name)
        return f"read: {found.control_set}"
    except GuestUnreadable as error:
        return str(error)
