"""Machines that a client has never seen, as words for QEMU: what bootable images are tested on.

    target = TARGETS["nvme-vmxnet3-uefi"]
    target.hardware(folder)              machine, firmware and controllers
    target.disk_args(path)               the restored disk, on this target's controller
    target.nic_args()                    its network card; nothing gets out of it
    target.boot_args(Medium(...))        what the machine boots from, when that is not the disk itself

Always software emulation. Each target has a MAC address of its own, since another machine has one too. There is no
display: the kernel speaks on the first serial port, the proof comes by the second.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.guests.clients import ORIGINS

__all__ = ["Medium", "ORIGIN", "TARGETS", "Target"]

_OVMF = Path("/usr/share/OVMF")
_Firmware = Literal["bios", "uefi"]
_Machine = Literal["pc", "q35"]


@dataclass(frozen=True, slots=True)
class Medium:
    """What the machine boots from. `esp`: a disk image with an EFI system partition, as a second disk on USB;
    `iso`: as a CD; `stick`: the same kind of file as a USB stick; `pxe`: `path` is a file that TFTP serves, with its
    folder. None of them can be written by the guest but the `esp`, on a throw-away layer."""

    kind: Literal["esp", "iso", "stick", "pxe"]
    path: Path


@dataclass(frozen=True, slots=True)
class Target:
    """One machine. `controllers` come before `disk`, which attaches the drive `disk`; `nic` attaches the netdev `net`;
    `modules` are the drivers of Linux that disk and network need here, without what these need and without what is
    above the controller."""

    name: str
    firmware: _Firmware
    machine: _Machine
    disk: str
    nic: str
    mac: str
    controllers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def hardware(self, folder: Path) -> list[str]:
        """Machine, firmware and controllers. `folder` gets the variables of a UEFI."""
        words = ["-machine", self.machine, "-accel", "tcg", "-cpu", "qemu64", "-nodefaults", "-display", "none"]
        if self.firmware == "uefi":
            words += _flash(folder)
        for controller in self.controllers:
            words += ["-device", controller]
        return words

    def disk_args(self, path: Path, form: str = "qcow2") -> list[str]:
        """The restored disk. Its writes are not flushed: these machines end with the test."""
        drive = f"if=none,id=disk,file={path},format={form},cache=unsafe,discard=unmap"
        return ["-drive", drive, "-device", f"{self.disk},drive=disk,bootindex=1"]

    def nic_args(self, medium: Medium | None = None) -> list[str]:
        """The network card, with QEMU's own network behind it (gateway 10.0.2.2). It serves `medium` if that is PXE."""
        pxe = medium is not None and medium.kind == "pxe"
        net, card = "user,id=net,restrict=on", f"{self.nic},netdev=net,mac={self.mac}"
        if medium is not None and pxe:
            net += f",tftp={medium.path.parent},bootfile={medium.path.name}"
            card += ",bootindex=0"
        if not pxe or (self.firmware == "uefi" and "virtio" in self.nic):
            # The firmware would try the network otherwise, and a target may have no option ROM for its card. OVMF has a
            # driver and a network of its own for virtio: with a ROM it would be iPXE's.
            card += ",romfile="
        return ["-netdev", net, "-device", card]

    def boot_args(self, medium: Medium | None) -> list[str]:
        """What the machine boots from; nothing for its own disk. For PXE see `nic_args`."""
        if medium is None:
            return []
        if medium.kind == "pxe":
            # The network of newer UEFIs wants a source of random numbers.
            return ["-device", "virtio-rng-pci"] if self.firmware == "uefi" else []
        if medium.kind == "iso":
            drive = f"if=none,id=medium,file={medium.path},format=raw,readonly=on,media=cdrom"
            bus = "ide.1" if self.machine == "pc" else "ide.2"
            return ["-drive", drive, "-device", f"ide-cd,drive=medium,bus={bus},bootindex=0"]
        drive = f"if=none,id=medium,file={medium.path},format=raw,snapshot=on"
        usb = [] if any("xhci" in controller for controller in self.controllers) else ["-device", "qemu-xhci,id=xhci"]
        return [*usb, "-drive", drive, "-device", "usb-storage,bus=xhci.0,drive=medium,bootindex=0"]


def _flash(folder: Path) -> list[str]:
    variables = folder / "OVMF_VARS.fd"
    if not variables.exists():
        shutil.copy(_OVMF / "OVMF_VARS_4M.fd", variables)
    code = f"if=pflash,unit=0,format=raw,readonly=on,file={_OVMF / 'OVMF_CODE_4M.fd'}"
    return ["-drive", code, "-drive", f"if=pflash,unit=1,format=raw,file={variables}"]


def _port(number: int) -> str:
    return f"pcie-root-port,id=port{number},chassis={number},slot={number},bus=pcie.0"


_XHCI = "qemu-xhci,id=xhci"


def _targets() -> list[Target]:
    """Every controller and card that is asked for, each at least once, over both firmwares and chip sets."""
    # fmt: off
    rows: list[tuple[str, _Firmware, _Machine, str, str, tuple[str, ...], tuple[str, ...]]] = [
        ("ahci-e1000e-bios", "bios", "q35", "ide-hd,bus=ide.0", "e1000e", (), ("ahci", "e1000e")),
        ("ahci-e1000e-uefi", "uefi", "q35", "ide-hd,bus=ide.0", "e1000e", (), ("ahci", "e1000e")),
        ("nvme-vmxnet3-uefi", "uefi", "q35", "nvme,serial=rewind", "vmxnet3", (), ("nvme", "vmxnet3")),
        ("nvme-rtl8139-bios", "bios", "q35", "nvme,serial=rewind", "rtl8139", (), ("nvme", "8139cp", "8139too")),
        ("lsi-e1000-bios", "bios", "pc", "scsi-hd,bus=scsi.0", "e1000", ("lsi53c895a,id=scsi",),
         ("sym53c8xx", "e1000")),
        ("megasas-rtl8139-bios", "bios", "pc", "scsi-hd,bus=scsi.0", "rtl8139", ("megasas,id=scsi",),
         ("megaraid_sas", "8139cp", "8139too")),
        # A real SAS disk has a name, and Linux does not see one without.
        ("mptsas-e1000-bios", "bios", "pc", "scsi-hd,bus=scsi.0,wwn=0x3000000000000001", "e1000",
         ("mptsas1068,id=scsi",), ("mptsas", "e1000")),
        ("pvscsi-vmxnet3-uefi", "uefi", "q35", "scsi-hd,bus=scsi.0", "vmxnet3", ("pvscsi,id=scsi",),
         ("vmw_pvscsi", "vmxnet3")),
        ("scsi-virtio-uefi-ports", "uefi", "q35", "scsi-hd,bus=scsi.0", "virtio-net-pci,bus=port2",
         (_port(1), _port(2), "virtio-scsi-pci,id=scsi,bus=port1"), ("virtio_scsi", "virtio_net")),
        ("virtio-virtio-uefi", "uefi", "q35", "virtio-blk-pci", "virtio-net-pci", (), ("virtio_blk", "virtio_net")),
        ("nvme-e1000e-uefi-ports", "uefi", "q35", "nvme,serial=rewind,bus=port1", "e1000e,bus=port2",
         (_port(1), _port(2)), ("nvme", "e1000e")),
        ("usb-e1000e-uefi", "uefi", "q35", "usb-storage,bus=xhci.0", "e1000e", (_XHCI,),
         ("xhci_pci", "usb_storage", "e1000e")),
        ("usb-virtio-bios", "bios", "q35", "usb-storage,bus=xhci.0", "virtio-net-pci", (_XHCI,),
         ("xhci_pci", "usb_storage", "virtio_net")),
        ("ide-rtl8139-bios", "bios", "pc", "ide-hd,bus=ide.0", "rtl8139", (), ("ata_piix", "8139cp", "8139too")),
        ("ahci-virtio-uefi", "uefi", "q35", "ide-hd,bus=ide.0", "virtio-net-pci", (), ("ahci", "virtio_net")),
        ("megasas-vmxnet3-uefi", "uefi", "pc", "scsi-hd,bus=scsi.0", "vmxnet3", ("megasas-gen2,id=scsi",),
         ("megaraid_sas", "vmxnet3")),
    ]
    # fmt: on
    return [
        Target(name, firmware, machine, disk, nic, f"52:54:00:7a:00:{number:02x}", controllers, modules)
        for number, (name, firmware, machine, disk, nic, controllers, modules) in enumerate(rows, 1)
    ]


TARGETS = {target.name: target for target in _targets()}
# Where each client comes from: what its own disk boots on.
ORIGIN = {
    name: Target(f"origin-{name}", "bios", it.machine, it.disk, it.nic, it.mac, it.controllers)
    for name, it in ORIGINS.items()
}
