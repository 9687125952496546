"""Putting the devices of a stopped guest on the chains of a revert, and back; chain.py has the picture.

    switch        all of them, or none
    unswitch      back, while nothing was committed
    hole          in between, where one chain takes the place of another: D may have one writer only

Graph changes are made while the guest is stopped: adding nodes under a disk with an active iothread kills QEMU.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from appliance.errors import DomainBusy, MonitorError
from appliance.hypervisor.base import Monitor
from appliance.hypervisor.graph import nodes, seat
from appliance.hypervisor.graph.chain import Chain, drive, names

__all__ = [
    "add_nodes", "drop", "drop_patch", "enter_hole", "leave_hole", "power_cycle", "stopped", "switch", "unswitch",
]  # fmt: skip

# libvirt numbers its own descriptor sets from 0.
_FIRST_FDSET = 7100


# --- the pause ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(monitor: Monitor, note: Callable[[bool], None] = lambda _stopped: None) -> Iterator[bool]:
    """Stop the guest; yields whether it ran. It goes on afterwards if it ran before, also after an error. `note` is
    told before a running guest is stopped and after it goes on, so that it can be put on record who has stopped it."""
    running = bool(monitor.execute("query-status")["running"])
    if running:
        note(True)
        monitor.execute("stop")
    try:
        yield running
    finally:
        if running:
            monitor.execute("cont")
            note(False)


def power_cycle(monitor: Monitor, timeout: float = 10.0) -> None:
    """Reset the stopped machine and wait until it has happened: a guest that ran on for an instant with its old memory
    would write stale blocks onto the new disk. It stays stopped."""
    monitor.execute("system_reset")
    deadline = time.monotonic() + timeout
    while monitor.execute("query-status")["status"] != "prelaunch":
        if time.monotonic() > deadline:
            raise DomainBusy(domain=monitor.domain, reason=f"the machine was not reset within {timeout:g} s")
        time.sleep(0.002)


# --- on the chain and back ------------------------------------------------------------------------------------------


def switch(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Put every disk's device onto its O, which reads as the wanted instant. The guest must be stopped.

    Raises MonitorError; every device is on its own D again then, and nothing of ours is left.
    """
    try:
        for chain in chains:
            add_nodes(monitor, chain)
        for chain in chains:
            _set_drive(monitor, chain, chain.o)
    except BaseException:  # also Ctrl-C: a guest goes on with all of its disks as they were, or with none
        unswitch(monitor, chains)
        raise


def unswitch(monitor: Monitor, chains: Sequence[Chain]) -> None:
    """Put every device back onto D and take our nodes away: allowed while nothing was committed and the guest has not
    run on O. Raises the first error, after everything has been tried."""
    first: MonitorError | None = None
    for chain in chains:
        try:
            if drive(monitor, chain) in (chain.o, chain.hole):
                _through_hole(monitor, chain)
            drop(monitor, chain)
        except MonitorError as error:
            first = first or error
    if first is not None:
        raise first


def _set_drive(monitor: Monitor, chain: Chain, node: str) -> None:
    now = drive(monitor, chain)
    if now == node:
        return
    if now not in (chain.node, chain.hole):
        raise DomainBusy(
            domain=monitor.domain, reason=f"disk {chain.target} is on node {now!r}, somebody is working on it"
        )
    seat.attach(monitor, chain.device, node)


def _through_hole(monitor: Monitor, chain: Chain) -> None:
    # D as O's backing may not be written by others, so O has to go before the device can be on D again.
    size = next(
        node["image"]["virtual-size"]
        for node in nodes.all_nodes(monitor)
        if node["node-name"] == chain.node
    )
    enter_hole(monitor, chain, size)
    leave_hole(monitor, chain, chain.node)


def enter_hole(monitor: Monitor, chain: Chain, size: int) -> None:
    """Put the device onto a hole of the disk's size and take our chain away. The guest must be stopped, and must not
    go on before `leave_hole`: its writes would be lost. May be repeated."""
    if chain.hole not in names(monitor):
        monitor.execute("blockdev-add", driver="null-co", node_name=chain.hole, size=size, read_zeroes=True)
    if drive(monitor, chain) != chain.hole:
        seat.attach(monitor, chain.device, chain.hole)
    drop(monitor, chain, keep_hole=True)


def leave_hole(monitor: Monitor, chain: Chain, node: str) -> None:
    """Put the device onto `node` instead of the hole. May be repeated."""
    _set_drive(monitor, chain, node)
    if chain.hole in names(monitor):
        monitor.execute("blockdev-del", node_name=chain.hole)


def add_nodes(monitor: Monitor, chain: Chain) -> None:
    """Add view, P and O over D, as far as they are missing. Raises MonitorError."""
    there = names(monitor)
    if chain.v not in there:
        monitor.execute(
            "blockdev-add", driver="nbd", node_name=chain.v, read_only=True, export=chain.export,
            server={"type": "unix", "path": os.fspath(chain.view)}, reconnect_delay=chain.reconnect,
        )  # fmt: skip
    if chain.p not in there:
        monitor.execute(
            "blockdev-add", driver="qcow2", node_name=chain.p, read_only=True, data_file=chain.v, backing=chain.node,
            file=_file(monitor, chain.patch, chain.number * 2, writable=False),
        )  # fmt: skip
    if chain.o not in there:
        monitor.execute(
            "blockdev-add", driver="qcow2", node_name=chain.o, discard="unmap", backing=chain.p,
            file=_file(monitor, chain.overlay, chain.number * 2 + 1, writable=True),
        )  # fmt: skip


def _file(monitor: Monitor, path: Path, number: int, writable: bool) -> dict[str, Any]:
    """The file as a block node. It goes to QEMU as a descriptor: QEMU runs as another user who may not open it. A
    storage daemon of ours takes no descriptors and needs none."""
    node = {"driver": "file", "read-only": not writable, "discard": "unmap" if writable else "ignore"}
    if monitor.storage_daemon:
        return {**node, "filename": os.fspath(path)}
    fdset = _FIRST_FDSET + number
    _forget_fds(monitor, fdset)
    handle = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        monitor.execute_with_fd("add-fd", handle, fdset_id=fdset)
    finally:
        # The image lock belongs to the open file description: our copy would keep it beyond QEMU's end.
        os.close(handle)
    return {**node, "filename": f"/dev/fdset/{fdset}"}


def _forget_fds(monitor: Monitor, fdset: int) -> None:
    with contextlib.suppress(MonitorError):  # there is none
        monitor.execute("remove-fd", fdset_id=fdset)


def drop(monitor: Monitor, chain: Chain, keep_hole: bool = False) -> None:
    """Take away our nodes: O, P, view, in that order. Raises MonitorError if one is in use."""
    there = names(monitor)
    for node in (chain.o, chain.p, chain.v, *(() if keep_hole else (chain.hole,))):
        if node in there:
            monitor.execute("blockdev-del", node_name=node)
    for number in (0, 1):
        _forget_fds(monitor, _FIRST_FDSET + chain.number * 2 + number)


def drop_patch(monitor: Monitor, chain: Chain) -> None:
    """Take away P and the view, once nothing reads them."""
    there = names(monitor)
    for node in (chain.p, chain.v):
        if node in there:
            monitor.execute("blockdev-del", node_name=node)
    _forget_fds(monitor, _FIRST_FDSET + chain.number * 2)
