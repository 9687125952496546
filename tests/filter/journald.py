"""The journal plugin in a real nbdkit, for tests: started, killed, started again on the same spool."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import nbd

from appliance.journal import Control, Journal, Kind
from appliance.journal.build import build

MiB = 1 << 20
FUA = nbd.CMD_FLAG_FUA


class Journald:
    def __init__(self, folder: Path, disks: dict[str, int], *, variant: str = "", env=(), **parameters):
        self.folder = folder
        self.spool = folder / "spool"
        self.socket = folder / "tap.sock"
        self.control_path = folder / "tap.ctl"
        self.disks = disks
        self.variant = variant
        self.env = {**os.environ, **dict(env)}
        self.parameters = parameters
        self.process = None

    def argv(self):
        words = [f"{key.replace('_', '-')}={value}" for key, value in self.parameters.items()]
        return [
            "nbdkit", "--foreground", f"--unix={self.socket}", "--threads=16", str(build(self.variant)),
            f"spool={self.spool}", f"control={self.control_path}",
            *(f"disk={name}:{size}" for name, size in self.disks.items()), *words,
        ]  # fmt: skip

    def start(self):
        self.socket.unlink(missing_ok=True)
        self.log = (self.folder / "nbdkit.log").open("ab")
        self.process = subprocess.Popen(self.argv(), stdout=self.log, stderr=self.log, env=self.env)
        deadline = time.monotonic() + 15
        while not self._greets():
            assert self.process.poll() is None and time.monotonic() < deadline, self.words()
            time.sleep(0.01)
        return self

    def _greets(self):
        # The control socket is there before the fork, the NBD socket after it; both must answer.
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(str(self.socket))
                return client.recv(8) == b"NBDMAGIC"
        except OSError:
            return False

    def words(self):
        return (self.folder / "nbdkit.log").read_text()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0, self.words()

    @property
    def control(self):
        return Control(self.control_path)

    def disk(self, name):
        handle = nbd.NBD()
        handle.set_export_name(name)
        handle.connect_unix(str(self.socket))
        return handle

    def journal(self):
        return Journal(self.spool)

    def ask(self, *lines: bytes) -> list[dict]:
        """Each line is sent and its answer awaited, on one connection."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.control_path))
            with client.makefile("rb") as answers:
                found = []
                for line in lines:
                    client.sendall(line + b"\n")
                    found.append(json.loads(answers.readline()))
                return found


def replay(journal: Journal, sizes: dict[str, int], upto: int | None = None) -> dict[str, bytearray]:
    """Every disk as of a number, by the records alone, over zeroes."""
    images = {name: bytearray(size) for name, size in sizes.items()}
    for record in journal.records(1, None if upto is None else upto + 1):
        if record.kind == Kind.WRITE:
            images[record.disk][record.offset : record.offset + record.length] = record.data
        elif record.kind in (Kind.ZERO, Kind.TRIM):
            images[record.disk][record.offset : record.offset + record.length] = bytes(record.length)
    return images


def scribble(disk, image: bytearray, dice: random.Random, requests: int) -> None:
    """Random requests of all kinds and lengths on one disk, kept in the image too."""
    for _ in range(requests):
        length = dice.choice([1, 512, 4096, 4096, 4096, 65536, 100_000])
        offset = dice.randrange(len(image) - length)
        if dice.random() < 0.8:
            offset -= offset % 512
        kind = dice.random()
        if kind < 0.8:
            data = dice.randbytes(length)
            disk.pwrite(data, offset, FUA if kind < 0.02 else 0)
            image[offset : offset + length] = data
        else:
            (disk.zero if kind < 0.9 else disk.trim)(length, offset)
            image[offset : offset + length] = bytes(length)
