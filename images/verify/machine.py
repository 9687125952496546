"""A machine of software that stands for a target: its inventory as words for QEMU.

    pci:v00001B36d00000010…  → nvme           what QEMU has itself
    pci:…bc01sc06i01         → its own AHCI   another maker's, but one driver knows them all by their class
    a network card of another kind            → e1000e in its place, told in `notes`
    a disk controller of another kind         → NotSupported: an image for it has no driver for anything else

Only what a boot needs is there: the controllers that carry disks, the wanted cards, a screen and serial lines. Cards
reach nobody (`restrict=on`). A hub or a port on the way to a device is left out: no driver depends on it. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.errors import NotSupported
from images.hardware.expand import disk_bus_of, parse_pci, role_of
from images.model import Device, Firmware, Inventory, Role

__all__ = ["CONSOLES", "Machine", "machine_for"]

# Serial lines of a PC that the kernel knows by their number. The last one that is not the console carries the report.
CONSOLES = ("ttyS0", "ttyS1", "ttyS2", "ttyS3")

# (vendor, device) → the disk controller of QEMU.
_CONTROLLERS = {
    (0x1AF4, 0x1001): "virtio-blk-pci", (0x1AF4, 0x1042): "virtio-blk-pci",
    (0x1AF4, 0x1004): "virtio-scsi-pci", (0x1AF4, 0x1048): "virtio-scsi-pci",
    (0x1B36, 0x0010): "nvme", (0x1000, 0x0012): "lsi53c895a", (0x1000, 0x0060): "megasas",
    (0x1000, 0x005B): "megasas-gen2", (0x1000, 0x0054): "mptsas1068", (0x15AD, 0x07C0): "pvscsi",
    (0x1022, 0x2020): "am53c974",
}  # fmt: skip
# The driver for these looks at the class alone.
_BY_CLASS = {0x0101: "ide", 0x0106: "ahci", 0x0108: "nvme", 0x0C03: "usb"}
_NICS = {
    (0x1AF4, 0x1000): "virtio-net-pci", (0x1AF4, 0x1041): "virtio-net-pci", (0x8086, 0x10D3): "e1000e",
    (0x8086, 0x100E): "e1000", (0x8086, 0x100F): "e1000-82545em",
    (0x10EC, 0x8139): "rtl8139", (0x15AD, 0x07B0): "vmxnet3",
}  # fmt: skip
_ANY_NIC = "e1000e"
_I440FX = (0x8086, 0x1237)
# The CD has its own: the first one of the second channel, or the third port.
_IDE_PLACES = ("bus=ide.0,unit=0", "bus=ide.0,unit=1", "bus=ide.1,unit=1")
_AHCI_PORTS = ("0", "1", "3", "4", "5")


@dataclass(frozen=True, slots=True)
class Machine:
    """`words` are devices: disks attach the nodes `disk0`, `disk1` …, the CD the node `medium`, serial lines the
    chardevs `console` and `report`. `report` is the kernel's name of the line for the report. `notes`: what is not as
    on the target."""

    machine: str
    firmware: Firmware
    secure_boot: bool
    words: tuple[str, ...]
    console: str
    report: str
    notes: tuple[str, ...] = ()


def machine_for(inventory: Inventory, disks: Sequence[str]) -> Machine:
    """The machine with these disks (names in the point), each where the target carries the one of that name, else in
    its order. Raises NotSupported when QEMU has nothing that an image for this target could find them on."""
    places = _places(inventory, disks)
    old = any(_ids(device) == _I440FX for device in inventory.devices) or "ide" in map(_controller, places)
    builder = _Builder(inventory.name, "pc" if old and not inventory.secure_boot else "q35")
    for number, device in enumerate(places):
        builder.disk(number, device)
    for number, nic in enumerate(one for one in inventory.nics if one.wanted):
        builder.nic(number, nic.modalias, nic.mac)
    builder.add("VGA")
    builder.cd()
    console = inventory.console if inventory.console in CONSOLES else CONSOLES[0]
    report = next(one for one in reversed(CONSOLES) if one != console)
    builder.serial(console, report)
    return Machine(
        builder.machine, inventory.firmware, inventory.secure_boot, tuple(builder.words), console, report,
        tuple(builder.notes),
    )  # fmt: skip


def _places(inventory: Inventory, disks: Sequence[str]) -> list[Device]:
    """What each disk hangs on."""
    carried = {name: one for one in sorted(inventory.devices, key=_is_usb_disk) for name in one.carries}
    if carried:
        free = [carried[name] for name in sorted(carried) if name not in disks]
        last = carried[max(carried)]
        return [carried[name] if name in carried else (free.pop(0) if free else last) for name in disks]
    bus = inventory.disk_bus
    on_bus = [one for one in inventory.devices if bus and disk_bus_of(one.modalias) == bus]
    any_of = on_bus or [one for one in inventory.devices if role_of(one.modalias) is Role.DISK]
    found = next((one for one in any_of if _controller(one)), any_of[0] if any_of else None)
    if found is None:
        raise NotSupported(object=f"rehearsal on {inventory.name!r}", reason="it has nothing that disks could hang on")
    return [found for _ in disks]


def _is_usb_disk(device: Device) -> bool:
    """Of a USB disk both the host and the disk say that they carry it: the last one is believed."""
    return device.modalias.startswith("usb:")


def _ids(device: Device) -> tuple[int, int]:
    pci = parse_pci(device.modalias)
    return (pci.vendor, pci.device) if pci else (0, 0)


def _controller(device: Device) -> str:
    """QEMU's, a word of ours for what the machine has itself, or empty."""
    if _is_usb_disk(device):
        return "usb"
    pci = parse_pci(device.modalias)
    return (_CONTROLLERS.get(_ids(device)) or _BY_CLASS.get(pci.kind, "")) if pci else ""


@dataclass
class _Builder:
    target: str
    machine: str
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _made: dict[str, str] = field(default_factory=dict)
    _used: dict[str, int] = field(default_factory=dict)

    def add(self, device: str) -> None:
        self.words += ["-device", device]

    def disk(self, number: int, device: Device) -> None:
        kind = _controller(device)
        drive = f"drive=disk{number},bootindex={number + 1}"
        if kind == "virtio-blk-pci":
            self.add(f"{kind},{drive}")
        elif kind == "nvme":
            self.add(f"nvme,serial=rewind{number},{drive}")
        elif kind == "usb":
            self.add(f"usb-storage,bus={self._host('qemu-xhci', 'usb')}.0,{drive}")
        elif kind == "ide":
            self.add(f"ide-hd,{self._next('ide', _IDE_PLACES, 'IDE')},{drive}")
        elif kind == "ahci":
            self.add(f"ide-hd,{self._ahci()},{drive}")
        elif kind:
            # Linux does not see a SAS disk without a name; NAA 3 are those that nobody assigns.
            name = f"wwn=0x{3 << 60 | number + 1:x}," if kind == "mptsas1068" else ""
            self.add(f"scsi-hd,bus={self._host(kind, device.slot or device.modalias)}.0,{name}{drive}")
        else:
            what = device.description or device.modalias
            raise NotSupported(
                object=f"rehearsal on {self.target!r}", reason=f"QEMU has nothing like {what}, which carries a disk",
                hint="without --target it boots on the hardware that the domain had",
            )  # fmt: skip

    def nic(self, number: int, modalias: str, mac: str) -> None:
        driver = _NICS.get(_ids(Device(modalias=modalias)), "")
        if not driver:
            self.notes.append(f"an {_ANY_NIC} stands for network card {modalias}, which QEMU has not")
        # No boot from the network, and no program for it, which is not in every installation.
        address = f",mac={mac}" if mac else ""
        self.words += ["-netdev", f"user,id=net{number},restrict=on"]
        self.add(f"{driver or _ANY_NIC},netdev=net{number}{address},romfile=")

    def cd(self) -> None:
        place = "ide.1,unit=0" if self.machine == "pc" else "ide.2"
        self.add(f"ide-cd,bus={place},drive=medium,bootindex=0")

    def serial(self, console: str, report: str) -> None:
        """What the guest has on other lines than these is heard by nobody, but it has them."""
        for number, name in enumerate(CONSOLES):
            line = {console: "console", report: "report"}.get(name, "")
            if line or number < 2:
                self.add(f"isa-serial,index={number},chardev={line or 'unheard'}")

    def _host(self, driver: str, key: str) -> str:
        """A controller that several disks share, made for the first of them."""
        if key not in self._made:
            self._made[key] = f"host{len(self._made)}"
            self.add(f"{driver},id={self._made[key]}")
        return self._made[key]

    def _ahci(self) -> str:
        own = self.machine == "q35"
        port = self._next("ahci", _AHCI_PORTS if own else ("0", "1", "2", "3", "4", "5"), "SATA")
        return f"bus={'ide' if own else self._host('ich9-ahci', 'ahci')}.{port}"

    def _next(self, key: str, places: Sequence[str], what: str) -> str:
        number = self._used[key] = self._used.get(key, -1) + 1
        if number >= len(places):
            reason = f"more than {len(places)} {what} disks have no place"
            raise NotSupported(object=f"rehearsal on {self.target!r}", reason=reason)
        return places[number]
