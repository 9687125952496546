"""Names that change with the hardware: of disks, of network cards, of consoles; and the command line that follows.

    command_line   the client's own and what the target needs       rename   MAC address → interface name
    disk_names     how the kernel will name the restored disks (`sd`, `nvme` …)

The client's words stay, in their order. Left out are only `root=` by a name that depends on hardware and `resume=` of a
device that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from images.hardware.expand import disk_bus_of
from images.model import Client, Inventory, Layer
from images.words import words_of

__all__ = ["command_line", "consoles", "disk_names", "found_on_disks", "identifier_of", "rename", "unstable_name"]

_FAMILY = re.compile(r"/dev/((?:sd|vd|hd|xvd)[a-z]+|(?:nvme\d+n|mmcblk|nbd|md|loop)\d+)(?:p?\d+)?")
_KINDS = re.compile(r"(sd|vd|hd|xvd|nvme|mmcblk)")
_BUS_NAMES = {
    "virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "sd", "usb": "sd", "nvme": "nvme", "mmc": "mmcblk",
}  # fmt: skip
_IDENTIFIER = re.compile(r"(?:/dev/disk/by-(uuid|partuuid|label|partlabel)/|(UUID|PARTUUID|LABEL|PARTLABEL)=)(.+)")


def unstable_name(spec: str) -> tuple[str, str]:
    """(family, disk) of a device that is named by the order in which the kernel finds hardware: `/dev/vdb1` → (`vd`,
    `vdb`). Two empty strings for a name that stays (`UUID=`, `/dev/mapper/…`, `/dev/disk/…`)."""
    found = _FAMILY.fullmatch(spec.strip().strip('"'))
    kind = _KINDS.match(found[1]) if found else None
    return (kind[1], found[1]) if found and kind else ("", "")


def identifier_of(spec: str) -> str:
    """`UUID=…`, `LABEL=…` and so on without quotes, also of a path in /dev/disk; empty for other names."""
    found = _IDENTIFIER.fullmatch(spec.replace('"', ""))
    return f"{(found[1] or found[2]).upper()}={found[3]}" if found else ""


def found_on_disks(spec: str, identifiers: Collection[str] | None) -> bool:
    """Whether what the name means is on a restored disk, or may be: nobody has looked, or it is no such name. Letters
    of UUIDs are the same in both cases, as for mount(8)."""
    wanted = identifier_of(spec).lower()
    return identifiers is None or not wanted or wanted in {one.lower() for one in identifiers}


def disk_names(inventory: Inventory) -> frozenset[str]:
    """Families that restored disks will have on the target, empty when it is not known on what they will hang."""
    buses = {disk_bus_of(one.modalias) for one in inventory.devices if one.carries}
    buses |= {inventory.disk_bus} if not any(buses) else set()
    return frozenset(_BUS_NAMES[bus] for bus in buses if bus in _BUS_NAMES)


def consoles(line: str) -> list[str]:
    """`console=` devices in their order, without their settings."""
    found = (word.partition("=")[2] for word in words_of(line) if word.startswith("console="))
    return [one.split(",")[0] for one in found]


def command_line(client: Client, inventory: Inventory, identifiers: Collection[str] | None) -> tuple[str, list[str]]:
    """The target's command line, and a sentence for each word that was changed or left out. `identifiers` are the
    `UUID=…` and other names found on the restored disks; None when nobody has looked."""
    words, notes = [], []
    rooted = False
    for word in words_of(client.command_line):
        key, _, value = word.partition("=")
        if key == "root":
            word, rooted = f"root={_stable_root(client, value)}", True
            if word != f"root={value}":
                notes.append(f"root={value} depends on hardware: the command line says {word} instead")
        elif key == "resume" and not _is_there(value, inventory, identifiers):
            notes.append(f"resume={value} is no device of this target: it is left out, and noresume added")
            word = "noresume"
        words.append(word)
    if not rooted:
        words.append(f"root={_stable_root(client, client.root.spec)}")
    if client.root.flags and not any(word.startswith("rootflags=") for word in words):
        words.append(f"rootflags={client.root.flags}")
    return " ".join(_with_console(words, inventory.console)), notes


def _stable_root(client: Client, spec: str) -> str:
    # An LVM volume or an opened LUKS device has a name of its own; only what hangs on a partition has the hardware's.
    if unstable_name(spec)[0] and client.root.uuid:
        return f"UUID={client.root.uuid}"
    if spec:
        return spec
    if Layer.LVM in client.root.layers and client.root.volume:
        return "/dev/" + client.root.volume
    return f"UUID={client.root.uuid}"


def _is_there(spec: str, inventory: Inventory, identifiers: Collection[str] | None) -> bool:
    family = unstable_name(spec)[0]
    if family:
        return family in disk_names(inventory)
    return found_on_disks(spec, identifiers)


def _with_console(words: list[str], console: str) -> list[str]:
    """The target's serial line gets the kernel's messages. It stands first: the last one is what /dev/console is, and
    that remains the client's choice."""
    named = consoles(" ".join(words))
    if not console or console in named:
        return words
    ours = [f"console={console},115200" if console.startswith("ttyS") else f"console={console}"]
    if not named:
        ours.append("console=tty0")
        return words + ours
    first = next(number for number, word in enumerate(words) if word.startswith("console="))
    return words[:first] + ours + words[first:]


def rename(client: Client, inventory: Inventory) -> tuple[dict[str, str], list[str]]:
    """MAC address of a wanted card → the name that the client's configuration has for it, and what to tell about them.

    A card with the very address keeps its name. The other names go to the other cards, both in their order.
    """
    cards = [nic for nic in inventory.nics if nic.wanted]
    known = {mac.lower(): name for name, mac in client.nics.items() if mac}
    given = {nic.mac: known[nic.mac] for nic in cards if nic.mac and nic.mac in known}
    free = [name for name in client.nics if name not in given.values()]
    notes = []
    for nic in cards:
        if nic.mac in given or not free:
            continue
        name = free.pop(0)
        if not nic.mac:
            notes.append(f"{nic.slot or nic.modalias} has no known MAC address: it cannot be given the name {name}")
            continue
        given[nic.mac] = name
        if client.nics[name]:
            notes.append(
                f"the guest knows {name} by {client.nics[name]}; the card that gets this name has {nic.mac}, "
                "which its configuration is told with --settle"
            )
    if free and cards:
        notes.append(f"the guest's configuration expects {', '.join(free)}, for which the target has no card")
    elif free:
        notes.append(f"the target has no network card that is wanted; the guest expects {', '.join(free)}")
    return given, notes
