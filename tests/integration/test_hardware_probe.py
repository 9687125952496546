"""Real QEMU and real libvirt: what a target has is found with nothing booted on it (P6-09, P6-14, P6-17, P6-21, P6-25).

No guest is started. libvirt only completes definitions and translates them; QEMU is asked while it stands still.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from images import hardware
from images.hardware import expand
from images.model import Firmware, Inventory
from tests.support import libvirt

MAC = "52:54:00:0a:0b:0c"
QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"


@dataclass(frozen=True)
class Case:
    """A machine: vendor and device of its disk controller and NIC, and how a disk `target` hangs on it."""

    name: str
    machine: str
    controllers: str
    bus: str
    nic: str
    controller_ids: tuple[int, int]
    nic_ids: tuple[int, int]
    target: str = "sda"
    behind_port: bool = False


XHCI = "<controller type='usb' model='qemu-xhci'/>"
SCSI = "<controller type='scsi' model='{}'/>"
CASES = [
    Case("ide", "pc", "", "ide", "e1000", (0x8086, 0x7010), (0x8086, 0x100E), target="hda"),
    Case("ahci", "q35", "", "sata", "e1000e", (0x8086, 0x2922), (0x8086, 0x10D3)),
    Case("ahci-on-pc", "pc", "", "sata", "pcnet", (0x8086, 0x2922), (0x1022, 0x2000)),
    Case("virtio", "pc", "", "virtio", "virtio", (0x1AF4, 0x1001), (0x1AF4, 0x1000), target="vda"),
    Case("virtio-q35", "q35", "", "virtio", "virtio", (0x1AF4, 0x1042), (0x1AF4, 0x1041), "vda", behind_port=True),
    Case("virtio-scsi", "q35", SCSI.format("virtio-scsi"), "scsi", "virtio", (0x1AF4, 0x1048), (0x1AF4, 0x1041)),
    Case("lsilogic", "pc", SCSI.format("lsilogic"), "scsi", "rtl8139", (0x1000, 0x0012), (0x10EC, 0x8139)),
    Case("mptsas", "pc", SCSI.format("lsisas1068"), "scsi", "e1000", (0x1000, 0x0054), (0x8086, 0x100E)),
    Case("megasas", "q35", SCSI.format("lsisas1078"), "scsi", "rtl8139", (0x1000, 0x0060), (0x10EC, 0x8139)),
    Case("pvscsi", "q35", SCSI.format("vmpvscsi"), "scsi", "vmxnet3", (0x15AD, 0x07C0), (0x15AD, 0x07B0)),
    Case("usb", "q35", XHCI, "usb", "e1000e", (0x1B36, 0x000D), (0x8086, 0x10D3)),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def written_by_hand(case: Case, images: Path) -> str:
    """As short as a person may write it: no address, and no controller that libvirt adds by itself."""
    disk = images / "none.img"
    disk.touch()
    return f"""<domain type='qemu'><name>hw-{case.name}</name><memory unit='MiB'>96</memory>
      <os><type arch='x86_64' machine='{case.machine}'>hvm</type></os>
      <devices>
        {case.controllers}
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>
          <target dev='{case.target}' bus='{case.bus}'/></disk>
        <interface type='user'><mac address='{MAC}'/><model type='{case.nic}'/></interface>
        <serial type='null'/>
      </devices></domain>"""


def ids(inventory: Inventory) -> Counter[str]:
    return Counter(device.modalias for device in inventory.devices)


def carrier(inventory: Inventory, target: str) -> expand.Pci:
    (device,) = [one for one in inventory.devices if target in one.carries and one.modalias.startswith("pci:")]
    pci = expand.parse_pci(device.modalias)
    assert pci is not None
    return pci


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_definition_that_libvirt_made_and_libvirts_own_command_line_tell_the_same(
    name, libvirt_uri, libvirt_images, tmp_path
):
    """P6-21, P6-17: three ways to the same machine, none of which starts it: the definition as libvirt completed it,
    the QEMU command line that libvirt makes of it, and what a person wrote."""
    case = BY_NAME[name]
    (tmp_path / "x.xml").write_text(written_by_hand(case, libvirt_images))
    libvirt.virsh("define", str(tmp_path / "x.xml"))
    try:
        complete = libvirt.virsh("dumpxml", "--inactive", f"hw-{case.name}").stdout
        native = libvirt.virsh("domxml-to-native", "qemu-argv", "--domain", f"hw-{case.name}").stdout
    finally:
        libvirt.virsh("undefine", f"hw-{case.name}")
    found = hardware.from_xml(complete, source="libvirt")
    told = hardware.from_qemu(native)
    assert ids(told) == ids(found)
    assert [one.slot for one in told.devices] == [one.slot for one in found.devices]
    assert told.nics == found.nics
    for inventory in (found, hardware.from_xml(written_by_hand(case, libvirt_images))):
        pci = carrier(inventory, case.target)
        assert (pci.vendor, pci.device) == case.controller_ids
        (nic,) = inventory.nics
        card = expand.parse_pci(nic.modalias)
        assert card is not None and (card.vendor, card.device) == case.nic_ids
        assert nic.mac == MAC
        assert inventory.console == "ttyS0" and inventory.memory_bytes == 96 << 20
        assert inventory.firmware is Firmware.BIOS
        if case.behind_port:
            assert not nic.slot.startswith("0000:00:")
