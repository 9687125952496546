"""I4: a whole Debian streams to hardware it has never seen, by the program itself; figures on the standard output.

    ./dev soak -s tests/integration/test_image_stream_debian.py
"""

from __future__ import annotations

import json
import time

import pytest

from tests.guests import clients
from tests.support.imageproof import compare, expected
from tests.support.imagery import Imagery
from tests.support.rack import DISK_BYTES, TARGET, Running, empty_disk, served, wait_until


@pytest.fixture(scope="module")
def imagery(tmp_path_factory):
    from tests.support import world

    with Imagery(world.images_folder("stream"), clients.build("mbr")) as found:
        found.add_target(TARGET)
        yield found


def is_the_client(imagery, proof, boots):
    """One kernel, the client's own, and everything as in the point but for the number of boots."""
    assert proof.up, proof
    wanted = expected(imagery.client, "second", efi=True) | {"boots": boots}
    assert compare(proof, wanted) == [], proof


@pytest.mark.soak
@pytest.mark.timeout(4000)
def test_stream(imagery, tmp_path):
    """P6-13, P6-14, I4: up from the network; its own network set-up does not cut its root. Its disk fills to the end
    while it runs, and then it is alone: the disk starts it without anybody, with the ledger that it wrote while it
    streamed."""
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
            (line,) = [one for one in imagery.rewind("status") if one["type"] == "image-streamed"]
            assert line["phase"] == "pulling" and line["answers"] and line["left_bytes"] > 0
            before = machine.until_service()
            for number in range(20):
                assert machine.until_service() > before + number
            begun = time.monotonic()
            now = wait_until(state, "done", 1500)
            print(json.dumps({"filled": round(time.monotonic() - begun, 1), "written_mib": now["written_bytes"] >> 20}))
            assert now["boots"] == 1 and now["left"] == []
            machine.wait_for("the server is not needed any more", 120)
            time.sleep(35)  # the client keeps what it writes for half a minute before it is on its disk
            lines = machine.until_service()
    with Running(disk, medium, tmp_path / "second") as machine:
        proof = machine.proof()
        is_the_client(imagery, proof, 2)
        assert "starting from them alone" in proof.console
        assert machine.until_service() >= lines > 20
        print(json.dumps({"alone": round(proof.seconds, 1)}))


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_power_cut(imagery, tmp_path):
    """P6-14: cut off while its disk fills, and up again from the session with the log of the boot before."""
    disk = empty_disk(tmp_path / "local.raw")
    with served(imagery, tmp_path / "image") as (medium, state):
        with Running(disk, medium, tmp_path / "first") as machine:
            is_the_client(imagery, machine.proof(), 1)
            wait_until(state, "pulling", 120)
            time.sleep(15)  # the client's own journal has its boot by now
        with Running(disk, medium, tmp_path / "second") as machine:
            is_the_client(imagery, machine.proof(), 2)
            assert state()["boots"] == 2


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
