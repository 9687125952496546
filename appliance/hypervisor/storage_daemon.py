"""The images of a domain that is shut off, opened by a `qemu-storage-daemon` of ours.

Its write lock keeps the domain from starting and every other QEMU tool away while we look. The whole backing chain is
open, persistent bitmaps go on recording, and a clean end stores them again.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from appliance.errors import ConnectError, DomainBusy, DomainLost, MonitorError, NotSupported
from appliance.hypervisor.base import Disk, Monitor, offline_node

__all__ = ["blockdev", "describe", "offline"]

_PROGRAM = "qemu-storage-daemon"


def describe(disk: Disk, domain: str) -> Disk:
    """The disk with size, persistence and refusal read from its image. Raises DomainBusy or NotSupported."""
    command = ["qemu-img", "info", "-U", "--output=json", "-f", disk.format, disk.source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotSupported(object=f"disk {disk.target} of {domain}", reason=done.stderr.strip().rpartition("\n")[2])
    info = json.loads(done.stdout)
    old = info.get("format-specific", {}).get("data", {}).get("compat") == "0.10"
    refusal = "its image is encrypted by QEMU" if info.get("encrypted") else disk.refusal
    size = -(-info["virtual-size"] // 512) * 512
    return replace(disk, size=size, persistent=disk.format == "qcow2" and not old, refusal=refusal)


def blockdev(disk: Disk, node: str) -> dict[str, Any]:
    """Options of `blockdev-add` for the disk's image with its whole chain."""
    driver = "host_device" if Path(disk.source).is_block_device() else "file"
    file = {"driver": driver, "filename": disk.source, "node-name": f"{node}-f"[:31]}
    return {"driver": disk.format, "node-name": node, "file": file, "discard": "unmap"}


@contextmanager
def offline(domain: str, disks: Sequence[Disk]) -> Iterator[Monitor]:
    """Start the daemon, open every disk under `offline_node(target)`, end it cleanly.

    Raises DomainBusy when somebody has an image open, NotSupported when there is no such program. After an error the
    daemon is gone and the images are as they were, but for what was written through it.
    """
    from appliance.hypervisor.qmp import Connection

    with tempfile.TemporaryDirectory(prefix="rewind-") as folder:
        path = Path(folder) / "qmp"
        process = _start(domain, path, Path(folder) / "log")
        try:
            monitor = _connect(process, path, domain)
            try:
                for disk in disks:
                    _open(monitor, disk, domain)
                yield monitor
            finally:
                # `quit` closes the images, which is what stores their bitmaps: it may take as long as it needs.
                with suppress(DomainBusy, DomainLost, MonitorError):
                    monitor.execute("quit")
                process.wait()
                if isinstance(monitor, Connection):
                    monitor.close()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _start(domain: str, path: Path, log: Path) -> subprocess.Popen[bytes]:
    # The image lock must not outlive us: with its parent gone a daemon that nobody talks to would keep the domain
    # from starting for ever.
    chardev = f"socket,id=m,path={path},server=on,wait=off"
    command = ["setpriv", "--pdeathsig", "TERM", _PROGRAM, "--chardev", chardev, "--monitor", "m"]
    try:
        # It warns about every job that writes to a server, which would land in the middle of our own output.
        with log.open("wb") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    except FileNotFoundError as error:
        reason = f"{_PROGRAM} or setpriv is not installed"
        raise NotSupported(object=domain, reason=reason, hint="apt install qemu-system-common util-linux") from error


def _connect(process: subprocess.Popen[bytes], path: Path, domain: str) -> Monitor:
    from appliance.hypervisor.qmp import Connection

    limit = time.monotonic() + 10
    while True:
        try:
            return Connection(path, domain, storage_daemon=True)
        except ConnectError:
            if process.poll() is not None or time.monotonic() > limit:
                raise
            time.sleep(0.02)


def _open(monitor: Monitor, disk: Disk, domain: str) -> None:
    try:
        monitor.execute("blockdev-add", **blockdev(disk, offline_node(disk.target)))
    except MonitorError as error:
        if "lock" in str(error):
            raise DomainBusy(domain=domain, reason=f"someone has {os.path.basename(disk.source)} open") from error
        raise
