"""Where the devices of a libvirt domain sit, when its definition leaves it open, and in which order QEMU can make them.

The rules are libvirt's (src/qemu/qemu_domain_address.c): on q35 an Express device gets a root port of its own, a plain
PCI one a place behind a bridge, graphics and bridges sit on the root bus. It matters: behind a root port a virtio
device has other ids. On i440fx there is one bus, and QEMU finds the place. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from appliance.errors import BadInventory
from images.hardware.parts import Part

__all__ = ["bridges_first", "placed"]

_EXPRESS = re.compile(r"virtio-.*|nvme|e1000e|igb|qemu-xhci|nec-usb-xhci")
_ON_ROOT = re.compile(r"pcie?-.*|x3130-.*|xio3130-.*|i82801b11-bridge|ich9-.*|VGA|.*-vga|bochs-display|.*-svga")


def placed(parts: Sequence[Part], q35: bool) -> Iterator[Part]:
    """Parts without an address, with a bus each, and the ports and the bridge that they need."""
    bridge = ""
    for number, part in enumerate(parts):
        if not q35 or _ON_ROOT.fullmatch(part.driver):
            yield part
        elif _EXPRESS.fullmatch(part.driver):
            yield (port := _root_port(number))
            yield _behind(part, port.id)
        else:
            if not bridge:
                bridge = "to-pci"
                yield (port := _root_port(number))
                yield Part("pcie-pci-bridge", bridge, {"bus": port.id})
            yield _behind(part, bridge)


def bridges_first(parts: Sequence[Part], target: str) -> Iterator[Part]:
    """The same, each after the bridge that it is behind. Raises BadInventory when they hang in a circle."""
    ids = {part.id for part in parts}
    made: set[str] = set()
    waiting = list(parts)
    while waiting:
        ready = [one for one in waiting if (bus := one.properties.get("bus", "")) not in ids or bus in made]
        if not ready:
            reason = f"the bridges {', '.join(one.id for one in waiting)} hang in a circle"
            raise BadInventory(target=target, field="devices/controller", reason=reason)
        yield from ready
        made |= {one.id for one in ready}
        waiting = [one for one in waiting if one not in ready]


def _root_port(number: int) -> Part:
    # Numbers of a chassis are libvirt's own from 1 on; each may be there once.
    return Part("pcie-root-port", f"port{number}", {"bus": "pcie.0", "chassis": str(128 + number % 128)})


def _behind(part: Part, bus: str) -> Part:
    return replace(part, properties={**part.properties, "bus": bus})
