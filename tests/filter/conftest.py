"""A repository in a folder and helpers around the two nbdkit plugins."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from appliance.capture.intake import Intake
from appliance.restore.export import ViewServer
from appliance.store import Key, Repository, RepositorySpec, open_backend
from appliance.units import CHUNK


class Shop:
    """One encrypted repository, one run folder, and the servers that a test started."""

    def __init__(self, folder: Path, url: str | None = None):
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        self.log = folder / "nbdkit.log"
        self.url = url or str(folder / "repository")
        key = Key.generate()
        key.save(folder / "key")
        Repository.create(open_backend(self.url), cache=folder / "cache", key=key).close()
        self.spec = RepositorySpec(self.url, folder / "cache", folder / "key")
        self.started = []

    def intake(self, **disks) -> Intake:
        intake = Intake(self.run, self.spec, disks, log=self.log)
        intake.start()
        self.started.append(intake)
        return intake

    def view(self, name="view", **options) -> ViewServer:
        exports = options.pop("exports")
        view = ViewServer(self.run, self.spec, exports, socket=self.run / f"{name}.sock", log=self.log, **options)
        view.start()
        self.started.append(view)
        return view

    def maps(self, intake: Intake, **disks):
        """The new map of each disk, from what the intake found."""
        with self.spec.open() as repo, repo.writer() as writer:
            return {
                name: repo.write_map(base, size, intake.changes(name), writer) for name, (size, base) in disks.items()
            }

    def taken(self, **images: bytes):
        """Maps of these contents, taken through an intake of their own."""
        disks = {name: (len(image), None) for name, image in images.items()}
        intake = self.intake(**disks)
        from appliance import nbd

        for name, image in images.items():
            with nbd.connect(intake.socket, name) as disk:
                for index in range(-(-len(image) // CHUNK)):
                    piece = image[index * CHUNK : (index + 1) * CHUNK]
                    if any(piece):
                        disk.pwrite(piece, index * CHUNK)
                disk.flush()
        intake.stop()
        return self.maps(intake, **disks)

    def end(self):
        for server in self.started:
            server.kill()


@pytest.fixture
def shop(tmp_path):
    shop = Shop(tmp_path)
    yield shop
    shop.end()


def uri(socket: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={socket}"


def image(size: int, seed: int = 1, filled: float = 0.5) -> bytearray:
    """A disk in which some chunks are zero, some repeat, the others are random or text."""
    dice = random.Random(seed)
    disk = bytearray(size)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        if dice.random() < filled:
            kind = dice.random()
            if kind < 0.5:
                disk[start : start + length] = dice.randbytes(length)
            elif kind < 0.8:
                disk[start : start + length] = (b"%d some text\n" % start * CHUNK)[:length]
            else:
                disk[start : start + length] = (b"the same again\n" * CHUNK)[:length]
    return disk
