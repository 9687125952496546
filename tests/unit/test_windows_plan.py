"""Which of a Windows' own drivers a target needs, and when it is refused."""

from __future__ import annotations

import pytest

from appliance.errors import NotForWindows
from images.drivers.windows import EXPERIMENTAL, judge, known, refuse
from images.guest.windows import Service, Windows
from images.model import Device, Firmware, Inventory

AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"
NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
PIIX = "pci:v00008086d00007010sv00001AF4sd00001100bc01sc01i80"
CMD646 = "pci:v00001095d00000646sv00001AF4sd00001100bc01sc01i8F"
SAS1068 = "pci:v00001000d00000054sv00001AF4sd00001100bc01sc00i00"
MEGASAS = "pci:v00001000d00000060sv00001000sd00001013bc01sc04i00"
VIRTIO_BLK = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00"
VIRTIO_SCSI = "virtio:d00000008v00001AF4"
PVSCSI = "pci:v000015ADd000007C0sv000015ADsd000007C0bc01sc00i00"


def windows(version="10.0", services=("storahci", "atapi", "intelide"), **more):
    facts = {
        "volume": "vda1", "product": "Windows 10 Pro", "version": version, "arch": "AMD64", "state": "clean",
        "control_set": "ControlSet001", "whole": True,
    }  # fmt: skip
    if not isinstance(services, dict):
        services = {name: Service(start=3, file=True) for name in services}
    return Windows(**{**facts, "services": services, **more})


def target(modalias=AHCI, firmware=Firmware.BIOS):
    device = Device(modalias=modalias, slot="0000:00:05.0", description="controller", carries=("sda",))
    return Inventory(name="rack", source="xml", firmware=firmware, devices=(device,))


@pytest.mark.parametrize(("modalias", "version", "drivers"), [
    (AHCI, "6.1", ("msahci",)), (AHCI, "6.2", ("storahci",)), (AHCI, "10.0", ("storahci",)),
    (NVME, "10.0", ("stornvme",)), (PIIX, "10.0", ("intelide", "atapi")), (CMD646, "6.3", ("pciide", "atapi")),
    (SAS1068, "10.0", ("lsi_sas",)), (MEGASAS, "10.0", ("megasas",)), (VIRTIO_BLK, "10.0", ("viostor",)),
    (VIRTIO_SCSI, "10.0", ("vioscsi",)), (PVSCSI, "10.0", ()), ("usb:v1234", "10.0", ()),
])  # fmt: skip
def test_each_controller_has_its_driver(modalias, version, drivers):
    assert known(modalias, windows(version)) == drivers


def test_what_it_has_starts_at_boot():
    plan = judge(windows(), Firmware.BIOS, target())
    assert plan.drivers == ("storahci",) and plan.reasons == () and plan.warnings[0] == EXPERIMENTAL
    refuse(plan)


@pytest.mark.parametrize(("guest", "where", "reason"), [
    ({}, {"modalias": NVME}, "no service stornvme"),
    ({}, {"modalias": PVSCSI}, "no driver of Windows is known for controller"),
    ({}, {"firmware": Firmware.UEFI}, "set up for BIOS and the target has UEFI"),
    ({"services": {"storahci": Service(start=3)}}, {}, "no file in System32"),
    ({"state": "hibernated"}, {}, "shutdown /s /t 0"),
    ({"state": "unclean"}, {}, "shutdown /s /t 0"),
    ({"state": "damaged"}, {}, "chkdsk"),
    ({"whole": False}, {}, "registry was being written"),
    ({"arch": "ARM64"}, {}, "processor is ARM64"),
    ({"version": ""}, {}, "version is not known"),
    ({"version": "5.1"}, {}, "version is 5.1"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_reason(guest, where, reason):
    with pytest.raises(NotForWindows, match=reason):
        refuse(judge(windows(**guest), Firmware.BIOS, target(**where)))


def test_what_is_for_linux_only_is_refused():
    with pytest.raises(NotForWindows, match="--settle is for Linux guests only"):
        refuse(judge(windows(), Firmware.BIOS, target(), ["--settle"]))
