"""The definition of a domain that has a target's hardware and a point's disks, and starts from a boot medium.

    target's XML ─► name, UUID new; its disks out, ours in; MACs as told; the medium first in the boot order

Everything that two domains on one host cannot share goes: UUID, NVRAM file, and of an existing domain's definition the
paths of sockets and log files.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import NotSupported

__all__ = [
    "NewDisk", "for_hardware", "has_drive", "has_medium", "macs", "wanted_disks", "without_medium", "without_stops",
]  # fmt: skip

_OF_A_RUN = ("uuid", "seclabel", "resource", "os/nvram")
_LINES = ("serial", "console", "parallel", "channel")
_BUSES = {"virtio": "vd", "scsi": "sd", "sata": "sd", "usb": "sd", "ide": "hd"}
# Its driver in Linux takes a disk without a world wide name for no disk (`mptsas_is_end_device`); QEMU gives none.
_SAS = "lsisas1068"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Places (bus, unit) of one controller in the order in which the medium takes them: a PC has its CD on IDE's second bus.
_PLACES = {"ide": ((1, 0), (1, 1), (0, 1), (0, 0)), "sata": tuple((0, unit) for unit in range(6))}


@dataclass(frozen=True, slots=True)
class NewDisk:
    """`path` is a qcow2 image. With a `socket` it is an overlay of the NBD export `export` there; without, it is
    whole."""

    path: Path
    export: str
    socket: Path | None = None


def wanted_disks(xml: str, count: int, name: str) -> list[str]:
    """Target names for that many disks: those of the definition's own, then more on the last one's bus. Raises
    NotSupported when it has none or is no definition."""
    root = _parse(xml, name)
    found = [_target(one) for one in _hard_disks(root)]
    if not found:
        raise NotSupported(object=f"target for {name!r}", reason="its definition has no hard disk to take the place of")
    used = {_target(one) for one in root.iterfind("devices/disk")}
    free = [f"{found[-1][:-1]}{letter}" for letter in _LETTERS if f"{found[-1][:-1]}{letter}" not in used]
    if len(found) + len(free) < count:
        raise NotSupported(object=f"target for {name!r}", reason=f"it has no place for {count} disks")
    return (found + free)[:count]


def macs(xml: str, name: str) -> list[str]:
    """Of its network cards in order, empty where it has none. Raises NotSupported."""
    cards = _parse(xml, name).findall("devices/interface")
    return [_get(card, "mac", "address").lower() for card in cards]


def for_hardware(
    xml: str, name: str, disks: Mapping[str, NewDisk], medium: Path | None, addresses: Sequence[str], *,
    of_a_domain: bool = True, reconnect: int = 10,
) -> str:  # fmt: skip
    """The definition. `disks` by target name (see `wanted_disks`), `addresses` the MACs of its cards in order. A read
    of an overlay's view waits for `reconnect` seconds when nobody answers, before QEMU stops the guest (libvirt 9.0
    knows no such time: at once); the guest's own drivers give a request up after 30 s. `of_a_domain`: another domain
    has this definition, so what two cannot share is left to libvirt. Without a medium it starts from its first disk.

    Raises NotSupported when `xml` is no definition of a domain, or has no place for the medium.
    """
    root = _parse(xml, name)
    root.attrib.pop("id", None)
    for path in _OF_A_RUN:
        parent, _, tag = path.rpartition("/")
        for holder in [root.find(parent)] if parent else [root]:
            for element in list(holder.findall(tag)) if holder is not None else []:
                assert holder is not None
                holder.remove(element)
    _set(root, "name", name)
    _replace_disks(root, disks, reconnect)
    for card, address in zip(root.findall("devices/interface"), addresses, strict=False):
        _child(card, "mac").set("address", address)
        _drop(card, "target", "alias")
    if of_a_domain:
        _drop_host_paths(root)
    _boot_from(root, medium)
    return ET.tostring(root, encoding="unicode")


def without_stops(xml: str, name: str, targets: Collection[str]) -> str:
    """The definition with which the guest is told when a read or write of these disks fails, as it is of any other.
    Raises NotSupported when it is no definition."""
    root = _parse(xml, name)
    for disk in root.findall("devices/disk"):
        driver = disk.find("driver")
        if driver is not None and _target(disk) in targets:
            driver.attrib.pop("error_policy", None)
    return ET.tostring(root, encoding="unicode")


def has_drive(xml: str, name: str, medium: Path) -> bool:
    """Whether the definition has the CD drive of `for_hardware`, with its medium or without. Raises NotSupported when
    it is no definition."""
    return bool(_drives(_parse(xml, name), medium))


def has_medium(xml: str, name: str, medium: Path) -> bool:
    """Whether that drive has its medium. Raises NotSupported when it is no definition."""
    return any(_source(one) for one in _drives(_parse(xml, name), medium))


def without_medium(xml: str, name: str, medium: Path, start: str) -> str:
    """The definition without that drive; it starts from its disk `start` then, the first of all. It is the same when
    that is so. Raises NotSupported when it is no definition, and when it has no such disk."""
    root = _parse(xml, name)
    devices = root.find("devices")
    assert devices is not None, "_parse has seen it"
    first = next((one for one in _hard_disks(root) if _target(one) == start), None)
    if first is None:
        raise NotSupported(object=f"domain {name!r}", reason=f"its definition has no disk {start!r} to start from")
    drives = _drives(root, medium)
    ordered = [one for one in devices if one.find("boot") is not None]
    if not drives and (first in ordered or not ordered):
        return xml
    for drive in drives:
        devices.remove(drive)
    rest = sorted((one for one in ordered if one not in (first, *drives)), key=_order)
    for number, one in enumerate((first, *rest), 1):
        _child(one, "boot").set("order", str(number))
    return ET.tostring(root, encoding="unicode")


def _drives(root: ET.Element, medium: Path) -> list[ET.Element]:
    """Of an ejected medium nothing is left in the definition but that its drive is the first to start from."""
    found = [one for one in root.findall("devices/disk") if one.get("device") == "cdrom"]
    return [one for one in found if _source(one) == str(medium) or (not _source(one) and _order(one) == 1)]


def _source(disk: ET.Element) -> str:
    return _get(disk, "source", "file")


def _order(device: ET.Element) -> int:
    order = _get(device, "boot", "order")
    return int(order) if order.isdecimal() else 0


def _parse(xml: str, name: str) -> ET.Element:
    try:
        root = ET.fromstring(xml)
    except ET.ParseError:
        root = ET.Element("none")
    if root.tag != "domain" or root.find("devices") is None:
        hint = "add the target by --domain or --xml"
        raise NotSupported(object=f"new domain {name!r}", reason="its target has no libvirt definition", hint=hint)
    return root


def _hard_disks(root: ET.Element) -> list[ET.Element]:
    return [one for one in root.findall("devices/disk") if one.get("device", "disk") in ("disk", "lun")]


def _target(disk: ET.Element) -> str:
    return _get(disk, "target", "dev")


def _replace_disks(root: ET.Element, disks: Mapping[str, NewDisk], reconnect: int) -> None:
    """Each on the bus and address of the disk whose name it has; the others go."""
    devices = root.find("devices")
    assert devices is not None
    old = {_target(one): one for one in _hard_disks(root)}
    last = next(reversed(old.values()))
    for one in old.values():
        devices.remove(one)
    for target, new in disks.items():
        like = old.get(target)
        element = ET.SubElement(devices, "disk", type="file", device="disk")
        driver = ET.SubElement(element, "driver", name="qemu", type="qcow2", discard="unmap")
        ET.SubElement(element, "source", file=str(new.path))
        if new.socket is not None:
            _backing(element, new, reconnect)
            driver.set("error_policy", "stop")  # and not told to the guest; see standstill.py
        ET.SubElement(element, "target", dev=target, bus=_get(last if like is None else like, "target", "bus"))
        address = like.find("address") if like is not None else None
        if address is not None:
            element.append(address)
        if _controller_model(root, element) == _SAS:
            ET.SubElement(element, "wwn").text = _wwn(new.path)


def _controller_model(root: ET.Element, disk: ET.Element) -> str:
    """Of the SCSI controller that it hangs on; empty for other buses."""
    if _get(disk, "target", "bus") != "scsi":
        return ""
    index = _get(disk, "address", "controller") or "0"
    found = root.findall("devices/controller[@type='scsi']")
    return next((one.get("model", "") for one in found if one.get("index", "0") == index), "")


def _wwn(path: Path) -> str:
    """A name for a new disk: the kind that nobody assigns (NAA 3, SPC-4 7.8.6.5)."""
    return "3" + hashlib.sha256(bytes(path)).hexdigest()[:15]


def _backing(disk: ET.Element, new: NewDisk, reconnect: int) -> None:
    backing = ET.SubElement(disk, "backingStore", type="network")
    ET.SubElement(backing, "format", type="raw")
    source = ET.SubElement(backing, "source", protocol="nbd", name=new.export)
    ET.SubElement(source, "host", transport="unix", socket=str(new.socket))
    ET.SubElement(source, "reconnect", delay=str(reconnect))
    ET.SubElement(backing, "backingStore")


def _drop_host_paths(root: ET.Element) -> None:
    """libvirt makes its own where none are named."""
    for element in root.findall("devices/*"):
        _drop(element, "log")
        if element.tag in _LINES and element.get("type") in ("unix", "file", "pipe", "dev"):
            element.set("type", "pty" if element.tag != "channel" else "unix")
            _drop(element, "source")


def _boot_from(root: ET.Element, medium: Path | None) -> None:
    """A CD with the medium before everything else, then the first disk."""
    system = root.find("os")
    devices = root.find("devices")
    assert devices is not None
    if system is not None:
        _drop(system, "boot", "kernel", "initrd", "cmdline", "bootmenu")
    for element in root.findall("devices/*"):
        _drop(element, "boot")
    if medium is not None:
        _add_drive(root, devices, medium)
    if disks := _hard_disks(root):
        ET.SubElement(disks[0], "boot", order="1" if medium is None else "2")


def _add_drive(root: ET.Element, devices: ET.Element, medium: Path) -> None:
    system = root.find("os")
    q35 = system is not None and "q35" in _get(system, "type", "machine")
    bus = "sata" if q35 else "ide"
    controller, channel, unit, name = _free_place(root, bus)
    element = ET.SubElement(devices, "disk", type="file", device="cdrom")
    ET.SubElement(element, "driver", name="qemu", type="raw")
    ET.SubElement(element, "source", file=str(medium))
    ET.SubElement(element, "target", dev=name, bus=bus)
    ET.SubElement(element, "readonly")
    place = {"controller": controller, "bus": channel, "target": 0, "unit": unit}
    ET.SubElement(element, "address", {"type": "drive", **{key: str(value) for key, value in place.items()}})
    ET.SubElement(element, "boot", order="1")


def _free_place(root: ET.Element, bus: str) -> tuple[int, int, int, str]:
    """(controller, bus, unit, target name) for the medium, on the machine's own controller as long as that has a place:
    libvirt adds each controller that an address or a late letter asks for, and the target has none such. A second one
    is only asked of SATA, of which a machine may have several."""
    by_name = {"hd": "ide"}  # the bus of a disk that names none
    disks = [
        one for one in root.findall("devices/disk")
        if (_get(one, "target", "bus") or by_name.get(_target(one)[:2])) == bus
    ]  # fmt: skip
    used = {_place_of(one, bus) for one in disks}
    names = {_target(one) for one in root.findall("devices/disk")}
    for controller in range(1 if bus == "ide" else len(disks) + 1):
        for channel, unit in _PLACES[bus]:
            first = controller * len(_PLACES[bus]) + channel * 2 + unit
            free = (f"{_BUSES[bus]}{one}" for one in _LETTERS[first : first + 1] + _LETTERS)
            name = next((one for one in free if one not in names), "")
            if name and (controller, channel, unit) not in used:
                return controller, channel, unit, name
    raise NotSupported(object="the target", reason=f"its {bus} bus has no place left for the boot medium")


def _place_of(disk: ET.Element, bus: str) -> tuple[int, int, int]:
    """Where it is said to be, else where libvirt puts it by its letter (virDomainDiskDefAssignAddress)."""
    address = disk.find("address[@type='drive']")
    if address is not None:
        found = (address.get(key, "0") for key in ("controller", "bus", "unit"))
        controller, channel, unit = (int(one) if one.isdecimal() else 0 for one in found)
        return controller, channel, unit
    controller, rest = divmod(max(_LETTERS.find(_target(disk)[2:]), 0), len(_PLACES[bus]))
    return (controller, *divmod(rest, 2)) if bus == "ide" else (controller, 0, rest)


def _get(element: ET.Element, path: str, name: str) -> str:
    found = element.find(path)
    return found.get(name, "") if found is not None else ""


def _child(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    return ET.SubElement(element, tag) if found is None else found


def _set(root: ET.Element, tag: str, text: str) -> None:
    _child(root, tag).text = text


def _drop(element: ET.Element, *tags: str) -> None:
    for tag in tags:
        for child in element.findall(tag):
            element.remove(child)
