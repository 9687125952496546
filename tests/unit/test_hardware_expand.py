"""What lies behind a device, and the profiles, against the aliases of a real kernel (P6-09, P6-17, P6-25)."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from appliance.errors import BadInventory
from images import hardware
from images.hardware import expand
from images.hardware.expand import Pci, pci_alias
from images.model import Device, Firmware, Role

TABLE = Path(__file__).parents[1] / "data/hardware/aliases-6.1"


def modules_of(alias: str) -> set[str]:
    """As depmod's table of Debian 12's kernel has it."""
    lines = [line.split() for line in TABLE.read_text().splitlines() if line.startswith("alias ")]
    return {module for _, pattern, module in lines if fnmatch.fnmatchcase(alias, pattern)}


def pci(vendor: int, device: int, kind: int, prog_if: int = 0, sub: tuple[int, int] = (0, 0)) -> str:
    return pci_alias(Pci(vendor, device, *sub, kind, prog_if))


def above(*aliases: str) -> set[str]:
    return {alias for alias, _ in expand.upper_aliases([Device(modalias=one) for one in aliases])}


SCSI = {"scsi:t-0x00", "scsi:t-0x05"}
MODERN_BLOCK, OLD_BLOCK = pci(0x1AF4, 0x1042, 0x0100, 0, (0x1AF4, 0x1100)), pci(0x1AF4, 0x1001, 0x0100, 0, (0x1AF4, 2))


@pytest.mark.parametrize(
    ("alias", "later", "role", "bus"),
    [
        (pci(0x8086, 0x2922, 0x0106, 1), SCSI, Role.DISK, "sata"),
        (pci(0x8086, 0x7010, 0x0101, 0x80), SCSI, Role.DISK, "ide"),
        (pci(0x1000, 0x0012, 0x0100), SCSI, Role.DISK, "scsi"),
        (pci(0x1000, 0x0060, 0x0104), SCSI, Role.DISK, "scsi"),
        (pci(0x1B36, 0x0010, 0x0108, 2), set(), Role.DISK, "nvme"),
        (pci(0x8086, 0x9A0B, 0x0104), SCSI | {pci(0x8086, 0, 0x0108, 2)}, Role.DISK, "scsi"),
        (pci(0x1B36, 0x0007, 0x0805, 1), {"mmc:block"}, Role.DISK, "mmc"),
        (MODERN_BLOCK, {"virtio:d00000002v00001AF4"}, Role.DISK, "virtio"),
        (OLD_BLOCK, {"virtio:d00000002v00001AF4"}, Role.DISK, "virtio"),
        (pci(0x1AF4, 0x1048, 0x0100), {"virtio:d00000008v00001AF4"} | SCSI, Role.DISK, "scsi"),
        (pci(0x1AF4, 0x1041, 0x0200), {"virtio:d00000001v00001AF4"}, Role.NIC, ""),
        (pci(0x1AF4, 0x1003, 0x0780, 0, (0x1AF4, 3)), {"virtio:d00000003v00001AF4"}, Role.CONSOLE, ""),
        ("virtio:d00000008v00001AF4", SCSI, Role.DISK, "scsi"),
        ("virtio:d00000001v00001AF4", set(), Role.NIC, ""),
        (pci(0x8086, 0x10D3, 0x0200), set(), Role.NIC, ""),
        (pci(0x8086, 0x2922, 0x0700, 2), set(), Role.CONSOLE, ""),
        ("usb:v46F4p0001d0000dc00dsc00dp00ic08isc06ip50in00", SCSI, Role.DISK, "usb"),
        (expand.VMBUS_SCSI, SCSI, Role.DISK, "scsi"),
        (expand.VMBUS_IDE, SCSI, Role.DISK, "ide"),
        (expand.VMBUS_NET, set(), Role.NIC, ""),
        ("scsi:t-0x00", set(), Role.UPPER, ""),
        (pci(0x8086, 0x29C0, 0x0600), set(), Role.OTHER, ""),
        ("acpi:PNP0501:", set(), Role.OTHER, ""),
        ("pci:nonsense", set(), Role.OTHER, ""),
    ],
)
def test_what_is_above_a_device_and_what_it_is_for(alias, later, role, bus):
    """P6-17: a controller's driver alone gives no disk; what comes above it is known beforehand."""
    assert above(alias) == later
    assert expand.role_of(alias) is role
    assert expand.disk_bus_of(alias) == bus


def test_a_usb_host_may_have_disks_of_both_protocols_and_a_keyboard():
    host = pci(0x1B36, 0x000D, 0x0C03, 0x30)
    found = set().union(*(modules_of(alias) for alias in above(host)))
    assert found == {"usb_storage", "uas", "usbhid", "sd_mod", "sr_mod"}
    assert expand.role_of(host) is Role.OTHER and expand.disk_bus_of(host) == "usb"


def test_what_is_there_already_is_not_told_again_and_reasons_name_the_device():
    devices = [Device(modalias=OLD_BLOCK, slot="0000:00:04.0"), Device(modalias="virtio:d00000002v00001AF4")]
    assert expand.upper_aliases(devices) == ()
    ((_, why),) = expand.upper_aliases(devices[:1])
    assert "0000:00:04.0" in why


@pytest.mark.parametrize("kind", [0x0106, 0x0108, 0x0C03, 0x0200])
def test_a_class_without_its_last_byte_is_every_alias_that_it_may_be(kind):
    known = {0x0106: {1}, 0x0108: {2}, 0x0C03: {0x00, 0x10, 0x20, 0x30}, 0x0200: {0}}
    found = [expand.parse_pci(alias) for alias in expand.pci_aliases(Pci(1, 2, 3, 4, kind, 0))]
    assert {one.prog_if for one in found} == known[kind]
    assert all(one[:5] == (1, 2, 3, 4, kind) for one in found)


def test_an_alias_is_written_as_the_kernel_writes_it():
    text = "pci:v00008086d000010D3sv000015ADsd000007D0bc02sc00i00"
    assert pci_alias(expand.parse_pci(text)) == text
    assert expand.parse_pci(text.lower()) is None


DRIVERS = {
    "generic-uefi": (
        {"ahci", "nvme", "megaraid_sas", "mpt3sas", "hpsa", "smartpqi", "aacraid", "vmd"}, {"e1000e", "igb", "tg3"}
    ),
    "generic-bios": ({"ahci", "nvme", "ata_piix", "megaraid_sas", "mptsas"}, {"e1000e", "bnx2"}),
    "vmware-pvscsi": ({"vmw_pvscsi"}, {"vmxnet3"}),
    "vmware-pvscsi-bios": ({"vmw_pvscsi"}, {"vmxnet3"}),
    "vmware-lsi": ({"mptspi", "mptsas"}, {"e1000", "e1000e"}),
    "vmware-nvme": ({"nvme"}, {"vmxnet3"}),
    "hyperv-gen1": ({"hv_storvsc", "ata_piix"}, {"hv_netvsc"}),
    "hyperv-gen2": ({"hv_storvsc"}, {"hv_netvsc"}),
    "aws-nitro": ({"nvme"}, {"ena"}),
    "aws-nitro-bios": ({"nvme"}, {"ena"}),
    "gce": ({"virtio_pci"}, {"virtio_pci", "gve"}),
    "gce-nvme": ({"nvme"}, {"gve"}),
    "qemu-virtio": ({"virtio_pci"}, {"virtio_pci"}),
    "qemu-virtio-bios": ({"virtio_pci"}, {"virtio_pci"}),
}  # fmt: skip


def test_every_profile_is_tested():
    assert set(hardware.profile_names()) == set(DRIVERS)


@pytest.mark.parametrize("name", DRIVERS)
def test_a_profile_leads_to_its_drivers(name):
    """P6-09, P6-25: the drivers that Debian's kernel has for the profile's disks and cards are the ones for it, and
    each controller and card that is listed has one."""
    found = hardware.profile(name)
    bus = found.disk_bus
    controllers = [
        one.modalias for one in found.devices
        if expand.role_of(one.modalias) is Role.DISK and bus in ("", expand.disk_bus_of(one.modalias))
    ]  # fmt: skip
    disks, nics = DRIVERS[name]
    assert all(modules_of(alias) for alias in controllers) and controllers
    assert disks <= set().union(*map(modules_of, controllers))
    assert all(modules_of(one.modalias) for one in found.nics)
    assert nics <= set().union(*(modules_of(one.modalias) for one in found.nics))
    assert {one.modalias for one in found.nics} <= {one.modalias for one in found.devices}
    assert found.firmware is (Firmware.BIOS if name.endswith(("bios", "gen1", "lsi")) else Firmware.UEFI)
    assert hardware.load(hardware.dump(found)) == found
    assert hardware.about(name).endswith(".")


def test_a_profile_can_be_renamed_and_a_wrong_name_is_told():
    assert hardware.profile("gce", target="db-2").name == "db-2"
    with pytest.raises(BadInventory) as caught:
        hardware.profile("aws-nitros")
    assert "did you mean aws-nitro?" in caught.value.hint
    with pytest.raises(BadInventory):
        hardware.profile("../profiles/gce")
