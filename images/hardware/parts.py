"""A virtual machine as far as its hardware matters: the nouns between a definition and QEMU, and which devices we know.

    Board   machine type, firmware, parts        made by `command_line` (argv) and `libvirt_xml` (domain XML)
    Part    one PCI device, as `-device` has it  asked for its real ids by `qemu`

Only devices in the tables here are ever given to QEMU, with the properties in `PASSED` and disks of nothing: a
definition from elsewhere can name neither a file, nor a socket, nor a device of this host. Frozen values; any thread
may share them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.errors import BadInventory
from images.model import Firmware

__all__ = [
    "BRIDGES", "DISKS", "HOSTS", "KNOWN", "LESSER", "NICS", "PASSED", "USB_DEVICES", "Board", "Part", "UsbPart",
    "identifier", "is_q35", "machine_type", "unseen",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A PCI device. `carries`: targets of the disks on it. `properties` hold only what is in PASSED."""

    driver: str
    id: str
    properties: Mapping[str, str] = field(default_factory=dict)
    carries: tuple[str, ...] = ()
    mac: str = ""

    @property
    def nic(self) -> bool:
        return self.driver in NICS


@dataclass(frozen=True, slots=True)
class UsbPart:
    """A device on a USB bus; its modalias is known by its driver. `host` is the id of its controller, or empty; `id`
    its own, where a SCSI disk hangs on it."""

    driver: str
    host: str
    id: str = ""
    carries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Board:
    """What a definition says. `built_in` are the targets on the machine type's own disk controller, which has no id."""

    name: str
    machine: str
    firmware: Firmware
    parts: tuple[Part, ...]
    usb: tuple[UsbPart, ...] = ()
    built_in: tuple[str, ...] = ()
    secure_boot: bool = False
    tpm: bool = False
    console: str = ""
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()


def _with_virtio(*names: str) -> frozenset[str]:
    kinds = ("", "-transitional", "-non-transitional")
    return frozenset(f"virtio-{name}-pci{kind}" for name in names for kind in kinds)


BRIDGES = frozenset({
    "pcie-root-port", "ioh3420", "pci-bridge", "i82801b11-bridge", "pcie-pci-bridge", "x3130-upstream",
    "xio3130-downstream", "pxb", "pxb-pcie",
})  # fmt: skip
# PCI functions that are a disk themselves.
DISKS = frozenset({"nvme", *_with_virtio("blk")})
# What disks hang on.
HOSTS = frozenset({
    "lsi53c810", "lsi53c895a", "megasas", "megasas-gen2", "mptsas1068", "pvscsi", "am53c974", "dc390", "ich9-ahci",
    "piix3-ide", "piix4-ide", "sdhci-pci", "piix3-usb-uhci", "piix4-usb-uhci", "ich9-usb-ehci1", "ich9-usb-ehci2",
    "ich9-usb-uhci1", "ich9-usb-uhci2", "ich9-usb-uhci3", "ich9-usb-uhci4", "ich9-usb-uhci5", "ich9-usb-uhci6",
    "usb-ehci", "pci-ohci", "nec-usb-xhci", "qemu-xhci", *_with_virtio("scsi"),
})  # fmt: skip
NICS = frozenset({
    "e1000", "e1000-82544gc", "e1000-82545em", "e1000e", "igb", "i82550", "i82551", "i82557a", "i82557b", "i82557c",
    "i82558a", "i82558b", "i82559a", "i82559b", "i82559c", "i82559er", "i82562", "i82801", "ne2k_pci", "pcnet",
    "rtl8139", "tulip", "vmxnet3", *_with_virtio("net"),
})  # fmt: skip
# What no machine needs for its start: left out, with a note, where this QEMU does not have it.
LESSER = frozenset({
    "VGA", "bochs-display", "cirrus-vga", "qxl-vga", "virtio-vga", "virtio-gpu-pci", "vmware-svga", "pci-serial",
    "i6300esb", "intel-hda", "ich9-intel-hda", "virtio-keyboard-pci", "virtio-mouse-pci", "virtio-tablet-pci",
    *_with_virtio("serial", "rng", "balloon"),
})  # fmt: skip
KNOWN = BRIDGES | DISKS | HOSTS | NICS | LESSER

# USB devices of QEMU by their first interface: hw/usb/dev-storage.c, dev-uas.c, dev-hid.c, dev-hub.c.
_STORAGE = "usb:v46F4p0001d0000dc00dsc00dp00ic08isc06"
_HID = "usb:v0627p0001d0000dc00dsc00dp00ic03"
USB_DEVICES = {
    "usb-storage": f"{_STORAGE}ip50in00", "usb-bot": f"{_STORAGE}ip50in00",
    "usb-uas": "usb:v46F4p0003d0000dc00dsc00dp00ic08isc06ip62in00",
    "usb-kbd": f"{_HID}isc01ip01in00", "usb-mouse": f"{_HID}isc01ip02in00", "usb-tablet": f"{_HID}isc00ip00in00",
}  # fmt: skip

# Properties that say where a device sits or what it shows itself as. Nothing here opens anything.
PASSED = frozenset({
    "bus", "addr", "multifunction", "chassis", "chassis_nr", "port", "slot", "bus_nr", "disable-legacy",
    "disable-modern", "use-intel-id", "subsys", "subsys_ven",
})  # fmt: skip

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
_FIXED_MACHINE = re.compile(r"pc|q35|pc-(i440fx|q35)-[A-Za-z0-9._-]{1,40}")


# Linux sees no disk without a name behind it (`mptsas_is_end_device` of drivers/message/fusion), and QEMU gives none.
_SAS = "mptsas1068"


def unseen(driver: str, disk: str, wwn: str) -> str:
    """What to tell of a disk that this controller carries; empty for most."""
    if driver != _SAS or not disk or wwn:
        return ""
    return f"disk {disk!r} has no WWN: Linux does not see it behind an LSI SAS 1068; `image start` gives it one"


def is_q35(machine: str) -> bool:
    return "q35" in machine


def identifier(text: str, target: str, where: str) -> str:
    """The text, when it can be the id of a device. Raises BadInventory."""
    if not _ID.fullmatch(text):
        raise BadInventory(target=target, field=where, reason=f"{text!r} is no id of a device")
    return text


def machine_type(text: str, target: str, where: str) -> str:
    """The text, when it is a PC of one of the two kinds. Raises BadInventory."""
    if not _FIXED_MACHINE.fullmatch(text):
        raise BadInventory(
            target=target, field=where, reason=f"machine type {text!r} is not of the families pc (i440fx) and q35",
            hint="for other machines save the output of `machine.sh`, or take a profile",
        )  # fmt: skip
    return text
