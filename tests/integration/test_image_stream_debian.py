"""I4: a whole Debian streams to hardware it has never seen, by the program itself; figures on the standard output.

    ./dev soak -s tests/integration/test_image_stream_debian.py
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time

import pytest

from tests.guests import clients
from tests.support.imageproof import arguments, compare, expected, watch
from tests.support.imagery import Imagery
from tests.support.limits import limit
from tests.support.streamed import free_port
from tests.support.targets import TARGETS, Medium

DISK_BYTES = clients.DISK_BYTES
TARGET = TARGETS["nvme-vmxnet3-uefi"]


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    from tests.support import world

    with Imagery(world.images_folder("stream"), clients.build("mbr")) as found:
        found.add_target(TARGET)
        yield found


class Running:
    """The machine, with a network that reaches this host. Leaving the context is a power cut."""

    def __init__(self, disk, medium, folder):
        folder.mkdir()
        self.folder, self.begun = folder, time.monotonic()
        words = [str(word) for word in arguments(TARGET, disk, medium, folder)]
        words = [word.replace("restrict=on", "restrict=off").replace("format=qcow2", "format=raw") for word in words]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(30)

    def proof(self, seconds=300):
        return watch(TARGET.name, self.folder, seconds)


@contextlib.contextmanager
def served(imagery, folder, *options):
    """A session, its medium, and a function for its line of `rewind image list`."""
    port = free_port()
    words = ("image", "serve", imagery.name, "--at", imagery.points["second"], "--target", TARGET.name)
    place = ("--listen", f"127.0.0.1:{port}", "--reach", f"10.0.2.2:{port}", "--address", "10.0.2.16/24")
    rest = ("--name", "rack", "--into", folder, "--media", "esp", "--background", *options)
    made = imagery.rewind(*words, *place, *rest)
    line = made[0]
    assert line["type"] == "image-served" and line["secure"]
    (file,) = [one for one in line["files"] if one["name"] == "esp"]
    try:
        yield Medium("esp", file["path"]), lambda: imagery.rewind("image", "list")[0]
    finally:
        imagery.rewind("image", "forget", "rack", "--force")


def empty_disk(path):
    with path.open("wb") as file:
        file.truncate(DISK_BYTES + (16 << 20))
    return path


def is_the_client(imagery, proof, boots):
    """One kernel, the client's own, and everything as in the point but for the number of boots."""
    assert proof.up, proof
    wanted = expected(imagery.client, "second", efi=True) | {"boots": boots}
    assert compare(proof, wanted) == [], proof


def wait_until(state, phase, seconds):
    deadline = time.monotonic() + limit(seconds)
    while (now := state())["phase"] != phase:
        assert time.monotonic() < deadline and not now["error"], now
        time.sleep(2)
    return now


@pytest.mark.soak
@pytest.mark.timeout(4000)
def test_stream(imagery, tmp_path):
    """P6-13, P6-14, I4: up from the network, cut off while its disk fills, up again from the session, alone in the end.
    Its own network set-up does not cut its root; three boots are three lines of its own log."""
    disk = empty_disk(tmp_path / "local.raw")
    with served(imagery, tmp_path / "image") as (medium, state):
        with Running(disk, medium, tmp_path / "first") as machine:
            proof = machine.proof()
            is_the_client(imagery, proof, 1)
            addresses = proof.document["interfaces"]["ens3"]["addresses"]
            assert "10.0.2.16/32" in addresses and len(addresses) > 1, addresses
            now = wait_until(state, "pulling", 120)
            figures = {
                "seconds": round(proof.seconds, 1), "service": now["service_seconds"],
                "read_mib": round(now["service_read_bytes"] / 2**20, 1), "disk_mib": DISK_BYTES >> 20,
            }  # fmt: skip
            print(json.dumps({"stream": figures}))
            time.sleep(15)  # the client's own journal has its boot by now
        with Running(disk, medium, tmp_path / "second") as machine:
            is_the_client(imagery, machine.proof(), 2)
            begun = time.monotonic()
            now = wait_until(state, "done", 1500)
            print(json.dumps({"filled": round(time.monotonic() - begun, 1), "written_mib": now["written_bytes"] >> 20}))
            assert now["boots"] == 2 and now["left"] == []
            time.sleep(30)
    with Running(disk, medium, tmp_path / "third") as machine:
        proof = machine.proof()
        is_the_client(imagery, proof, 3)
        assert "starting from them alone" in proof.console
        print(json.dumps({"alone": round(proof.seconds, 1)}))


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_copy_first(imagery, tmp_path):
    """P6-15, I4: the same client when its disk is written first."""
    disk = empty_disk(tmp_path / "local.raw")
    with served(imagery, tmp_path / "image", "--copy-first", "--blank") as (medium, state):
        with Running(disk, medium, tmp_path / "first") as machine:
            proof = machine.proof(900)
            is_the_client(imagery, proof, 1)
            now = state()
            assert now["phase"] == "done"
            print(json.dumps({"copy-first": round(proof.seconds, 1), "read_mib": now["read_bytes"] >> 20}))
