"""`rewind image verify`: a point is booted where it can harm nobody, and the evidence is kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.guests import clients
from tests.support.imagery import Imagery


@pytest.fixture(scope="module", params=["mbr"])
def imagery(request, tmp_path_factory):
    from tests.support import world

    images = world.images_folder("verify")
    with Imagery(images, clients.build(request.param)) as found:
        (found.home / "rewind.yaml").write_text("accelerator: tcg\n")
        yield found


def verified(imagery, instant, *words, code=0):
    lines = imagery.rewind("image", "verify", imagery.name, "--at", imagery.points[instant], *words, code=code)
    assert [line["type"] for line in lines] == ["image-verified", *(["error"] if code else [])], lines
    return lines[0]


def listed(imagery):
    """point → how `points` lists it."""
    return {one["id"]: one for one in imagery.rewind("points", imagery.name) if one["type"] == "point"}


@pytest.mark.timeout(300)
def test_a_point_is_proven_by_a_boot(imagery, tmp_path):
    """P6-27, P6-28: one kernel, the client's own; packages, users, services and /etc as in the point; the screen, the
    console and the report are kept; the point is `booted` from then on. The domain is gone: nobody asks for it."""
    found = verified(imagery, "second", "--memory", "768M", "--timeout", "9m")
    assert found["booted"] and found["reasons"] == [], found
    assert found["kernels"] == [imagery.client.kernel]
    assert (found["differences"], found["failed"]) == ([], []), found
    system, expected = found["system"], imagery.client.expected["second"]
    assert system["complete"] and system["host_name"] == expected["hostname"]
    assert system["machine_id"] == expected["machine_id"]
    assert "client.setting=43" in system["command_line"]
    assert "tcp 7070" in system["listening"], system
    assert int(system["packages"]) > 50
    assert listed(imagery)[imagery.points["second"]]["consistency"] == "booted"
    assert listed(imagery)[imagery.points["first"]]["consistency"] != "booted"
    (kept,) = imagery.rewind("image", "evidence", imagery.name, "--at", "latest", "--into", tmp_path / "evidence")
    files = {Path(path).name: Path(path) for path in kept["files"]}
    assert files["console.log"].read_bytes().count(b"Linux version") == 1
    assert files["screen.png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["evidence.json"].read_text())["booted"] is True
