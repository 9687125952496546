"""A QEMU command line as a Board: what hardware it describes. Nothing of it is executed or opened.

    argv ──words──► (option, value) ──each to its reader──► Board

Understood are the ways in which QEMU is told of disks, NICs and controllers: `-device` (also as JSON), `-drive`,
`-hda` …, `-nic`, `-net nic`, `-blockdev` of firmware, and the machine. Options of no concern are passed over. Defaults
are QEMU's own (docs: qemu(1), and hw/i386/pc_piix.c, pc_q35.c).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from appliance.errors import BadInventory
from images.hardware import parts as known
from images.hardware.parts import Board, Part, UsbPart, is_q35
from images.hardware.qemu_words import device_words, options_of, split
from images.hardware.schema import fit_name
from images.model import Firmware

__all__ = ["board_of"]

_ALIASES = {
    "virtio-blk": "virtio-blk-pci", "virtio-scsi": "virtio-scsi-pci", "virtio-net": "virtio-net-pci",
    "virtio-serial": "virtio-serial-pci", "virtio-rng": "virtio-rng-pci", "virtio-balloon": "virtio-balloon-pci",
    "lsi": "lsi53c895a", "ahci": "ich9-ahci", "e1000-82540em": "e1000", "virtio": "virtio-net-pci",
}  # fmt: skip
_SCSI_DISKS = frozenset({"scsi-hd", "scsi-disk", "scsi-block"})
_IDE_DISKS = frozenset({"ide-hd", "ide-drive"})
_VGA = {"std": "VGA", "cirrus": "cirrus-vga", "qxl": "qxl-vga", "virtio": "virtio-vga", "vmware": "vmware-svga"}
# Command lines of libvirt say what we have no use for; of those drivers nobody needs a note.
_SILENT = re.compile(r"usb-(redir|hub|audio)|virt(serial|con).*|hda-.*|isa-debugcon|vmcoreinfo|pvpanic.*")
_SIZE = re.compile(r"(\d{1,12})([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 20, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass
class _Reading:
    """What was found so far. `backends`: drive id → whether it is a hard disk."""

    name: str
    machine: str = "pc"
    parts: list[Part] = field(default_factory=list)
    usb: list[UsbPart] = field(default_factory=list)
    carried: list[tuple[str, str, str]] = field(default_factory=list)  # (kind of bus, id of the controller, disk)
    cdroms: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)  # disk → its WWN
    disks: int = 0
    uefi: bool = False
    secure: bool = False
    tpm: bool = False
    console: str = ""
    memory: int = 128 << 20
    nodefaults: bool = False
    network: bool = False
    vga: str = "std"
    usb_bus: bool = False
    notes: list[str] = field(default_factory=list)

    def disk(self, words: Mapping[str, str]) -> str:
        """The name of a disk: its device's id, else its drive's, else a number."""
        name = words.get("id") or words.get("drive") or f"disk{self.disks}"
        self.disks += 1
        return name

    def new_id(self) -> str:
        return f"rw{len(self.parts)}"


def board_of(command: Sequence[str] | str, *, target: str = "") -> Board:
    """The machine that a QEMU would be with these arguments. Text is taken apart as a shell would (`virsh
    domxml-to-native` prints such), without expanding anything; settings of the environment and the program before the
    options may be there. `target` is the board's name, by default that of `-name`.

    Raises BadInventory, `field` being the option.
    """
    name = target or "qemu"
    options = list(options_of(command, name))
    if not target:
        told = next((value for option, value in options if option == "-name"), "")
        name = fit_name(split(told, "guest").get("guest", ""), name)
    reading = _Reading(name)
    _collect(reading, options)
    _defaults(reading)
    return _board(reading)


# --- options --------------------------------------------------------------------------------------------------------


def _collect(reading: _Reading, options: Sequence[tuple[str, str]]) -> None:
    """Drives first: a device refers to one that may stand behind it."""
    for option, value in sorted(options, key=lambda one: one[0] != "-drive"):
        if option == "-device":
            _device(reading, device_words(value, reading.name))
        elif option == "-drive":
            _drive(reading, split(value, "file"))
        elif option in ("-hda", "-hdb", "-hdc", "-hdd"):
            reading.carried.append(("built-in", "", option[1:]))
        elif option in ("-nic", "-net"):
            _network(reading, option, split(value, "type"))
        elif option == "-netdev":
            reading.network = True
        else:
            _machine(reading, option, value)


def _machine(reading: _Reading, option: str, value: str) -> None:
    if option in ("-machine", "-M"):
        words = split(value, "type")
        reading.machine = known.machine_type(words.get("type", reading.machine), reading.name, option)
        reading.usb_bus |= words.get("usb") == "on"
        reading.uefi |= "pflash0" in words
    elif option == "-bios":
        reading.uefi |= bool(re.search(r"ovmf|edk2|uefi", value, re.IGNORECASE))
    elif option == "-m":
        reading.memory = _size(split(value, "size").get("size", "128"), reading.name)
    elif option == "-global":
        reading.secure |= bool(re.fullmatch(r".*cfi\.pflash01.*secure(,value)?=on", value))
    elif option == "-blockdev":
        reading.secure |= _enrolled(value)
    elif option == "-tpmdev":
        reading.tpm = True
    elif option in ("-serial", "-nographic") and value != "none":
        reading.console = "ttyS0"
    elif option == "-nodefaults":
        reading.nodefaults = True
    elif option == "-usb":
        reading.usb_bus = True
    elif option == "-vga":
        reading.vga = value


def _size(text: str, name: str) -> int:
    found = _SIZE.fullmatch(text)
    if not found:
        raise BadInventory(target=name, field="-m", reason=f"{text!r} is no size of memory")
    return int(found[1]) << _UNITS[found[2].upper()]


def _enrolled(value: str) -> bool:
    """Whether a file of UEFI variables has Secure Boot's keys, by the name that distributions give it."""
    return bool(re.search(r"[._-]ms[._-]|VARS.*secboot", value))


def _drive(reading: _Reading, words: Mapping[str, str]) -> None:
    interface, cdrom = words.get("if", "ide"), words.get("media") == "cdrom"
    if interface == "pflash":
        reading.uefi = True
        reading.secure |= _enrolled(words.get("file", ""))
    elif interface == "none":
        if cdrom:
            reading.cdroms.add(words.get("id", ""))
    elif interface == "virtio":
        disk = reading.disk(words)
        reading.parts.append(Part("virtio-blk-pci", reading.new_id(), carries=() if cdrom else (disk,)))
    elif interface in ("ide", "scsi") and not cdrom:
        if interface == "scsi" and not any(part.driver == "lsi53c895a" for part in reading.parts):
            reading.parts.append(Part("lsi53c895a", reading.new_id()))
        reading.carried.append(("built-in" if interface == "ide" else "scsi", "", reading.disk(words)))


def _network(reading: _Reading, option: str, words: Mapping[str, str]) -> None:
    """`-nic` is always a card, unless it is none; `-net` only when it says so, else the other end of the cable."""
    reading.network = True
    kind = words.get("type", "")
    if kind == "none" or (option == "-net" and kind != "nic"):
        return
    model = words.get("model") or _default_nic(reading)
    driver = _ALIASES.get(model, model)
    if driver not in known.NICS:
        raise BadInventory(target=reading.name, field=option, reason=f"the NIC model {model!r} is not known")
    mac = words.get("mac", words.get("macaddr", "")).lower()
    reading.parts.append(Part(driver, reading.new_id(), mac=mac))


def _default_nic(reading: _Reading) -> str:
    return "e1000e" if is_q35(reading.machine) else "e1000"


def _device(reading: _Reading, words: Mapping[str, str]) -> None:
    driver = _ALIASES.get(words.get("driver", ""), words.get("driver", ""))
    host = words.get("bus", "").partition(".")[0]
    if driver in known.USB_DEVICES:
        carries = (reading.disk(words),) if driver == "usb-storage" else ()
        reading.usb.append(UsbPart(driver, host, words.get("id", ""), carries))
    elif driver in _SCSI_DISKS and words.get("drive", "") not in reading.cdroms:
        disk = reading.disk(words)
        reading.carried.append(("scsi", host, disk))
        reading.names[disk] = words.get("wwn", "")
    elif driver in _IDE_DISKS:
        reading.carried.append(("built-in" if host in ("", "ide") else "ide", host, reading.disk(words)))
    elif driver == "nvme-ns":
        reading.carried.append(("nvme", host, reading.disk(words)))
    elif driver in known.KNOWN:
        reading.parts.append(_part(reading, driver, words))
    elif driver.startswith("tpm-"):
        reading.tpm = True
    elif driver == "isa-serial":
        reading.console = "ttyS0"
    elif driver.startswith(("vfio-", "vhost-user-", "vhost-scsi")):
        reading.notes.append(f"{driver} hands over hardware of the host or of a process, which was not looked at")
    elif not driver.endswith("-cd") and not _SILENT.fullmatch(driver):
        reading.notes.append(f"the device {driver!r} is not known and was not looked at")


def _part(reading: _Reading, driver: str, words: Mapping[str, str]) -> Part:
    own = known.identifier(words.get("id") or reading.new_id(), reading.name, "-device")
    carries: tuple[str, ...] = ()
    if driver in known.DISKS and "drive" in words:
        carries = (reading.disk(words),)
    properties = {key: value for key, value in words.items() if key in known.PASSED}
    return Part(driver, own, properties, carries, words.get("mac", "").lower())


# --- together -------------------------------------------------------------------------------------------------------


def _defaults(reading: _Reading) -> None:
    if reading.usb_bus:
        driver = "ich9-usb-ehci1" if is_q35(reading.machine) else "piix3-usb-uhci"
        reading.parts.append(Part(driver, reading.new_id()))
    if reading.nodefaults:
        return
    if not reading.network:
        reading.parts.append(Part(_default_nic(reading), reading.new_id()))
    if reading.vga in _VGA and not any("vga" in part.driver.lower() for part in reading.parts):
        reading.parts.append(Part(_VGA[reading.vga], reading.new_id()))
    reading.console = reading.console or "ttyS0"


def _board(reading: _Reading) -> Board:
    for kind, host, disk in reading.carried:
        if kind != "built-in":
            _carry(reading, kind, host, disk)
    return Board(
        name=reading.name, machine=reading.machine, firmware=Firmware.UEFI if reading.uefi else Firmware.BIOS,
        parts=tuple(reading.parts), usb=tuple(reading.usb),
        built_in=tuple(disk for kind, _, disk in reading.carried if kind == "built-in"),
        secure_boot=reading.uefi and reading.secure, tpm=reading.tpm, console=reading.console,
        memory_bytes=reading.memory, notes=tuple(reading.notes),
    )  # fmt: skip


def _carry(reading: _Reading, kind: str, host: str, disk: str) -> None:
    """Put the disk on the controller of that id; without an id on the first that could have it, as QEMU does."""
    for number, usb in enumerate(reading.usb):
        if host and usb.id == host:
            reading.usb[number] = replace(usb, carries=(*usb.carries, disk))
            return
    by_kind = not host or host == kind
    for number, part in enumerate(reading.parts):
        if part.id == host or (by_kind and _may_carry(part.driver, kind)):
            reading.parts[number] = replace(part, carries=(*part.carries, disk))
            if note := known.unseen(part.driver, disk, reading.names.get(disk, "")):
                reading.notes.append(note)
            return
    reason = f"disk {disk!r} hangs on {host or kind!r}, which is not there"
    raise BadInventory(target=reading.name, field="-device", reason=reason)


def _may_carry(driver: str, kind: str) -> bool:
    if kind == "nvme":
        return driver == "nvme"
    return driver in known.HOSTS and "usb" not in driver and ("ahci" in driver or "ide" in driver) == (kind == "ide")
