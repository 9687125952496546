"""A Board and what QEMU found of it, as one Inventory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from appliance.errors import BadInventory
from images.hardware import qemu
from images.hardware.expand import disk_bus_of
from images.hardware.parts import USB_DEVICES, Board, Part, is_q35
from images.hardware.qemu import Function
from images.hardware.schema import check
from images.model import Inventory

__all__ = ["inventory_of"]


def inventory_of(
    board: Board, source: Literal["qemu", "xml", "libvirt"], *, emulator: str = "qemu-system-x86_64"
) -> Inventory:
    """The inventory of a virtual machine. Raises what `qemu.probe` raises, and BadInventory."""
    functions, notes = qemu.probe(board, emulator=emulator)
    parts = {part.id: part for part in board.parts}
    carries = _carries(board, functions)
    document = {
        "name": board.name, "source": source, "firmware": board.firmware.value, "secure_boot": board.secure_boot,
        "tpm": board.tpm, "console": board.console, "memory_bytes": board.memory_bytes,
        "devices": [_device(one, parts.get(one.id), carries) for one in functions] + _usb(board),
        "nics": [_nic(one, parts[one.id]) for one in functions if one.id in parts and parts[one.id].nic],
        "notes": [*board.notes, *notes],
    }  # fmt: skip
    return check(document)


def _carries(board: Board, functions: Sequence[Function]) -> dict[str, tuple[str, ...]]:
    """Slot → targets of the disks on it. Of a USB disk the USB host is told too: both must work."""
    found: dict[str, tuple[str, ...]] = {}
    parts = {part.id: part for part in board.parts}
    own = "sata" if is_q35(board.machine) else "ide"
    hosts = [one for one in functions if disk_bus_of(one.modalias) == "usb"]
    if board.usb and not hosts:
        raise BadInventory(target=board.name, field="devices", reason=f"{board.usb[0].driver} has no USB to hang on")
    for one in functions:
        disks = parts[one.id].carries if one.id in parts else ()
        if not one.id and disk_bus_of(one.modalias) == own:
            disks = board.built_in
        for usb in board.usb:
            if one in hosts and one.id == (usb.host if any(h.id == usb.host for h in hosts) else hosts[0].id):
                disks = (*disks, *usb.carries)
        found[one.slot] = disks
    return found


def _device(one: Function, part: Part | None, carries: dict[str, tuple[str, ...]]) -> dict[str, object]:
    what = f"{part.driver} {part.id}" if part else "part of the machine"
    return {"modalias": one.modalias, "slot": one.slot, "description": what, "carries": carries[one.slot]}


def _usb(board: Board) -> list[dict[str, object]]:
    return [
        {"modalias": USB_DEVICES[one.driver], "description": one.driver, "carries": one.carries} for one in board.usb
    ]


def _nic(one: Function, part: Part) -> dict[str, object]:
    return {"modalias": one.modalias, "mac": part.mac, "slot": one.slot}
