"""What a modalias tells beyond itself: what it is for, and what the kernel will only see once a driver has it.

    upper_aliases   devices that appear later: SCSI disks behind a controller, a virtio function behind its PCI one …
    role_of         what the device is for
    disk_bus_of     which way disks hang on it (`sata`, `nvme`, …)
    pci_alias       the kernel's text for a PCI function;  pci_aliases the same where its prog-if is not known

Formats: the kernel writes `pci:v…` in drivers/pci/pci-sysfs.c, `usb:v…` in drivers/usb/core/sysfs.c, `virtio:d…v…` in
drivers/virtio/virtio.c, `scsi:t-0x00` in drivers/scsi/scsi_sysfs.c, `vmbus:` in drivers/hv/vmbus_drv.c. A modalias that
looks like none of them is left alone. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from images.model import Device, Role

__all__ = ["Pci", "disk_bus_of", "parse_pci", "pci_alias", "pci_aliases", "role_of", "upper_aliases"]

SCSI_DISK, SCSI_CDROM = "scsi:t-0x00", "scsi:t-0x05"
# 32 digits of the class of a VMBus channel, as `vmbus:` writes them (the first three groups are little-endian).
VMBUS_SCSI = "vmbus:d96361baa104294db60572e2ffb1dc7f"
VMBUS_IDE = "vmbus:32264132cb86a2449b5c50d1417354f5"
VMBUS_FC = "vmbus:4acc9b2f6900f34ab76b6fd0be528cda"
VMBUS_NET = "vmbus:635161f83edfc546913ff2d2f965ed0e"

_PCI = re.compile(
    r"pci:v([0-9A-F]{8})d([0-9A-F]{8})sv([0-9A-F]{8})sd([0-9A-F]{8})bc([0-9A-F]{2})sc([0-9A-F]{2})i([0-9A-F]{2})"
)
_VIRTIO = re.compile(r"virtio:d([0-9A-F]{8})v")
_USB_CLASS = re.compile(r"usb:.*ic([0-9A-F]{2})isc([0-9A-F]{2})ip([0-9A-F]{2})")

_RED_HAT = 0x1AF4
_VIRTIO_NET, _VIRTIO_BLOCK, _VIRTIO_CONSOLE, _VIRTIO_SCSI = 1, 2, 3, 8

# Class and subclass of a controller → how disks hang on it. What is not here carries no disk.
_BUSES = {
    0x0100: "scsi", 0x0101: "ide", 0x0104: "scsi", 0x0105: "ide", 0x0106: "sata", 0x0107: "scsi", 0x0108: "nvme",
    0x0180: "scsi", 0x0805: "mmc", 0x0C03: "usb", 0x0C04: "scsi",
}  # fmt: skip
# Below these the kernel speaks SCSI to a disk, libata's included.
_SCSI_BELOW = frozenset({"scsi", "ide", "sata"})
# Where only class and subclass are known. USB hosts of all kinds are about, for the others one is usual.
_PROG_IFS = {0x0101: (0x80,), 0x0106: (0x01,), 0x0108: (0x02,), 0x0805: (0x01,), 0x0C03: (0x30, 0x20, 0x10, 0x00)}
# Intel's Volume Management Device: a RAID controller by its class, and NVMe disks on a PCI bus of its own behind it.
_VMD = frozenset({0x201D, 0x28C0, 0x467F, 0x4C3D, 0x7D0B, 0x9A0B, 0xA77F, 0xAD0B})

# Interfaces of any maker: the zeros before `ic` are only what no driver looks at.
_USB_ANY = "usb:v0000p0000d0000dc00dsc00dp00"
_USB_LATER = (
    (f"{_USB_ANY}ic08isc06ip50in00", "a USB disk or stick"),
    (f"{_USB_ANY}ic08isc06ip62in00", "a USB disk that speaks UAS"),
    (f"{_USB_ANY}ic03isc01ip01in00", "a USB keyboard"),
    (SCSI_DISK, "the disk behind USB storage"),
    (SCSI_CDROM, "the drive behind USB storage"),
)


class Pci(NamedTuple):
    """A PCI function as its alias tells it; `kind` is class and subclass (`0x0106`)."""

    vendor: int
    device: int
    sub_vendor: int
    sub_device: int
    kind: int
    prog_if: int


def pci_alias(pci: Pci) -> str:
    """As the kernel writes it."""
    return (
        f"pci:v{pci.vendor:08X}d{pci.device:08X}sv{pci.sub_vendor:08X}sd{pci.sub_device:08X}"
        f"bc{pci.kind >> 8:02X}sc{pci.kind & 255:02X}i{pci.prog_if:02X}"
    )


def pci_aliases(pci: Pci) -> tuple[str, ...]:
    """Each alias that it may have when its `prog_if` is not known: one, or four for a USB host."""
    return tuple(pci_alias(pci._replace(prog_if=one)) for one in _PROG_IFS.get(pci.kind, (0,)))


def parse_pci(modalias: str) -> Pci | None:
    """None for what is no `pci:` alias of a device."""
    found = _PCI.fullmatch(modalias)
    if found is None:
        return None
    vendor, device, sub_vendor, sub_device, major, minor, prog_if = (int(digits, 16) for digits in found.groups())
    return Pci(vendor, device, sub_vendor, sub_device, major << 8 | minor, prog_if)


def disk_bus_of(modalias: str) -> str:
    """How disks hang on this device: `virtio`, `scsi`, `sata`, `ide`, `nvme`, `usb`, `mmc`; empty when none do. The
    words are those of `Inventory.disk_bus`."""
    if modalias in (VMBUS_SCSI, VMBUS_FC):
        return "scsi"
    if modalias == VMBUS_IDE:
        return "ide"
    if _usb_class(modalias) == 0x08:
        return "usb"
    pci = parse_pci(modalias)
    virtio = _virtio_kind(modalias, pci)
    if virtio:
        return {_VIRTIO_BLOCK: "virtio", _VIRTIO_SCSI: "scsi"}.get(virtio, "")
    return _BUSES.get(pci.kind, "") if pci else ""


def role_of(modalias: str) -> Role:
    """DISK for what disks hang on (a USB host is OTHER: keyboards hang on it more often), NIC, CONSOLE for serial
    lines, UPPER for what appears above a controller, else OTHER."""
    if modalias.startswith("scsi:t-") or modalias == "mmc:block":
        return Role.UPPER
    if modalias == VMBUS_NET:
        return Role.NIC
    pci = parse_pci(modalias)
    virtio = _virtio_kind(modalias, pci)
    if virtio in (_VIRTIO_NET, _VIRTIO_CONSOLE):
        return Role.NIC if virtio == _VIRTIO_NET else Role.CONSOLE
    if pci and pci.kind == 0x0C03:
        return Role.OTHER
    if disk_bus_of(modalias):
        return Role.DISK
    if pci and pci.kind >> 8 == 0x02:
        return Role.NIC
    return Role.CONSOLE if pci and pci.kind == 0x0700 else Role.OTHER


def upper_aliases(devices: Iterable[Device]) -> tuple[tuple[str, str], ...]:
    """(alias, why) of all that the kernel will see only after it has drivers for these devices; each alias once, in the
    order of the devices. For one device alone ask with that one. What is in `devices` already is not told again."""
    devices = tuple(devices)
    known = {one.modalias for one in devices}
    found: dict[str, str] = {}
    for device in devices:
        for alias, why in _above(device.modalias):
            if alias not in known:
                where = device.slot or device.description or device.modalias
                found.setdefault(alias, f"{why} ({where})")
    return tuple(found.items())


def _above(modalias: str) -> tuple[tuple[str, str], ...]:
    pci = parse_pci(modalias)
    later: list[tuple[str, str]] = []
    virtio = _virtio_kind(modalias, pci)
    if virtio and pci:
        later.append((f"virtio:d{virtio:08X}v{_RED_HAT:08X}", "the virtio device behind its PCI function"))
    if pci and pci.vendor == 0x8086 and pci.device in _VMD:
        later.append((pci_alias(Pci(0x8086, 0, 0, 0, 0x0108, 0x02)), "an NVMe disk behind the VMD"))
    bus = disk_bus_of(modalias)
    if bus in _SCSI_BELOW:
        later += [(SCSI_DISK, "a disk behind the controller"), (SCSI_CDROM, "a CD drive behind the controller")]
    if bus == "mmc":
        later.append(("mmc:block", "a card in the slot"))
    if bus == "usb":
        later += _USB_LATER if pci else _USB_LATER[3:]
    return tuple(later)


def _virtio_kind(modalias: str, pci: Pci | None) -> int:
    """The virtio device type, 0 for what is none. A transitional function has it in its subsystem, a modern one in its
    device id (virtio 1.2, 4.1.2)."""
    child = _VIRTIO.match(modalias)
    if child:
        return int(child[1], 16)
    if pci is None or pci.vendor != _RED_HAT or not 0x1000 <= pci.device <= 0x107F:
        return 0
    return pci.device - 0x1040 if pci.device > 0x1040 else pci.sub_device


def _usb_class(modalias: str) -> int:
    found = _USB_CLASS.match(modalias)
    return int(found[1], 16) if found else -1
