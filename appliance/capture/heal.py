"""What has to be read for the next point: the decision for one disk.

    what is found                                              mode          read from the disk
    ---------------------------------------------------------  ------------  ------------------------------
    no point yet                                               full          what is allocated
    our bitmaps from the record's generation on, all good      incremental   their union
    shut off, image untouched since a point taken shut off     unchanged     nothing
    anything else (bitmap absent, inconsistent, of another     compare       what is allocated; stored is only
    generation, chain changed, image put back, QEMU killed)                  what the repository does not have

A wrong `incremental` is silent damage and a needless `compare` costs time: whatever is not understood is compared. The
reason goes into the point's notes.

The union runs over the backing chain: a snapshot that somebody else makes leaves the bits written before it on the
image that became a backing file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from appliance.capture.protection import DiskState
from appliance.hypervisor.base import Disk
from appliance.hypervisor.graph.nodes import Bitmap, Graph, Node

__all__ = ["Mode", "Plan", "decide", "identity", "mark", "offline_mark", "state_of"]


class Mode(Enum):
    FULL = "full"
    INCREMENTAL = "incremental"
    UNCHANGED = "unchanged"
    COMPARE = "compare"


@dataclass(frozen=True, slots=True)
class Plan:
    """`take`: bitmaps (node, name) whose union holds every change; `before`: those that stop recording at the freeze;
    `generation`: of the bitmap that begins then. `reason` is empty unless the mode needs one."""

    mode: Mode
    generation: int
    take: tuple[tuple[str, str], ...] = ()
    before: tuple[str, ...] = ()
    reason: str = ""


def decide(graph: Graph, disk: Disk, prefix: str, state: DiskState | None, has_base: bool, untouched: bool) -> Plan:
    """The plan for one disk. `state` is the record's, `has_base` whether its last point can be built upon, `untouched`
    that the domain is shut off and its image is as the last point, taken shut off too, left it."""
    chain = list(graph.chain(disk.storage))
    # A bitmap that is there but cannot be used still occupies its name.
    seen = [_generation(name, prefix) for node in chain for name in node.bitmaps]
    generation = max([-1 if state is None else state.generation, *seen]) + 1
    before = tuple(name for name, one in chain[0].bitmaps.items() if name.startswith(prefix) and one.recording)
    if not has_base or state is None:
        return Plan(Mode.FULL, generation, before=before)
    if untouched and all(state.marks.get(identity(node)) == mark(node) for node in chain[1:]):
        return Plan(Mode.UNCHANGED, generation, before=before)
    try:
        return Plan(Mode.INCREMENTAL, generation, tuple(_union(chain, prefix, state)), before)
    except _Lost as lost:
        return Plan(Mode.COMPARE, generation, before=before, reason=f"{disk.target}: {lost}")


class _Lost(Exception):
    """Why the bitmaps do not tell everything."""


def _union(chain: Sequence[Node], prefix: str, state: DiskState) -> list[tuple[str, str]]:
    top, name = chain[0], f"{prefix}{state.generation}"
    if not any(one.good and one.recording for one in _ours(top, prefix, state.generation).values()):
        raise _Lost(_absence(top, prefix, name))
    found: list[tuple[str, str]] = []
    depth = 0
    while depth < len(chain) and (ours := _ours(chain[depth], prefix, state.generation)):
        node = chain[depth]
        if bad := [other for other, one in ours.items() if not one.good]:
            raise _Lost(f"bitmap {bad[0]} of {_base(node)} cannot be used: QEMU did not close the image")
        if node.size != top.size:
            raise _Lost(f"{_base(node)} has another size than the image above it")
        found += [(node.name, other) for other in ours]
        depth += 1
        if identity(node) == (state.chain or ("",))[0]:
            break
    if not any(other == name for _, other in found):
        raise _Lost(f"bitmap {name} is gone")
    _check_chain(chain, depth, state)
    return found


def _check_chain(chain: Sequence[Node], depth: int, state: DiskState) -> None:
    """Bits are lost with an image that left the chain, unless it was committed into one that we know."""
    taken = [identity(node) for node in chain[:depth]]
    known = list(state.chain)
    if known and known[0] not in taken and identity(chain[0]) not in known[1:]:
        raise _Lost(f"the image of the last point is not in the chain of {_base(chain[0])} any more")
    for node in chain[depth:]:
        if state.marks.get(identity(node)) != mark(node):
            raise _Lost(f"backing image {_base(node)} was changed since the last point")


def _absence(top: Node, prefix: str, name: str) -> str:
    ours = {other: one for other, one in top.bitmaps.items() if other.startswith(prefix)}
    if any(one.inconsistent for one in ours.values()):
        return f"the bitmap of {_base(top)} is inconsistent: QEMU was killed"
    if not ours:
        return f"{_base(top)} has no bitmap of ours: QEMU was killed, or the image is a new one"
    return f"{_base(top)} has bitmap {max(ours)} and not {name}: it was put back from an older state"


def _ours(node: Node, prefix: str, lowest: int) -> dict[str, Bitmap]:
    return {name: one for name, one in node.bitmaps.items() if _generation(name, prefix) >= lowest}


def _generation(name: str, prefix: str) -> int:
    tail = name.removeprefix(prefix)
    return int(tail) if name.startswith(prefix) and tail.isdecimal() else -1


def state_of(graph: Graph, disk: Disk, generation: int) -> DiskState:
    """What the record says once the point exists, read at the freeze."""
    chain = list(graph.chain(disk.storage))
    marks = {identity(node): mark(node) for node in chain[1:]}
    return DiskState(generation, tuple(identity(node) for node in chain), marks)


def identity(node: Node) -> str:
    """Which image it is: path and inode; a copy that takes its place is another one."""
    try:
        found = os.stat(node.path)
    except OSError:
        # A path that only QEMU can see, or an image over a network: told apart by QEMU's words for it.
        return node.path
    return f"{os.path.realpath(node.path)}:{found.st_ino}"


def mark(node: Node) -> str:
    """What changes when somebody writes to the image's file. A block device keeps no time: its size at least."""
    try:
        found = os.stat(node.path)
    except OSError:
        return ""
    return str(node.size) if stat.S_ISBLK(found.st_mode) else f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def offline_mark(disk: Disk) -> str:
    """Of the top image of a domain that is shut off, while nobody has it open; empty where it would prove nothing."""
    try:
        found = os.stat(disk.source)
    except OSError:
        return ""
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}" if stat.S_ISREG(found.st_mode) else ""


def _base(node: Node) -> str:
    return os.path.basename(node.path) or node.name
