"""The qemu-storage-daemon of a streamed session: what a machine reads and writes over the network.

    view ◄─ DISK.qcow2 ◄─ export DISK-BOOT       for the one boot that is served (claim.py)
            control    ◄─ export control-BOOT
            claim      ◄─ export claim           for every machine with the session's certificate

A boot is granted by ending the daemon and starting it with the exports of that boot: whoever was served before is cut
off by it, with all that was under way, and finds no export of its name again.

The exports are written through: the machine believes a write that was answered, and a daemon that is killed must not
forget it with its own cache.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ToolFailed
from appliance.process import Child
from appliance.restore.claim import CLAIM
from appliance.restore.control import CONTROL

__all__ = ["Place", "StorageDaemon"]

_AGAIN = 2.0
_LOOK = 5.0
# A daemon that greets nobody for so long hangs.
_SILENT = 30.0
# Reads of the view wait for so long while it is brought back; then the machine is told of an error, and tries again.
_RECONNECT = 300
_GREETING = b"NBDMAGICIHAVEOPT"
_GOODBYE = b"\0\0\0\1IHAVEOPT\0\0\0\2\0\0\0\0"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where it listens, and whether it speaks with nobody who has no certificate."""

    host: str
    port: int
    tls: bool


class StorageDaemon:
    """One session's. Started anew when it has died or hangs; the machine waits meanwhile. It dies with us: nobody would
    look after it. `ready`: it has greeted since we look after it; `answers`: it did so when it was last asked."""

    def __init__(self, name: str, place: Place, disks: Iterable[str], folder: Path, view: Path, log: Path) -> None:
        self._name, self._place, self._disks = name, place, tuple(disks)
        self._folder, self._view, self._log = folder, view, log
        self._child: Child | None = None
        self._boot = ""
        self._next_start = self._next_look = self._seen = 0.0
        self.ready = self.answers = False
        self.error = ""

    def tend(self, boot: str) -> None:
        """Have `boot` served, and nobody where it is empty. To be called again and again."""
        now = time.monotonic()
        if self._child is not None and not self._child.alive():
            last = self._child.tail().splitlines()[-1:] or [f"exit status {self._child.returncode}"]
            self.error = f"the storage daemon has ended: {last[0]}"
            _log.warning("%s: %s", self._name, self.error)
            self.stop()
        if self._child is not None and boot != self._boot:
            self.stop()
            self._next_start = now
        if self._child is None and now >= self._next_start:
            self._next_start = now + _AGAIN
            self._start(boot, now)
        if self._child is not None and now >= self._next_look:
            self._look(now)

    def _start(self, boot: str, now: float) -> None:
        try:
            self._child = Child(self._command(boot), name="qemu-storage-daemon", log=self._log)
        except (ToolFailed, OSError) as error:  # it may be installed anew just now, or there is no room for its log
            self.error = str(error)
            _log.warning("%s: %s", self._name, self.error)
            return
        self._boot, self._seen, self._next_look = boot, now, 0.0

    def _look(self, now: float) -> None:
        self.answers = _greets(self._place)
        self.ready |= self.answers
        self._next_look = now + (_LOOK if self.answers else 0.1)
        if self.answers:
            self._seen, self.error = now, ""
        elif now - self._seen > _SILENT:
            _log.warning("%s: the storage daemon answers nobody: another takes its place", self._name)
            self.stop()

    def stop(self) -> None:
        """May be repeated."""
        child, self._child, self.answers = self._child, None, False
        if child is not None:
            child.stop()

    def _command(self, boot: str) -> list[str | Path]:
        server = f"addr.type=inet,addr.host={self._place.host},addr.port={self._place.port}"
        words: list[str | Path] = ["qemu-storage-daemon"]
        if self._place.tls:
            place = str(self._folder / "tls")
            tls = {"qom-type": "tls-creds-x509", "id": "tls", "dir": place, "endpoint": "server", "verify-peer": True}
            words += ["--object", json.dumps(tls)]
            server += ",tls-creds=tls"
        words += ["--nbd-server", server, *self._file(CLAIM, CLAIM)]
        if boot:
            words += self._file(CONTROL, f"{CONTROL}-{boot}")
            for disk in self._disks:
                words += self._disk(disk, f"{disk}-{boot}")
        return words

    def _file(self, name: str, export: str) -> list[str]:
        node = {"driver": "file", "node-name": name, "filename": str(self._folder / name)}
        return ["--blockdev", json.dumps(node), *_export(export, name)]

    def _disk(self, disk: str, export: str) -> list[str]:
        view = {
            "driver": "nbd", "node-name": f"view-{disk}", "read-only": True, "reconnect-delay": _RECONNECT,
            "server": {"type": "unix", "path": str(self._view)}, "export": disk,
        }  # fmt: skip
        overlay = {
            "driver": "qcow2", "node-name": f"disk-{disk}", "backing": f"view-{disk}",
            "file": {"driver": "file", "filename": str(self._folder / f"{disk}.qcow2")},
        }  # fmt: skip
        return ["--blockdev", json.dumps(view), "--blockdev", json.dumps(overlay), *_export(export, f"disk-{disk}")]


def _export(name: str, node: str) -> list[str]:
    return ["--export", f"type=nbd,id={node},name={name},node-name={node},writable=on,writethrough=on"]


def _greets(place: Place) -> bool:
    host = "127.0.0.1" if place.host == "0.0.0.0" else place.host
    try:
        with socket.create_connection((host, place.port), timeout=2.0) as client:
            greeted = client.recv(len(_GREETING) + 2).startswith(_GREETING)
            client.sendall(_GOODBYE)  # one that just leaves is an error in the daemon's log
            return greeted
    except OSError:
        return False
