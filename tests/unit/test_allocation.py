"""The bitmap of a raw file's allocated chunks, against QEMU's own reading of it and of the file."""

from __future__ import annotations

import json
import os
import random
import subprocess

import pytest

from appliance.capture import allocation
from appliance.units import CHUNK, GiB, TiB, chunks_of


def sparse_file(path, size, pieces):
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in pieces:
            file.seek(offset)
            file.write(b"x" * length)
    return path


def bitmap_of(image, size):
    """The set chunks, as QEMU's own NBD server tells them."""
    socket = image.with_suffix(".sock")
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-k", socket, "-B", allocation.BITMAP, "-f", "qcow2", image])
    try:
        uri = f"nbd+unix:///?socket={socket}"
        subprocess.run(["nbdinfo", "--size", uri], check=False, capture_output=True)
        command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{allocation.BITMAP}", uri]
        for _ in range(50):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
            server.poll()
            subprocess.run(["sleep", "0.1"], check=True)
        found = set()
        for entry in json.loads(done.stdout):
            if entry["type"] & 1:
                found.update(range(entry["offset"] // CHUNK, chunks_of(entry["offset"] + entry["length"])))
        return found
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("size", [CHUNK, 40 * CHUNK + 512, 70 * GiB, 2 * TiB + 4096])
def test_qemu_reads_the_bitmap(tmp_path, size):
    chance = random.Random(size)
    pieces = [(chance.randrange(size - 512), chance.choice([1, 4096, 3 * CHUNK, 40 * CHUNK])) for _ in range(40)]
    pieces = [(offset, min(length, size - offset)) for offset, length in [*pieces, (size - 512, 512)]]
    file = sparse_file(tmp_path / "disk", size, pieces)
    image = tmp_path / "map.qcow2"
    runs = list(allocation.allocated(file))
    allocation.write_bitmap(image, size, runs)
    told = {index for first, stop in runs for index in range(first, stop)}
    assert {index for offset, length in pieces for index in range(offset // CHUNK, chunks_of(offset + length))} <= told
    assert bitmap_of(image, size) == told
    assert image.stat().st_size < 8 << 20


def test_nothing_and_all(tmp_path):
    empty = sparse_file(tmp_path / "empty", 8 * TiB, [])
    assert list(allocation.allocated(empty)) == []
    full = sparse_file(tmp_path / "full", 10 * CHUNK, [(0, 10 * CHUNK)])
    os.sync()
    assert {i for first, stop in allocation.allocated(full) for i in range(first, stop)} == set(range(10))
