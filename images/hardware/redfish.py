"""A Redfish document as an Inventory: what the management controller knows of a machine that is off.

Nothing is asked over a network. The document is what was saved of the service: one resource, a list of them, a
collection with its members expanded (`?$expand=.`), or a mapping of paths to resources as mock-ups have. Every object
in it is looked at, and known by its `@odata.type`, or by its fields where there is none:

    PCIeFunction            VendorId, DeviceId, SubsystemVendorId, SubsystemId, ClassCode   → a device
    NetworkDeviceFunction   Ethernet.MACAddress, Links.PCIeFunction                          → the MAC of one device
    EthernetInterface       MACAddress, PermanentMACAddress                                  → a MAC of some device
    ComputerSystem          Boot.BootSourceOverrideMode, MemorySummary, TrustedModules, Model
    SecureBoot              SecureBootCurrentBoot, SecureBootEnable

Format: DMTF DSP0266 and the schema index DSP8010. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from appliance.errors import BadInventory
from images.hardware.expand import Pci, pci_alias, pci_aliases, role_of
from images.hardware.schema import check, fit_name, no_larger
from images.model import Firmware, Inventory, Role

__all__ = ["from_redfish"]

_MOST_DOCUMENT = 16 << 20
# `DeviceClass` where a controller does not tell the class code.
_CLASSES = {
    "UnclassifiedDevice": 0x0000, "MassStorageController": 0x0180, "NetworkController": 0x0200,
    "DisplayController": 0x0300, "MultimediaController": 0x0400, "MemoryController": 0x0500, "Bridge": 0x0604,
    "CommunicationController": 0x0700, "SerialBusController": 0x0C80, "WirelessController": 0x0D80,
}  # fmt: skip
_HEX = re.compile(r"(?:0[xX])?([0-9A-Fa-f]{1,8})[hH]?")
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_GIB = 1 << 30


def from_redfish(text: str, *, target: str = "", firmware: Firmware | None = None) -> Inventory:
    """The inventory of a machine. `firmware` when the document does not say, or something else is wanted.

    Raises BadInventory: not JSON, larger than 16 MiB, no PCIe function in it, a number that is none (`field` is its
    place in the document), or a firmware that nobody tells.
    """
    spoken = target or "(redfish)"
    no_larger(text, spoken, _MOST_DOCUMENT)
    try:
        objects = list(_objects(json.loads(text)))
    except (ValueError, RecursionError) as error:
        raise BadInventory(target=spoken, field="document", reason=f"it is not JSON: {error}") from None
    return _Document(spoken, objects).inventory(target, firmware)


def _objects(document: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place in the document, object) of every object, in order."""
    waiting: list[tuple[str, object]] = [("", document)]
    while waiting:
        place, one = waiting.pop()
        if isinstance(one, Mapping):
            yield place or "document", one
            waiting += [(f"{place}.{key}" if place else str(key), value) for key, value in reversed(list(one.items()))]
        elif isinstance(one, list):
            waiting += [(f"{place}[{number}]", value) for number, value in reversed(list(enumerate(one)))]


class _Document:
    """All objects of one document, sorted by kind."""

    def __init__(self, target: str, objects: list[tuple[str, Mapping[str, Any]]]) -> None:
        self.target = target
        self.functions = [(place, one) for place, one in objects if _is(one, "PCIeFunction", "VendorId", "DeviceId")]
        self.adapters = [one for _, one in objects if _is(one, "NetworkDeviceFunction", "Ethernet", "NetDevFuncType")]
        self.interfaces = [one for _, one in objects if _is(one, "EthernetInterface", "MACAddress", "InterfaceEnabled")]
        self.systems = [one for _, one in objects if _is(one, "ComputerSystem", "SystemType", "PowerState")]
        self.secure = [one for _, one in objects if _is(one, "SecureBoot", "SecureBootCurrentBoot")]

    def inventory(self, target: str, firmware: Firmware | None) -> Inventory:
        found = [(one, slot, alias) for (place, one), slot in self._unique() for alias in self._aliases(place, one)]
        if not found:
            raise BadInventory(
                target=self.target, field="document", reason="it has no PCIe function with VendorId and DeviceId",
                hint="save Systems/ID/PCIeFunctions or Chassis/ID/PCIeDevices/ID/PCIeFunctions, members expanded",
            )  # fmt: skip
        nics, notes = self._nics(found)
        return check({
            "name": target or self._name(), "source": "redfish", "firmware": (firmware or self._firmware()).value,
            "secure_boot": self._secure_boot(), "tpm": self._tpm(), "memory_bytes": self._memory(),
            "devices": [{"modalias": alias, "slot": slot, "description": _words(one)} for one, slot, alias in found],
            "nics": nics, "notes": notes,
        })  # fmt: skip

    def _unique(self) -> Iterator[tuple[tuple[str, Mapping[str, Any]], str]]:
        """Each function once, with what it is called: a document may hold it by several ways."""
        seen: set[str] = set()
        for place, one in self.functions:
            name = str(one.get("@odata.id", "")) or place
            if name not in seen:
                seen.add(name)
                yield (place, one), name

    def _aliases(self, place: str, one: Mapping[str, Any]) -> tuple[str, ...]:
        code = one.get("ClassCode")
        numbers = [
            self._number(place, one, name) or 0 for name in ("VendorId", "DeviceId", "SubsystemVendorId", "SubsystemId")
        ]
        pci = Pci(numbers[0], numbers[1], numbers[2], numbers[3], 0, 0)
        if code:
            value = self._number(place, one, "ClassCode") or 0
            digits = len(_HEX.fullmatch(str(code))[1])  # type: ignore[index] # _number has matched it
            if digits > 4:
                return (pci_alias(pci._replace(kind=value >> 8 & 0xFFFF, prog_if=value & 0xFF)),)
            return pci_aliases(pci._replace(kind=value))
        return pci_aliases(pci._replace(kind=_CLASSES.get(str(one.get("DeviceClass", "")), 0)))

    def _number(self, place: str, one: Mapping[str, Any], name: str) -> int | None:
        value = one.get(name)
        if value is None or value == "":
            return None
        found = _HEX.fullmatch(str(value).strip())
        if found is None or (name != "ClassCode" and int(found[1], 16) > 0xFFFF):
            reason = f"{str(value)[:40]!r} is no hexadecimal number of 16 bits"
            raise BadInventory(target=self.target, field=f"{place}.{name}", reason=reason)
        return int(found[1], 16)

    def _nics(self, found: list[tuple[Mapping[str, Any], str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
        """MAC addresses whose card the document tells; the others by their order, which only names can be wrong by."""
        cards = {slot: alias for _, slot, alias in found if role_of(alias) is Role.NIC}
        macs: dict[str, str] = {}
        for one in self.adapters:
            slot = str(_at(one, "Links", "PCIeFunction", "@odata.id") or "")
            mac = _mac(_at(one, "Ethernet", "PermanentMACAddress") or _at(one, "Ethernet", "MACAddress"))
            if slot in cards and mac and slot not in macs:
                macs[slot] = mac
        others = dict.fromkeys(
            mac for one in self.interfaces if (mac := _mac(one.get("PermanentMACAddress") or one.get("MACAddress")))
        )
        spare = [mac for mac in others if mac not in macs.values()]
        free = [slot for slot in cards if slot not in macs]
        macs |= dict(zip(free, spare, strict=False))
        notes = []
        if free and spare and len(set(cards.values())) > 1:
            notes.append("which MAC address belongs to which card is not told: they were paired in their order")
        nics = [{"modalias": alias, "mac": macs.get(slot, ""), "slot": slot} for slot, alias in cards.items()]
        return nics, notes

    def _firmware(self) -> Firmware:
        for one in self.systems:
            mode = str(_at(one, "Boot", "BootSourceOverrideMode") or "")
            if mode in ("UEFI", "Legacy"):
                return Firmware.UEFI if mode == "UEFI" else Firmware.BIOS
        if self.secure:  # only UEFI has it
            return Firmware.UEFI
        raise BadInventory(
            target=self.target, field="Boot.BootSourceOverrideMode", reason="the document does not tell UEFI from BIOS",
            hint="say which firmware it is",
        )  # fmt: skip

    def _secure_boot(self) -> bool:
        return any(
            one.get("SecureBootCurrentBoot") == "Enabled"
            or ("SecureBootCurrentBoot" not in one and one.get("SecureBootEnable") is True)
            for one in self.secure
        )

    def _tpm(self) -> bool:
        lists = [one.get("TrustedModules") for one in self.systems]
        modules = [one for several in lists if isinstance(several, list) for one in several]
        return any(isinstance(one, Mapping) and _at(one, "Status", "State") in ("Enabled", None) for one in modules)

    def _memory(self) -> int:
        for one in self.systems:
            size = _at(one, "MemorySummary", "TotalSystemMemoryGiB")
            if isinstance(size, int | float) and 0 < size < 1 << 30:
                return int(size * _GIB)
        return 0

    def _name(self) -> str:
        for one in self.systems:
            for key in ("HostName", "Model", "Id"):
                if name := fit_name(str(one.get(key) or ""), ""):
                    return name
        return "machine"


def _is(one: Mapping[str, Any], kind: str, *fields: str) -> bool:
    """By its type (`#PCIeFunction.v1_5_0.PCIeFunction`), or by its fields when it has none."""
    told = one.get("@odata.type")
    if isinstance(told, str):
        return told.startswith(f"#{kind}.") and (kind != "PCIeFunction" or all(name in one for name in fields))
    return all(name in one for name in fields)


def _at(one: Any, *path: str) -> Any:
    for name in path:
        if not isinstance(one, Mapping):
            return None
        one = one.get(name)
    return one


def _mac(value: Any) -> str:
    text = str(value or "").lower().replace("-", ":")
    return text if _MAC.fullmatch(text) and text != "00:00:00:00:00:00" else ""


def _words(one: Mapping[str, Any]) -> str:
    return str(one.get("Description") or one.get("Name") or "")[:200]
