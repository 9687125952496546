"""A libvirt domain's XML as a Board: what hardware QEMU will be told to make of it.

    <controller>, <interface>, <disk> …   → Parts, at the PCI address that libvirt gave them
    <disk bus= … controller= …>           → which of them carries which target
    <qemu:commandline>                    → more Parts

A definition that libvirt has seen is complete: each controller and address stands there. One that was written by hand
is completed here as libvirt would do it. libvirt itself is not asked: its own translation (`domxml-to-native`) needs a
daemon on a host that has the firmware, CPU and networks of the target. A test shows that both find the same.

The XML is hostile: only what the tables of `parts` know reaches QEMU. Format: https://libvirt.org/formatdomain.html,
elements `devices` and below; `libvirt_os` reads the rest. Any thread may call `board_of`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from appliance.errors import BadInventory
from images.hardware import command_line, libvirt_os
from images.hardware.parts import NICS, Board, Part, UsbPart, is_q35, unseen
from images.hardware.placing import bridges_first, placed
from images.model import Firmware

__all__ = ["board_of"]

_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# libvirt's word → QEMU's device.
_PCI = {
    "pcie-root-port": "pcie-root-port", "pci-bridge": "pci-bridge", "dmi-to-pci-bridge": "i82801b11-bridge",
    "pcie-to-pci-bridge": "pcie-pci-bridge", "pcie-switch-upstream-port": "x3130-upstream",
    "pcie-switch-downstream-port": "xio3130-downstream",
}  # fmt: skip
_SCSI = {
    "": "lsi53c895a", "auto": "lsi53c895a", "lsilogic": "lsi53c895a", "lsisas1068": "mptsas1068",
    "lsisas1078": "megasas", "vmpvscsi": "pvscsi", "am53c974": "am53c974", "dc390": "dc390",
    "virtio-scsi": "virtio-scsi-pci", "virtio-transitional": "virtio-scsi-pci-transitional",
    "virtio-non-transitional": "virtio-scsi-pci-non-transitional",
}  # fmt: skip
_USB = {
    "": "piix3-usb-uhci", "piix3-uhci": "piix3-usb-uhci", "piix4-uhci": "piix4-usb-uhci", "ehci": "usb-ehci",
    "ich9-ehci1": "ich9-usb-ehci1", "ich9-uhci1": "ich9-usb-uhci1", "ich9-uhci2": "ich9-usb-uhci2",
    "ich9-uhci3": "ich9-usb-uhci3", "pci-ohci": "pci-ohci", "nec-xhci": "nec-usb-xhci", "qemu-xhci": "qemu-xhci",
}  # fmt: skip
_VIDEO = {
    "vga": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "bochs": "bochs-display",
    "vmvga": "vmware-svga",
}  # fmt: skip


def board_of(xml: str, *, target: str = "") -> Board:
    """The machine of a domain's XML. `target` is its name, by default the domain's.

    Raises BadInventory: not a definition of an x86_64 guest of QEMU, or a device that this program does not know;
    `field` is its place (`devices/controller[2]`).
    """
    root = libvirt_os.parse(xml, target or "(xml)")
    return _Reader(root, target or libvirt_os.name_of(root)).board()


class _Reader:
    """One pass over one definition. `parts` grow in the order in which QEMU can make them."""

    def __init__(self, root: ET.Element, name: str) -> None:
        self.root, self.name = root, name
        self.machine = libvirt_os.machine_of(root, name)
        self.q35 = is_q35(self.machine)
        self.parts: list[Part] = []
        self.loose: list[Part] = []  # without an address
        self.usb: list[UsbPart] = []
        self.built_in: list[str] = []
        self.notes: list[str] = []

    def board(self) -> Board:
        for read in (self._controllers, self._implied, self._disks, self._nics, self._others):
            read()
        self.parts += placed(self.loose, self.q35)
        self.loose = []
        self._own_arguments()
        uefi = libvirt_os.is_uefi(self.root)
        return Board(
            name=self.name, machine=self.machine, firmware=Firmware.UEFI if uefi else Firmware.BIOS,
            parts=tuple(bridges_first(self.parts, self.name)), usb=tuple(self.usb), built_in=tuple(self.built_in),
            secure_boot=uefi and libvirt_os.is_secure(self.root), tpm=self.root.find("devices/tpm") is not None,
            console=libvirt_os.console_of(self.root), memory_bytes=libvirt_os.memory_of(self.root, self.name),
            notes=tuple(self.notes),
        )  # fmt: skip

    # --- devices ----------------------------------------------------------------------------------------------------

    def _controllers(self) -> None:
        for number, one in self._each("controller"):
            kind, model, index = one.get("type", ""), one.get("model", ""), one.get("index", "0")
            if not re.fullmatch(r"[0-9]{1,3}", index):
                self._refuse(f"devices/controller[{number}]/@index", f"{index[:40]!r} is no number of a controller")
            driver = self._controller(kind, model, int(index), number)
            if driver:
                own = f"pci.{int(index)}" if kind == "pci" else f"{kind}{int(index)}"
                own = self._unused(own)
                self._add(Part(driver, own, {**self._address(one), **_ports(one, driver)}))

    def _controller(self, kind: str, model: str, index: int, number: int) -> str:
        """QEMU's device, or empty for what belongs to the machine type or is none."""
        if (kind, model) in (("pci", "pci-root"), ("pci", "pcie-root"), ("usb", "none")):
            return ""
        if kind in ("ide", "sata") and index == 0 and self.q35 == (kind == "sata"):
            return ""
        if kind in ("fdc", "ccid", "xenbus"):
            return ""
        virtio = model.removeprefix("virtio") if model.startswith("virtio-") else ""
        table = {
            "pci": _PCI, "scsi": _SCSI, "usb": _USB, "sata": {model: "ich9-ahci"}, "nvme": {model: "nvme"},
            "virtio-serial": {model: f"virtio-serial-pci{virtio}"},
        }.get(kind, {})  # fmt: skip
        if model not in table:
            self._refuse(f"devices/controller[{number}]", f"a {kind!r} controller of model {model!r} is not known")
        if kind == "usb" and not model and self.q35:
            return "qemu-xhci"
        return table[model]

    def _implied(self) -> None:
        """Controllers that libvirt adds to a definition without them."""
        buses = {one.get("bus", "") for one in self.root.iterfind("devices/disk/target")}
        if self.root.find("devices/controller[@type='usb']") is None:
            self._add(Part("qemu-xhci" if self.q35 else "piix3-usb-uhci", "usb0"))
        if "scsi" in buses and self.root.find("devices/controller[@type='scsi']") is None:
            self._add(Part("lsi53c895a", "scsi0"))
        if "sata" in buses and not self.q35 and self.root.find("devices/controller[@type='sata']") is None:
            self._add(Part("ich9-ahci", "sata0"))

    def _disks(self) -> None:
        for number, one in self._each("disk"):
            where = one.find("target")
            target, bus = (where.get("dev", ""), where.get("bus", "")) if where is not None else ("", "")
            hard = one.get("device", "disk") in ("disk", "lun")
            if not re.fullmatch(r"[a-z]{2,8}[0-9]{0,4}", target):
                self._refuse(f"devices/disk[{number}]/target/@dev", f"{target[:40]!r} is no name of a disk")
            self._disk(number, one, target if hard else "", bus or _bus_by_name(target, self.q35))

    def _disk(self, number: int, one: ET.Element, target: str, bus: str) -> None:
        carries = (target,) if target else ()
        controller = _attribute(one, "address[@type='drive']", "controller")
        if bus == "virtio":
            kind = one.get("model", "").removeprefix("virtio")
            driver = f"virtio-blk-pci{kind}"
            self._add(Part(driver, f"disk{number}", self._address(one), carries))
        elif bus == "usb":
            host = f"usb{_attribute(one, 'address', 'bus') or '0'}"
            self.usb.append(UsbPart("usb-storage", host, "", carries))
        elif bus in ("ide", "sata") and self.q35 == (bus == "sata") and controller in ("", "0"):
            self.built_in += carries
        elif bus in ("scsi", "sata", "nvme"):
            self._carry(f"{bus}{controller or '0'}", carries, number, one.findtext("wwn", ""))
        elif bus == "fdc":
            pass
        else:
            self._refuse(f"devices/disk[{number}]/target/@bus", f"disks on the bus {bus[:40]!r} are not known")

    def _carry(self, host: str, carries: tuple[str, ...], number: int, wwn: str) -> None:
        for parts in (self.parts, self.loose):
            for place, part in enumerate(parts):
                if part.id == host:
                    parts[place] = replace(part, carries=(*part.carries, *carries))
                    self.notes += filter(None, (unseen(part.driver, disk, wwn) for disk in carries))
                    return
        self._refuse(f"devices/disk[{number}]/address", f"there is no controller {host!r} that it could hang on")

    def _nics(self) -> None:
        for number, one in self._each("interface"):
            model, mac = _attribute(one, "model", "type"), _attribute(one, "mac", "address").lower()
            if one.get("type") == "hostdev":
                self.notes.append(f"interface {number} is a card of the host, which was not looked at")
                continue
            kind = model.removeprefix("virtio")
            driver = f"virtio-net-pci{kind}" if model.startswith("virtio") else model or "rtl8139"
            if driver not in NICS:
                self._refuse(f"devices/interface[{number}]/model/@type", f"the NIC model {model[:40]!r} is not known")
            self._add(Part(driver, f"net{number}", self._address(one), mac=mac))

    def _others(self) -> None:
        for number, one in self._each("video"):
            driver = _VIDEO.get(_attribute(one, "model", "type"))
            if driver:
                # The first is the one that the firmware draws on.
                driver = "virtio-gpu-pci" if number and driver == "virtio-vga" else driver
                self._add(Part(driver, f"video{number}", self._address(one)))
        balloons = list(self.root.iterfind("devices/memballoon"))
        if not any(one.get("model") == "none" for one in balloons):
            self._add(Part("virtio-balloon-pci", "balloon0", self._address(balloons[0]) if balloons else {}))
        for number, one in self._each("rng"):
            self._add(Part("virtio-rng-pci", f"rng{number}", self._address(one)))
        for number, _ in self._each("hostdev"):
            self.notes.append(f"host device {number} is passed through, it was not looked at")
        for _, one in self._each("input"):
            driver = {"tablet": "usb-tablet", "mouse": "usb-mouse", "keyboard": "usb-kbd"}.get(one.get("type", ""))
            if driver and one.get("bus") == "usb":
                self.usb.append(UsbPart(driver, "usb0"))

    def _own_arguments(self) -> None:
        """`<qemu:commandline>`: devices that libvirt has no words for, an emulated NVMe disk with the older ones."""
        words = [one.get("value", "") for one in self.root.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]
        if words:
            own = command_line.board_of(["-nodefaults", *words], target=self.name)
            taken = {part.id for part in self.parts}
            for part in own.parts:
                self.parts.append(replace(part, id=self._unused(part.id)) if part.id in taken else part)
            self.usb += own.usb
            self.notes += own.notes

    # --- addresses --------------------------------------------------------------------------------------------------

    def _address(self, element: ET.Element) -> dict[str, str]:
        """Where libvirt put it, as QEMU has it; empty when the definition leaves it open."""
        found = element.find("address[@type='pci']")
        if found is None or not found.get("slot"):
            return {}
        try:
            domain, bus, slot, function = (
                int(found.get(name, "0"), 0) for name in ("domain", "bus", "slot", "function")
            )
        except ValueError:
            domain = -1
        if domain or not (0 <= bus < 256 and 0 <= slot < 32 and 0 <= function < 8):
            self._refuse(f"devices/{element.tag}/address", "it is no PCI address of the first domain")
        place = {"bus": self._bus(bus), "addr": f"{slot:x}.{function:x}"}
        return place | ({"multifunction": "on"} if found.get("multifunction") == "on" else {})

    def _bus(self, number: int) -> str:
        return f"pci.{number}" if number else "pcie.0" if self.q35 else "pci.0"

    # --- small ------------------------------------------------------------------------------------------------------

    def _add(self, part: Part) -> None:
        (self.parts if "bus" in part.properties else self.loose).append(part)

    def _unused(self, name: str) -> str:
        """ICH9's USB is four functions with one index: the others get a name of their own."""
        taken = {part.id for part in [*self.parts, *self.loose]}
        return name if name not in taken else next(new for n in range(999) if (new := f"{name}-{n}") not in taken)

    def _each(self, tag: str) -> Iterator[tuple[int, ET.Element]]:
        return enumerate(self.root.iterfind(f"devices/{tag}"))

    def _refuse(self, field: str, reason: str, hint: str = "") -> NoReturn:
        raise BadInventory(target=self.name, field=field, reason=reason, hint=hint)


def _attribute(element: ET.Element, path: str, name: str) -> str:
    found = element.find(path)
    return found.get(name, "") if found is not None else ""


def _bus_by_name(target: str, q35: bool) -> str:
    """libvirt's own rule for a disk without a bus."""
    if target.startswith("vd"):
        return "virtio"
    return {"sd": "scsi", "hd": "sata" if q35 else "ide", "fd": "fdc"}.get(target[:2], "")


def _ports(one: ET.Element, driver: str) -> dict[str, str]:
    """Numbers of a bridge's place in the case; QEMU wants each chassis once."""
    target = one.find("target")
    if target is None:
        return {}
    words = {
        "pcie-root-port": (("chassis", "chassis"), ("port", "port")),
        "xio3130-downstream": (("chassis", "chassis"), ("port", "port")),
        "pci-bridge": (("chassisNr", "chassis_nr"),),
    }.get(driver, ())
    found = ((theirs, target.get(ours, "")) for ours, theirs in words)
    return {name: value for name, value in found if re.fullmatch(r"(0x)?[0-9a-f]{1,3}", value)}
