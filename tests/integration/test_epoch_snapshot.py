"""What the guest overwrites between the freeze and the read of it: the point has what was there before."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from appliance.hypervisor.graph import epoch
from appliance.units import CHUNK, MiB
from tests.support.history import History


@pytest.mark.timeout(60)
def test_what_is_overwritten_before_it_is_read_is_as_it_was(monkeypatch):
    """P5-03, A10: single chunks, pairs and runs, first in a megabyte and in its middle, written and zeroed. QEMU 7.2
    reads the disk instead of what was saved when a read begins with such chunks and goes on into others."""
    made = History(Path(tempfile.mkdtemp()), 1, {"vda": 4 * MiB})
    after = bytearray(made.model["vda"])
    machine, push = made.machine, epoch.push
    machine.write("vda", made.model["vda"], 0, 4 * MiB, 1)
    after[:] = made.model["vda"]

    def late(monitor, source, **how):
        for index in (0, 1, 5, 17, 18, 19, 30, 32, 47, 63):
            machine.write("vda", after, index * CHUNK + 512, 1024, 9)
        for index in (8, 48, 49):
            machine.zero("vda", after, index * CHUNK, CHUNK)
        push(monitor, source, **how)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(epoch, "push", late)
            point = made.point()
        made.check_point(point)
        made.model["vda"][:] = after
        made.check_point(made.point())
        made.power_off()
        made.check_disks()
    finally:
        made.kill()
