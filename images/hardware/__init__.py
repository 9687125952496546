"""The target's hardware as modaliases, found without booting a kernel on it.

    from_xml, from_qemu     a virtual machine: its devices asked of a QEMU in which nothing runs
    from_script_output      a physical machine: what `machine.sh` printed there
    from_redfish            a physical machine that is off: what its management controller knows
    profile                 a kind of machine that is known beforehand (`vmware-pvscsi`, `aws-nitro`)
    script                  the text of `machine.sh`
    load, dump              the inventory as text, as it is kept

Each gives an `images.model.Inventory`, checked, or raises BadInventory that names the field. `target` is the name that
it gets, by default the one that the source says. `expand` tells what lies behind the devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from appliance.errors import BadInventory
from images.hardware import command_line, libvirt_xml
from images.hardware.found import inventory_of
from images.hardware.profiles import about, profile, profile_names
from images.hardware.redfish import from_redfish
from images.hardware.schema import dump, load
from images.model import Inventory

__all__ = [
    "about", "dump", "from_qemu", "from_redfish", "from_script_output", "from_xml", "load", "profile", "profile_names",
    "script",
]  # fmt: skip

_EMULATOR = "qemu-system-x86_64"


def from_xml(
    xml: str, *, target: str = "", source: Literal["xml", "libvirt"] = "xml", emulator: str = _EMULATOR
) -> Inventory:
    """Of a libvirt domain's XML (`virsh dumpxml --inactive`, or written by hand). `source` is "libvirt" when a libvirt
    gave it. No libvirt is asked, and no file that the XML names is looked at. Takes a second.

    Raises BadInventory, and ToolFailed when `emulator` cannot be run.
    """
    return inventory_of(libvirt_xml.board_of(xml, target=target), source, emulator=emulator)


def from_qemu(command: Sequence[str] | str, *, target: str = "", emulator: str = _EMULATOR) -> Inventory:
    """Of a QEMU command line, as words or as a shell would have it. It is not executed: see `command_line`. Raises as
    `from_xml`."""
    return inventory_of(command_line.board_of(command, target=target), "qemu", emulator=emulator)


def from_script_output(text: str, *, target: str = "") -> Inventory:
    """Of what `machine.sh` printed on the machine. Raises BadInventory, also for an inventory of another source."""
    found = load(text, target=target)
    if found.source != "script":
        reason = f"it is {found.source!r}, not the output of `machine.sh`"
        raise BadInventory(target=found.name, field="source", reason=reason)
    return found


def script() -> str:
    """The text of `machine.sh`, to be run on the machine: `sh machine.sh >FILE`."""
    return (files("images.hardware") / "machine.sh").read_text(encoding="utf-8")
