"""The clients and the targets that bootable images are tested with: that they are what the tests take them for.

A client must come up on the hardware it is from, and must not on other hardware: else an image would prove nothing.
"""

from __future__ import annotations

import copy
import subprocess
from typing import Any

import pytest

from tests.guests import clients
from tests.support.imageproof import Proof, arguments, boot, compare, expected
from tests.support.targets import ORIGIN, TARGETS, Medium

# Building a client takes minutes, once.
BUILD = pytest.mark.timeout(900)


@pytest.fixture
def client(request):
    return clients.build(getattr(request, "param", "mbr"))


def origin(client, instant, folder, **options):
    disk = clients.overlay(client, folder / "disk.qcow2", instant)
    return boot(ORIGIN[client.name], disk, None, folder, **options)


# --- where they are from --------------------------------------------------------------------------------------------


@pytest.mark.soak
@BUILD
@pytest.mark.parametrize("instant", ["first", "second"])
@pytest.mark.parametrize("client", ["mbr", "dracut"], indirect=True)
def test_client_comes_up_on_its_own_hardware(client, instant, tmp_path):
    """The proof of P6-13 is one that the point itself fulfils: one kernel, everything equal, and it says so."""
    proof = origin(client, instant, tmp_path)
    assert compare(proof, expected(client, instant, efi=False)) == [], proof


@BUILD
def test_instants_differ_in_what_a_restore_has_to_bring_back(client):
    first, second = expected(client, "first"), expected(client, "second")
    assert {name for name in first if first[name] != second[name]} == {
        "packages", "users", "services", "etc", "command_line",
    }  # fmt: skip
    assert "client.setting=42" in first["command_line"] and "client.setting=43" in second["command_line"]


# --- controls: the plain disk on other hardware (P6-27) -------------------------------------------------------------


@pytest.mark.soak
@BUILD
@pytest.mark.parametrize(
    ("client", "name"), [("mbr", "ahci-e1000e-bios"), ("dracut", "nvme-rtl8139-bios")], indirect=["client"]
)
def test_plain_disk_does_not_find_its_root_on_another_controller(client, name, tmp_path):
    """P6-27: the client's kernel starts and waits for a root that it has no driver for.

    dracut's client would find it on AHCI: its q35 has one on board, so the driver is in its initramfs.
    """
    disk = clients.overlay(client, tmp_path / "disk.qcow2")
    gives_up = r"Gave up waiting for root|Entering emergency mode|dracut-initqueue.*timeout"
    proof = boot(TARGETS[name], disk, None, tmp_path, seconds=300, until=gives_up)
    assert (proof.ended, proof.kernels, proof.up) == ("seen", [client.kernel], False), proof


@pytest.mark.soak
@BUILD
def test_plain_disk_does_not_start_by_another_firmware(client, tmp_path):
    """P6-27: a UEFI finds nothing to start on a disk that GRUB is on for a BIOS; no kernel comes that far."""
    disk = clients.overlay(client, tmp_path / "disk.qcow2")
    gives_up = r"UEFI Interactive Shell|No bootable option|failed to load"
    proof = boot(TARGETS["virtio-virtio-uefi"], disk, None, tmp_path, seconds=120, until=gives_up)
    assert (proof.ended, proof.kernels, proof.up) == ("seen", [], False), proof


# --- targets --------------------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_matrix():
    """Every controller, card, firmware and chip set that is promised; each target has a name and MAC of its own."""
    words = [" ".join((target.disk, target.nic, *target.controllers)) for target in TARGETS.values()]
    wanted = ["ide-hd", "nvme", "lsi53c895a", "megasas", "mptsas", "pvscsi", "virtio-scsi", "virtio-blk", "usb-storage",
              "e1000e", "e1000", "rtl8139", "vmxnet3", "virtio-net", "pcie-root-port"]  # fmt: skip
    assert [word for word in wanted if not any(word in line for line in words)] == []
    assert len(TARGETS) >= 12 and len({target.mac for target in TARGETS.values()}) == len(TARGETS)
    assert {(target.firmware, target.machine) for target in TARGETS.values()} >= {
        ("bios", "pc"), ("bios", "q35"), ("uefi", "q35"),
    }  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [None, "esp", "iso", "stick", "pxe"])
def test_qemu_makes_every_target_with_every_medium(kind, tmp_path):
    disk, image = tmp_path / "disk.qcow2", tmp_path / "medium"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    image.write_bytes(bytes(1 << 20))
    medium = Medium(kind, image) if kind else None
    for target in [*TARGETS.values(), *ORIGIN.values()]:
        command = [*arguments(target, disk, medium, tmp_path), "-S", "-monitor", "stdio"]
        done = subprocess.run(command, input="info network\ninfo block\nquit\n", capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), target
        assert target.mac in done.stdout and "disk.qcow2" in done.stdout, (target, done.stdout)


# --- the proof has teeth --------------------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "kernel": "6.1.0-1-amd64", "command_line": "BOOT_IMAGE=/vmlinuz root=UUID=1 ro client.setting=42",
    "running_hostname": "mbr", "gateway": True, "failed": [], "boots": 1, "efi": False, "root": "/dev/vda1",
    "interfaces": {"ens3": {"mac": "52:54:00:c1:1e:07", "carrier": True, "addresses": ["10.0.2.15/24"]}},
    "listening": ["0.0.0.0:7070"], "hostname": "mbr", "machine_id": "1", "packages": "p", "users": "u",
    "services": "s", "etc": "e", "fstab": "f", "menu": "BOOT_IMAGE=/vmlinuz root=UUID=1 ro client.setting=42",
}  # fmt: skip
CONSOLE = "GNU GRUB\n[    0.000000] Linux version 6.1.0-1-amd64 (debian-kernel@lists.debian.org)\nmbr login:"


@pytest.fixture
def made_up(tmp_path):
    return clients.ClientFiles("mbr", tmp_path, "6.1.0-1-amd64", {"first": copy.deepcopy(DOCUMENT)})


def test_equal_proof_has_no_differences(made_up):
    document = {**DOCUMENT, "command_line": "initrd=\\initrd root=UUID=1 ro client.setting=42 rewind.session=7"}
    assert compare(Proof("t", document, CONSOLE, 1.0, "proof"), expected(made_up, efi=False)) == []


CARD = DOCUMENT["interfaces"]["ens3"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"packages": "x"}, "packages"), ({"users": "x"}, "users"), ({"services": "x"}, "services"),
        ({"etc": "x"}, "etc"), ({"fstab": "x"}, "fstab"), ({"hostname": "x"}, "hostname"),
        ({"machine_id": "x"}, "machine_id"), ({"kernel": "6.1.0-2-amd64"}, "kernel"), ({"efi": True}, "efi"),
        ({"boots": 2}, "boots"), ({"running_hostname": "localhost"}, "running_hostname"),
        ({"command_line": "root=UUID=1 ro client.setting=43"}, "command line"),
        ({"command_line": "root=UUID=1 ro client.setting=42 nomodeset"}, "command line"),
        ({"command_line": "root=UUID=1 client.setting=42"}, "command line"),
        ({"interfaces": {"eth0": CARD}}, "no network card ens3"), ({"gateway": False}, "gateway"),
        ({"interfaces": {"ens3": {**CARD, "carrier": False}}}, "not up"),
        ({"interfaces": {"ens3": {**CARD, "addresses": []}}}, "not up"),
        ({"failed": ["networking.service"]}, "networking.service"), ({"listening": ["0.0.0.0:70"]}, "7070"),
    ],
)  # fmt: skip
def test_each_difference_is_told(made_up, changed, named):
    proof = Proof("t", {**DOCUMENT, **changed}, CONSOLE, 1.0, "proof")
    (difference,) = compare(proof, expected(made_up, efi=False))
    assert named in difference


def test_second_kernel_and_silence_are_told(made_up):
    wanted = expected(made_up)
    twice = Proof("t", DOCUMENT, CONSOLE + CONSOLE.replace("6.1.0-1", "6.1.0-9"), 1.0, "proof")
    assert "6.1.0-9-amd64" in compare(twice, wanted)[0]
    assert compare(Proof("t", None, "", 1.0, "no proof in time"), wanted) == ["no proof: no proof in time"]
