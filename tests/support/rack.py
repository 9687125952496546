"""A machine that a real Debian streams to: an NVMe disk, a card that reaches this host, firmware that knows USB.

    with served(imagery, folder) as (medium, state), Running(disk, medium, folder / "first") as machine:
        machine.until_service()                 its ledger answers, and has a line more
        proof = machine.proof()
        state()                                 its line of `rewind image list`
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.guests import clients
from tests.support.imageproof import Proof, arguments, watch
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.streamed import free_port
from tests.support.targets import TARGETS, Medium

__all__ = ["DISK_BYTES", "NAME", "TARGET", "Running", "empty_disk", "served", "wait_until"]

DISK_BYTES = clients.DISK_BYTES
NAME = "rack"
TARGET = TARGETS["nvme-vmxnet3-uefi"]


class Running:
    """The machine. `begun` is when its power was switched on; leaving the context is a power cut."""

    def __init__(self, disk: Path, medium: Medium, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.begun = folder, time.monotonic()
        words = [str(word) for word in arguments(TARGET, disk, medium, folder)]
        self._port = free_port()
        net = f"restrict=off,hostfwd=tcp:127.0.0.1:{self._port}-:7070"
        words = [word.replace("restrict=on", net).replace("format=qcow2", "format=raw") for word in words]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)

    @property
    def console(self) -> str:
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def lines(self) -> int | None:
        """How many its ledger had when it was asked, which adds one; None when it does not answer."""
        with contextlib.suppress(OSError, ValueError):
            with socket.create_connection(("127.0.0.1", self._port), timeout=2) as client:
                client.settimeout(5)
                return int(client.makefile().readline())
        return None

    def until_service(self, seconds: float = 300) -> int:
        """Until its ledger answers: how many lines it had. Raises AssertionError when it does not in time."""
        deadline = time.monotonic() + limit(seconds)
        while (found := self.lines()) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.console[-3000:]
            time.sleep(0.3)
        return found

    def proof(self, seconds: float = 300) -> Proof:
        """What it says of itself once it is up; `seconds` of the proof are from its power on."""
        found = watch(TARGET.name, self.folder, seconds)
        return replace(found, seconds=time.monotonic() - self.begun)

    def wait_for(self, words: str, seconds: float) -> None:
        """Until the console has these words. Raises AssertionError when it does not in time."""
        deadline = time.monotonic() + limit(seconds)
        while words not in self.console:
            assert self.process.poll() is None and time.monotonic() < deadline, self.console[-3000:]
            time.sleep(0.2)


@contextlib.contextmanager
def served(imagery: Imagery, folder: Path, *options: str, reach: Any = None) -> Iterator[tuple[Medium, Any]]:
    """A session, its medium, and a function for its line of `rewind image list`. `reach` gives the port of this host
    by which the machine gets to the port that it is told."""
    port = free_port()
    words = ("image", "serve", imagery.name, "--at", imagery.points["second"], "--target", TARGET.name)
    to = port if reach is None else reach(port)
    place = ("--listen", f"127.0.0.1:{port}", "--reach", f"10.0.2.2:{to}", "--address", "10.0.2.16/24")
    rest = ("--name", NAME, "--into", folder, "--media", "esp", "--background", *options)
    line = imagery.rewind(*words, *place, *rest)[0]
    assert line["type"] == "image-served" and line["secure"]
    (file,) = [one for one in line["files"] if one["name"] == "esp"]
    try:
        yield Medium("esp", Path(file["path"])), lambda: imagery.rewind("image", "list")[0]
    finally:
        imagery.rewind("image", "forget", NAME, "--force")


def empty_disk(path: Path) -> Path:
    """With room behind the client's last sector, so that the medium finds the mark of a session that is over."""
    with path.open("wb") as file:
        file.truncate(DISK_BYTES + (16 << 20))
    return path


def wait_until(state: Any, phase: str, seconds: float) -> dict[str, Any]:
    """Its line, once it has that phase. Raises AssertionError for an error of it, and when it is not in time."""
    deadline = time.monotonic() + limit(seconds)
    while (now := state())["phase"] != phase:
        assert time.monotonic() < deadline and not now["error"], now
        time.sleep(2)
    return dict(now)
