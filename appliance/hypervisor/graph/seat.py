"""Where the chain of a disk hangs: at its device, or under our tap while there is one.

    no tap      device ─────────────────────────────────────────► place
    tap         device ─► rw-tpg ─► rw-tpm (mirror) ─► rw-tpf ──► place

Epochs and reverts work on the place alone and need not know of the tap. Without one the place is changed by `qom-set`
of the device's `drive`, under it by `blockdev-reopen` of rw-tpf, so that the mirror above goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

from appliance.errors import MonitorError
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import nodes

__all__ = ["TAP", "TAP_HOLE", "attach", "attached", "below_tap", "move", "reopen", "root", "tap_name"]

TAP = "rw-tp"
TAP_HOLE = "rw-tph"


def tap_name(part: str, target: str) -> str:
    """Of the tap's pieces for one disk: filters `f` and `g`, mirror `m`, job `j`, sink `s`, hole `h`, limits `t`."""
    return f"{TAP}{part}-{target}"[:31]


def _sibling(name: str, part: str) -> str:
    return TAP + part + name[len(TAP) + 1 :]


def root(monitor: Monitor, device: str) -> str:
    """The node that the device itself sits on. Raises MonitorError when the device is gone."""
    # Devices made with -drive would answer with a backend's name here; they are refused by the survey.
    return str(monitor.execute("qom-get", path=device, property="drive"))


def attached(monitor: Monitor, device: str) -> str:
    """The place now; empty when the device is gone."""
    try:
        node = root(monitor, device)
    except MonitorError:
        return ""
    return below_tap(nodes.edges(monitor), node) if node.startswith(TAP) else node


def below_tap(edges: Mapping[str, Mapping[str, str]], node: str) -> str:
    """The first node from `node` down that is none of the tap's filters; its hole counts as a place."""
    while node.startswith(TAP) and (below := edges.get(node, {})):
        node = below.get("file", below.get("backing", ""))
    return node


def attach(monitor: Monitor, device: str, node: str) -> None:
    """Make `node` the place; nothing happens when it is already. A lost connection is safe to repeat."""
    where = root(monitor, device)
    if where != node:
        move(monitor, device, where, node)


def move(monitor: Monitor, device: str, where: str, node: str) -> None:
    """Make `node` the place of a device whose `root` is `where`; without a tap it must be another one: the same aborts
    QEMU."""
    if where.startswith(TAP):
        reopen(monitor, _sibling(where, "f"), node)
    else:
        monitor.execute("qom-set", path=device, property="drive", value=node)


def reopen(monitor: Monitor, name: str, node: str) -> None:
    """Put the tap's lower filter `name` onto another node. Harmless when it is on it already."""
    # What is not said again goes back to QEMU's default.
    options = {"driver": "throttle", "node-name": name, "throttle-group": _sibling(name, "t"), "file": node,
               "discard": "unmap"}  # fmt: skip
    monitor.execute("blockdev-reopen", options=[options])
