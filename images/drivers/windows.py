"""Whether a Windows comes up on a target, and which of its drivers have to start with its kernel for that.

    known     a device by its modalias → the drivers of Windows that have it, and since which Windows they come with it
    judge     a Windows, its firmware and an inventory → WindowsPlan: a row for each device, with its reason

Nothing is brought along: what Windows does not have already is a refusal. Experimental: never promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from appliance.errors import NotForWindows
from images.drivers.wanted import wanted_devices
from images.guest.windows import Service, Windows
from images.hardware.expand import parse_pci
from images.model import Device, Firmware, Inventory, Role

__all__ = ["EXPERIMENTAL", "Answer", "Row", "WindowsPlan", "judge", "known", "refuse"]

EXPERIMENTAL = "Windows is an experiment and never promised: it was tried with a disk that only looks like one"
_SHUT_DOWN = "shut it down with `shutdown /s /t 0`, without Fast Startup, and take the point then"
_WHY_NOT = {
    "hibernated": f"it is hibernated, or was shut down by Fast Startup: {_SHUT_DOWN}",
    "unclean": f"its NTFS was in use when the point was taken: {_SHUT_DOWN}",
    "damaged": "its NTFS is damaged: `chkdsk /f` in the guest repairs it",
}
_RED_HAT, _INTEL, _LSI = 0x1AF4, 0x8086, 0x1000
# Transitional and modern devices, as QEMU's docs/specs/pci-ids tells them.
_VIRTIO = {0x1001: "viostor", 0x1042: "viostor", 0x1004: "vioscsi", 0x1048: "vioscsi"}
_VIRTIO_BUS = {"virtio:d00000002": "viostor", "virtio:d00000008": "vioscsi"}
# As their .inf files have them in every Windows since Vista.
_SAS = frozenset({0x0050, 0x0054, 0x0056, 0x0058})
_MEGARAID = frozenset({0x0060, 0x0078, 0x0079, 0x007C, 0x0411, 0x0413})


class Answer(Enum):
    """`START`: it has to start at boot, and will; `MISSING`: Windows has not got it."""

    START = "start"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Row:
    """`driver` is empty where none is known for the device."""

    driver: str
    answer: Answer
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class WindowsPlan:
    """`reasons` are those to refuse, with the missing drivers; empty when it can be brought up."""

    windows: Windows
    inventory: Inventory
    firmware: Firmware
    rows: tuple[Row, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def drivers(self) -> tuple[str, ...]:
        """Those to start at boot, each once."""
        return tuple(dict.fromkeys(row.driver for row in self.rows if row.answer is Answer.START))


def known(modalias: str, windows: Windows) -> tuple[str, ...]:
    """The drivers that this device needs on this Windows, all of them; empty where we know none."""
    if virtio := next((name for start, name in _VIRTIO_BUS.items() if modalias.startswith(start)), ""):
        return (virtio,)
    pci = parse_pci(modalias)
    if pci is None:
        return ()
    if pci.vendor == _RED_HAT and pci.device in _VIRTIO:
        return (_VIRTIO[pci.device],)
    if pci.vendor == _LSI and pci.device in _SAS | _MEGARAID:
        return ("lsi_sas" if pci.device in _SAS else "megasas",)
    if pci.kind == 0x0106 and pci.prog_if == 0x01:
        return ("storahci" if windows.at_least(6, 2) else "msahci",)
    if pci.kind == 0x0108 and pci.prog_if == 0x02:
        return ("stornvme",)
    if pci.kind == 0x0101:
        return ("intelide" if pci.vendor == _INTEL else "pciide", "atapi")
    return ()


def judge(windows: Windows, firmware: Firmware, inventory: Inventory, refused: Sequence[str] = ()) -> WindowsPlan:
    """`firmware` is what its disks are set up for. `refused`: what was asked for besides and is only for Linux."""
    rows = [row for device in _carriers(inventory) for row in _rows(device, windows)]
    reasons = [*_reasons(windows, firmware, inventory), *(f"{one} is for Linux guests only" for one in refused)]
    if not rows:
        reasons.append("nothing of it that a disk could hang on is known")
    reasons += [row.reason for row in rows if row.answer is Answer.MISSING]
    warnings = [EXPERIMENTAL]
    if inventory.nics:
        warnings.append("its network cards are new to it: it takes drivers that it has, and new addresses by DHCP")
    if firmware is Firmware.UEFI:
        warnings.append("it starts by EFI/BOOT/BOOTX64.EFI of its EFI system partition, which was not looked for")
    return WindowsPlan(windows, inventory, firmware, tuple(rows), tuple(dict.fromkeys(reasons)), tuple(warnings))


def refuse(plan: WindowsPlan) -> None:
    """Raises NotForWindows with all reasons when it has any."""
    if plan.reasons:
        raise NotForWindows(product=plan.windows.name, target=plan.inventory.name, reasons="; ".join(plan.reasons))


def _carriers(inventory: Inventory) -> list[Device]:
    """One for each slot: what the restored disks will hang on, or may."""
    found: dict[str, Device] = {}
    for wanted in wanted_devices(inventory):
        for device in wanted.devices if wanted.role is Role.DISK and wanted.required else ():
            found.setdefault(device.slot or device.modalias, device)
    return list(found.values())


def _rows(device: Device, windows: Windows) -> list[Row]:
    where = " at ".join(word for word in (device.description, device.slot) if word) or device.modalias
    drivers = known(device.modalias, windows)
    if not drivers:
        return [Row("", Answer.MISSING, device.modalias, f"no driver of Windows is known for {where}")]
    return [_row(name, windows.services.get(name), device, where, windows) for name in drivers]


def _row(name: str, service: Service | None, device: Device, where: str, windows: Windows) -> Row:
    if service is None or not service.file:
        what = "no service" if service is None else "no file in System32\\drivers for the service"
        reason = f"it has {what} {name}, which {where} needs"
        return Row(name, Answer.MISSING, device.modalias, reason)
    now = "starts at boot already" if service.start == 0 else "will start at boot"
    return Row(name, Answer.START, device.modalias, f"a disk may hang on {where}; it {now}")


def _reasons(windows: Windows, firmware: Firmware, inventory: Inventory) -> list[str]:
    found = []
    if inventory.firmware is not firmware:
        there, here = firmware.value.upper(), inventory.firmware.value.upper()
        found.append(f"its disk is set up for {there} and the target has {here}: take a target with {there}")
    if windows.state in _WHY_NOT:
        found.append(_WHY_NOT[windows.state])
    elif not windows.whole:
        found.append(f"its registry was being written when the point was taken: {_SHUT_DOWN}")
    if windows.arch.upper() not in ("AMD64", "X86"):
        found.append(f"its processor is {windows.arch or 'not known'}, and the target's x86-64")
    if not windows.at_least(6, 0):
        found.append(f"its version is {windows.version or 'not known'}, and only those since Vista are known")
    return found
