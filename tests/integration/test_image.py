"""`rewind image` from a point to a machine that has never seen the client: one boot, of the client's own kernel.

The disks that boot are the points themselves, served by a view below a throw-away overlay: nothing is restored first,
and nothing is written to them before the client's own system runs.
"""

from __future__ import annotations

import pytest

from tests.guests import clients
from tests.support.imageproof import boot, compare, expected
from tests.support.imagery import Imagery
from tests.support.targets import TARGETS, Medium


@pytest.fixture(scope="module", params=["mbr"])
def imagery(request, tmp_path_factory):
    from tests.support import world

    images = world.images_folder("image")
    with Imagery(images, clients.build(request.param)) as found:
        yield found


def proves(imagery, target, instant, folder):
    """Build, boot, compare: I1's conditions for one cell of its matrix."""
    imagery.add_target(target)
    medium = "esp" if target.firmware == "uefi" else "iso"
    built = imagery.build(target, instant, medium, folder / "image")
    (file,) = [one for one in built["files"] if one["name"] == medium]
    with imagery.disk(instant, folder / "disk.qcow2") as disk:
        proof = boot(target, disk, Medium(medium, file["path"]), folder)
    assert proof.up, proof
    assert proof.kernels == [imagery.client.kernel], proof
    assert compare(proof, expected(imagery.client, instant)) == [], proof
    return built


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "instant"), [("nvme-vmxnet3-uefi", "second"), ("ahci-e1000e-bios", "first")]
)
def test_a_point_boots_on_other_hardware(imagery, name, instant, tmp_path):
    """P6-07 to P6-15, P6-27, I1: exactly one kernel, the client's own; its state is that of the point."""
    proves(imagery, TARGETS[name], instant, tmp_path)
