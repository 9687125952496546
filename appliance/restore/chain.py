"""The chains of a revert, overlay → patch → disk, as its intent has them: where their files are, and an empty overlay.

What they are in a block graph is hypervisor/graph/chain.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from appliance.config import Home, Settings
from appliance.hypervisor.base import offline_node
from appliance.hypervisor.graph.chain import Chain
from appliance.restore import keeper
from appliance.restore.intent import DiskIntent, Intent

__all__ = ["chains_of", "make_overlay"]


def chains_of(home: Home, settings: Settings, intent: Intent, *, offline: bool) -> list[Chain]:
    """The disks' parts in the graph, in the domain's QEMU or in a storage daemon."""
    return [_chain_of(home, settings, intent, disk, n, offline) for n, disk in enumerate(intent.disks)]


def _chain_of(home: Home, settings: Settings, intent: Intent, disk: DiskIntent, number: int, offline: bool) -> Chain:
    folder = home.revert(intent.uuid)
    return Chain(
        target=disk.target,
        node=offline_node(disk.target) if offline else disk.node,
        device="" if offline else disk.device,
        source=disk.source,
        patch=folder / disk.patch,
        overlay=folder / disk.overlay,
        view=keeper.socket_path(home, intent.uuid),
        export=disk.target,
        reconnect=_reconnect_delay(settings),
        number=number,
    )


def _reconnect_delay(settings: Settings) -> int:
    """Seconds for which QEMU lets a read wait for a view that is gone. The keeper brings a view back within
    `view_timeout`; the rest is for a keeper that was killed as well, until somebody resumes. The guest sees an I/O
    error only after that, and the longer it is, the longer a `stop` may hang in QEMU when nobody brings it back."""
    return max(60, int(settings.view_timeout * 12))


def make_overlay(path: Path, size: int) -> None:
    """A new empty overlay, durable, replacing what was there. Extended L2 lets a small guest write stay small."""
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", os.fspath(path), str(size)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    path.chmod(0o600)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
