"""What PCI devices a virtual machine will have: asked of QEMU, in which nothing runs.

QEMU is started stopped (`-S`), with the machine's devices, disks of nothing (`null-co`), NICs without a network and no
boot medium. Not even firmware runs: the processor does not execute one instruction. What firmware would do for us, to
give the buses behind bridges a number (without it `query-pci` does not see what is behind a PCIe root port), we do
ourselves with QEMU's commands for I/O ports, through the PC's two ports of PCI configuration space. There also stand
the exact class code and subsystem, of which the kernel makes the modalias: nothing is guessed or waited for.

    registers   PCI Local Bus 3.0, 3.2.2.3.2 (ports 0xCF8 and 0xCFC), 6.1 (header); PCI-to-PCI Bridge 1.2, 3.2 and SSVID

Emulation (`tcg`) always: no processor is used, and /dev/kvm need not be there. Takes a fraction of a second.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import BadInventory, ToolFailed
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.qmp import Connection
from appliance.process import Child
from images.hardware.expand import Pci, pci_alias
from images.hardware.parts import DISKS, LESSER, NICS, Board, Part, is_q35

__all__ = ["Function", "probe"]

_BRIDGE = 0x0604
_MOST_BUSES = 255
_START = 30.0
_NOT_THERE = re.compile(r"'([A-Za-z0-9_-]+)' is not a valid device model name")


@dataclass(frozen=True, slots=True)
class Function:
    """A PCI function that was found. `id` is that of its Part, empty for what belongs to the machine type."""

    slot: str
    id: str
    pci: Pci

    @property
    def modalias(self) -> str:
        return pci_alias(self.pci)


def probe(board: Board, *, emulator: str = "qemu-system-x86_64") -> tuple[tuple[Function, ...], tuple[str, ...]]:
    """(functions in the order of their slots, notes on what was left out).

    Raises BadInventory when QEMU refuses the machine (its own words are the reason), ToolFailed when there is no QEMU
    or it does not answer within 30 seconds. Nothing stays running or on disk. Any thread; each call has its own QEMU.
    """
    machine, parts, notes = board.machine, list(board.parts), list[str]()
    while True:
        try:
            return _ask(board.name, _argv(emulator, machine, parts)), tuple(notes)
        except _Refused as error:
            family = "q35" if is_q35(machine) else "pc"
            missing = _NOT_THERE.search(error.words)
            if "unsupported machine type" in error.words and machine != family:
                notes.append(f"this QEMU has no machine type {machine}: its newest {family} was asked instead")
                machine = family
            elif missing and missing[1] in LESSER:
                notes.append(f"this QEMU has no {missing[1]}: it is left out of the inventory")
                parts = [part for part in parts if part.driver != missing[1]]
            else:
                raise BadInventory(
                    target=board.name, field="devices", reason=f"QEMU refuses this machine: {error.words}"
                ) from None


class _Refused(Exception):
    """QEMU ended at once; `words` are its own."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


# --- the command line -----------------------------------------------------------------------------------------------


def _argv(emulator: str, machine: str, parts: Sequence[Part]) -> list[str]:
    argv = [
        emulator, "-nodefaults", "-no-user-config", "-S", "-display", "none", "-m", "64", "-net", "none",
        "-machine", f"{machine},accel=tcg",
    ]  # fmt: skip
    for number, part in enumerate(parts):
        words = dict(part.properties)
        if part.driver in DISKS:
            node = f"nothing{number}"
            argv += ["-blockdev", f"driver=null-co,node-name={node},read-zeroes=on,size=1073741824"]
            words["drive"] = node
        if part.driver == "nvme":
            words["serial"] = f"rewind{number}"
        if part.driver in NICS:
            words["romfile"] = ""  # not there in every installation, and of no use
        argv += ["-device", ",".join([part.driver, f"id={part.id}", *_words(words)])]
    return argv


def _words(properties: Mapping[str, str]) -> Iterator[str]:
    for name, value in properties.items():
        yield f"{name}={value.replace(',', ',,')}"


# --- the conversation -----------------------------------------------------------------------------------------------


def _ask(name: str, argv: Sequence[str]) -> tuple[Function, ...]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rw-"))
        path = Path(folder, "qmp")
        child = stack.enter_context(Child([*argv, "-qmp", f"unix:{path},server=on,wait=off"], name="qemu-probe"))
        monitor = _connect(child, path, name)
        stack.callback(monitor.close)
        space = _Space(monitor)
        return tuple(sorted(_functions(space, _number_buses(space)), key=lambda one: one.slot))


def _connect(child: Child, path: Path, name: str) -> Connection:
    """The socket and the greeting are there before QEMU has looked at the devices: only an answer tells that it took
    them all."""
    limit = time.monotonic() + _START
    while not _answers(path, limit - time.monotonic()):
        if not child.alive():
            raise _Refused(_last_words(child))
        if time.monotonic() > limit:
            raise ToolFailed(tool="qemu-probe", reason=f"its monitor did not answer in {_START:g} s")
        time.sleep(0.02)
    return Connection(path, name)


def _answers(path: Path, patience: float) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(max(patience, 0.1))
        try:
            one.connect(os.fspath(path))
            one.sendall(b'{"execute": "qmp_capabilities"}')
            heard = b""
            while b'"return"' not in heard:
                more = one.recv(4096)
                if not more:
                    return False
                heard += more
        except OSError:
            return False
        return True


def _last_words(child: Child) -> str:
    lines = [line for line in child.tail().splitlines() if "warning:" not in line]
    return " ".join(lines)[-600:] or f"it ended with status {child.returncode}"


class _Space:
    """PCI configuration space of a stopped machine, by 32-bit register."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def devices(self) -> list[Mapping[str, Any]]:
        """Each function that QEMU can see now, those behind numbered bridges too."""
        found: list[Mapping[str, Any]] = []
        waiting = [one for bus in self._monitor.execute("query-pci") for one in bus["devices"]]
        while waiting:
            found.append(waiting.pop(0))
            waiting += found[-1].get("pci_bridge", {}).get("devices", [])
        return found

    def read(self, device: Mapping[str, Any], register: int) -> int:
        self._select(device, register)
        answer = self._command("i /w 0xcfc")
        _, equals, value = answer.partition("=")
        if not equals:
            raise ToolFailed(tool="qemu-probe", reason=f"its answer to a read of a port was {answer.strip()!r}")
        return int(value, 16)

    def write(self, device: Mapping[str, Any], register: int, value: int) -> None:
        self._select(device, register)
        self._command(f"o /w 0xcfc {value:#x}")

    def _select(self, device: Mapping[str, Any], register: int) -> None:
        place = device["bus"] << 16 | device["slot"] << 11 | device["function"] << 8 | register
        self._command(f"o /w 0xcf8 {0x80000000 | place:#x}")

    def _command(self, line: str) -> str:
        return str(self._monitor.execute("human-monitor-command", command_line=line))


def _number_buses(space: _Space) -> list[Mapping[str, Any]]:
    """Give each bridge's bus a number, depth first, as firmware does; all devices, once there is no bridge without one.

    While its own bridges are numbered everything up to the last number is behind a bridge; then exactly what was given
    out. So no two ranges overlap: QEMU, like hardware, follows the first that fits."""
    last = max(one["bus"] for one in space.devices())
    open_bridges: list[tuple[Mapping[str, Any], int]] = []
    while True:
        devices = space.devices()
        inside = open_bridges[-1][1] if open_bridges else None
        bare = next((one for one in devices if _is_bare_bridge(one) and inside in (None, one["bus"])), None)
        if bare is None:
            if not open_bridges:
                return devices
            bridge, number = open_bridges.pop()
            _set_buses(space, bridge, number, last)
            continue
        last += 1
        if last > _MOST_BUSES:
            raise ToolFailed(tool="qemu-probe", reason=f"the machine has more than {_MOST_BUSES} PCI buses")
        _set_buses(space, bare, last, _MOST_BUSES)
        open_bridges.append((bare, last))


def _set_buses(space: _Space, bridge: Mapping[str, Any], secondary: int, subordinate: int) -> None:
    space.write(bridge, 0x18, subordinate << 16 | secondary << 8 | bridge["bus"])


def _is_bare_bridge(device: Mapping[str, Any]) -> bool:
    bridge = device.get("pci_bridge")
    return device["class_info"]["class"] == _BRIDGE and bridge is not None and not bridge["bus"]["secondary"]


def _functions(space: _Space, devices: Sequence[Mapping[str, Any]]) -> Iterator[Function]:
    for device in devices:
        ids, kind = space.read(device, 0x00), space.read(device, 0x08) >> 8
        subsystem = _subsystem(space, device)
        pci = Pci(ids & 0xFFFF, ids >> 16, subsystem & 0xFFFF, subsystem >> 16, kind >> 8, kind & 0xFF)
        slot = f"0000:{device['bus']:02x}:{device['slot']:02x}.{device['function']:x}"
        yield Function(slot, device.get("qdev_id", ""), pci)


def _subsystem(space: _Space, device: Mapping[str, Any]) -> int:
    """Device and vendor in one register, where the kernel looks: for a bridge that is a capability."""
    if space.read(device, 0x0C) >> 16 & 0x7F == 0:
        return space.read(device, 0x2C)
    place = space.read(device, 0x34) & 0xFC if space.read(device, 0x04) >> 16 & 0x10 else 0
    for _ in range(48):  # as many as the space can hold: a list in a circle ends
        if not place:
            break
        head = space.read(device, place)
        if head & 0xFF == 0x0D:
            return space.read(device, place + 4)
        place = head >> 8 & 0xFC
    return 0
