"""How long a guest of libvirt stands still while its disks are tapped: one disk and two, under writes."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from appliance.hypervisor import connect
from appliance.hypervisor.graph import tap
from appliance.nbdkit import Server
from tests.bench.rows import say
from tests.support import libvirt, world
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

__all__ = ["pauses"]

_SIZE = 64 << 20


def pauses(times: int) -> dict[str, Any]:
    """Seconds by number of disks."""
    libvirt.start()
    found: dict[str, Any] = {}
    for count in (1, 2):
        say(f"pause: {count} disks, {times} times")
        took = sorted(_attach(count, times))
        found[f"{count}_disks"] = {
            "median_seconds": round(statistics.median(took), 4), "lowest": round(took[0], 4),
            "highest": round(took[-1], 4),
        }  # fmt: skip
    return found


def _attach(count: int, times: int) -> list[float]:
    folder = world.images_folder("tap")
    disks = [TinyDisk(make_disk(folder / f"{number}.qcow2", _SIZE)) for number in range(count)]
    with (
        tempfile.TemporaryDirectory(prefix="rewind-tap-") as run,
        LibvirtGuest(folder, disks, name=f"tap{count}") as guest,
        Server(Path("null"), Path(run) / "sock", [("size", str(_SIZE))], threads=16) as sink,
    ):
        os.chmod(run, 0o711)
        guest.boot()
        guest.ask("start 100")
        domain = connect(guest.uri).domain(guest.name)
        process = domain.process()
        os.chown(sink.socket, process.uid, process.gid)
        found = []
        for _ in range(times):
            found.append(tap.attach(domain.monitor(), domain.disks(), sink.socket).pause_seconds)
            tap.detach(domain.monitor(), domain.disks())
        return found
