"""The devices of a target in groups, each with what is asked of its drivers.

A group is one piece of hardware: where the prog-if of a device is not known, the inventory has several aliases for one
slot, and a driver for one of them is enough. Where the inventory does not say which controller carries the disks, all
that could carry them are one group: one driver must be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from images.hardware.expand import SCSI_CDROM, disk_bus_of, parse_pci, role_of
from images.model import Device, Inventory, Role

__all__ = ["Wanted", "wanted_devices"]

_USB_HOST = 0x0C03
_KEYBOARD, _UAS = "ic03isc01", "ic08isc06ip62"


@dataclass(frozen=True, slots=True)
class Wanted:
    """`required`: a driver for one of the devices, and what is above it, must be there. `now`: it goes into the image.
    `told`: a warning, ending in `harmless`, when it has none and is not required."""

    devices: tuple[Device, ...]
    role: Role
    upper_role: Role
    reason: str
    required: bool = False
    now: bool = False
    told: bool = False
    harmless: str = ""

    def must_have(self, alias: str) -> bool:
        """Of what may be above a device: not the CD drive, the keyboard, or the faster way to a USB disk."""
        return self.required and alias != SCSI_CDROM and _KEYBOARD not in alias and _UAS not in alias

    def now_above(self, alias: str) -> bool:
        """Whether what is above goes into the image: all of it for a disk, only keyboards for a console."""
        return self.now and (self.role is not Role.CONSOLE or _KEYBOARD in alias)

    def without(self, found: Iterable[Device]) -> tuple[Device, ...]:
        """One device for each piece of hardware of which none is in `found`."""
        keys = {_key(device) for device in found}
        lacking = {_key(device): device for device in reversed(self.devices) if _key(device) not in keys}
        return tuple(reversed(lacking.values()))


def wanted_devices(
    inventory: Inventory, *, network: bool = False, keyboard: bool = False
) -> tuple[Wanted, ...]:
    """All of them, the most important first. `network`: wanted cards must work in the image already; `keyboard`: so
    must keyboards, for a passphrase."""
    slots = {device.slot for device in inventory.devices if device.slot}
    cards = {nic.slot if nic.slot in slots else nic.modalias for nic in inventory.nics if nic.wanted}
    groups = list(_by_slot(inventory.devices))
    disks = list(_disks(inventory, groups))
    done = {device for wanted in disks for device in wanted.devices}
    nics, others = [*_nics_alone(inventory, network)], []
    for group in groups:
        if done.issuperset(group):
            continue
        if _key(group[0]) in cards or any(one.modalias in cards for one in group):
            nics.append(_nic(group, network))
        else:
            others.append(_other(group, keyboard))
    return (*disks, *nics, *others)


def _by_slot(devices: Iterable[Device]) -> Iterator[tuple[Device, ...]]:
    groups: dict[str, list[Device]] = {}
    for device in devices:
        groups.setdefault(_key(device), []).append(device)
    return (tuple(group) for group in groups.values())


def _key(device: Device) -> str:
    return device.slot or device.modalias


def _disks(inventory: Inventory, groups: list[tuple[Device, ...]]) -> Iterator[Wanted]:
    carriers = [group for group in groups if any(device.carries for device in group)]
    for group in carriers:
        names = dict.fromkeys(name for device in group for name in device.carries)
        reason = f"{' and '.join(names)} will hang on"
        yield Wanted(group, Role.DISK, Role.UPPER, reason, required=True, now=True)
    if carriers:
        return
    bus = inventory.disk_bus
    on_bus = [one for one in inventory.devices if bus and disk_bus_of(one.modalias) == bus]
    candidates = on_bus or [one for one in inventory.devices if role_of(one.modalias) is Role.DISK]
    if candidates:
        yield Wanted(tuple(candidates), Role.DISK, Role.UPPER, "the restored disk may hang on", required=True, now=True)


def _nics_alone(inventory: Inventory, network: bool) -> Iterator[Wanted]:
    """Cards that are not among the devices."""
    known = {word for device in inventory.devices for word in (device.slot, device.modalias) if word}
    for nic in inventory.nics:
        if nic.wanted and not known & {nic.slot, nic.modalias}:
            yield _nic((Device(modalias=nic.modalias, slot=nic.slot, description=nic.mac),), network)


def _nic(group: tuple[Device, ...], network: bool) -> Wanted:
    return Wanted(group, Role.NIC, Role.NIC, "the network card", required=True, now=network)


def _other(group: tuple[Device, ...], keyboard: bool) -> Wanted:
    role = role_of(group[0].modalias)
    harmless = {Role.DISK: "no restored disk hangs on it", Role.NIC: "it was not asked for"}.get(role, "")
    pci = parse_pci(group[0].modalias)
    if pci and pci.kind == _USB_HOST:
        harmless = "keyboards and sticks there will not work"
        if keyboard:
            return Wanted(group, Role.CONSOLE, Role.CONSOLE, "a keyboard", now=True, told=True, harmless=harmless)
    return Wanted(group, Role.OTHER, Role.OTHER, "a driver for", told=bool(harmless), harmless=harmless)
