"""A kernel for clouds on hardware that it has no driver for: refused, until it is given one of its own release."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guests import clients, drivers
from tests.support import world
from tests.support.imageproof import boot, compare, expected
from tests.support.imagery import Imagery
from tests.support.targets import TARGETS, Medium

MEGASAS, RTL8139 = "pci:v00001000d00000060", "pci:v000010ECd00008139"


@pytest.fixture
def imagery(libvirt_uri):
    images = world.images_folder("cloud")
    try:
        with Imagery(images, clients.build("cloud")) as found:
            yield found
    finally:
        shutil.rmtree(images, ignore_errors=True)


def kept(home: Path) -> dict[str, int]:
    """All that a home keeps, and not what it has to make its work faster or to tell of it."""
    files = [one for one in home.rglob("*") if one.is_file()]
    return {str(one): one.stat().st_mtime_ns for one in files if one.relative_to(home).parts[0] not in ("cache", "log")}


def origins(planned) -> dict[str, str]:
    """Module → where it comes from, of all that go in."""
    return {one["module"]: one["origin"] for one in planned["decisions"] if one["verdict"] == "in"}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_cloud_kernel_comes_up_on_a_raid_controller_with_the_drivers_of_its_release(imagery, tmp_path):
    """P6-09, P6-11, P6-12, P6-13, P6-22, I3: without them `plan` and `build` name what is missing, and write nothing;
    with the package of exactly that release the client boots, from the RAID and with its network."""
    target, instant = TARGETS["megasas-rtl8139-bios"], "second"
    imagery.add_target(target)
    words = (imagery.name, "--at", imagery.points[instant], "--target", target.name)
    before = kept(imagery.home)
    planned, refused = imagery.rewind("image", "plan", *words, code=64)
    missing = {one["role"]: one["module"] for one in planned["decisions"] if one["verdict"] == "missing"}
    assert not planned["buildable"]
    assert missing["disk"].startswith(MEGASAS) and missing["nic"].startswith(RTL8139) and len(missing) == 2
    into = tmp_path / "image"
    (again,) = imagery.rewind("image", "build", *words, "--media", "iso", "--into", into, code=64)
    for error in (refused, again):
        assert all(module in error["message"] for module in missing.values()), error
        assert imagery.client.kernel in error["message"] and "image drivers add" in error["hint"]
    assert list(tmp_path.iterdir()) == [] and kept(imagery.home) == before

    package = drivers.build(imagery.client.kernel)
    (added,) = imagery.rewind("image", "drivers", "add", package, "--release", imagery.client.kernel)
    assert (added["release"], added["modules"]) == (imagery.client.kernel, 4)
    planned = imagery.plan(target, instant)
    assert planned["buildable"]
    found = origins(planned)
    assert {found[name] for name in ("megaraid_sas", "8139cp", "8139too", "mii")} == {added["name"]}
    # What the client has itself is its own.
    assert found["sd_mod"] == found["scsi_mod"] == "client"

    built = imagery.build(target, instant, "iso", into)
    assert set(target.modules) <= {Path(one).name.partition(".")[0].replace("-", "_") for one in built["modules"]}
    with imagery.disk(instant, tmp_path / "disk.qcow2") as disk:
        (tmp_path / "boot").mkdir()
        proof = boot(target, disk, Medium("iso", into / "rewind.iso"), tmp_path / "boot", seconds=300)
    assert proof.up, proof
    assert proof.kernels == [imagery.client.kernel], proof
    assert compare(proof, expected(imagery.client, instant)) == [], proof

    imagery.rewind("image", "drivers", "remove", added["name"])
    assert not imagery.rewind("image", "plan", *words, code=64)[0]["buildable"]
