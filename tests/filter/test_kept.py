"""A view that is always there: it dies, hangs, its owner dies, and whoever reads at its place gets the right bytes."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from appliance import config, nbd
from appliance.process import lives
from appliance.restore.export import ViewServer
from appliance.restore.kept import KeptView
from appliance.units import MiB
from tests.filter.conftest import image
from tests.support.limits import limit

DATA = bytes(image(MiB, 3))


@pytest.fixture
def keep(shop, tmp_path):
    """keep(): an owner that keeps the same view as all the others of a test."""
    exports, owners = shop.taken(vda=DATA), []

    def make(socket):
        return ViewServer(tmp_path, shop.spec, exports, socket=socket, die_with_parent=False)

    def begin():
        owners.append(KeptView("test", make, tmp_path / "place.sock", timeout=1.0))
        return owners[-1]

    yield begin
    for owner in owners:
        owner.inherit(0, 0)
        owner.stop()


def reads_right(folder):
    with nbd.connect(folder / "place.sock", "vda") as disk:
        return disk.pread(len(DATA), 0) == DATA


def until(kept, done, wanted="wanted"):
    deadline = time.monotonic() + limit(10)
    while not done():
        assert time.monotonic() < deadline, kept.error
        kept.tend(wanted)
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_view_that_dies_or_hangs_is_replaced(keep, tmp_path, number):
    """P5-14: and the one before is gone when the next one is there."""
    kept = keep()
    kept.tend("wanted")
    first = kept.key
    assert reads_right(tmp_path)
    os.kill(int(first.partition(":")[0]), number)
    until(kept, lambda: kept.key not in ("", first))
    assert reads_right(tmp_path)
    assert not lives(first)
    assert kept.shows == "wanted"


def test_the_next_owner_replaces_what_a_killed_one_left(keep, tmp_path):
    """P5-14: also a view that its owner had no time to write down."""
    before = keep()
    before.tend("wanted")
    left = before.key
    kept = keep()
    kept.inherit(0, 7)
    assert reads_right(tmp_path)
    kept.tend("wanted")
    assert kept.key not in ("", left)
    assert not lives(left)
    assert reads_right(tmp_path)
    assert kept.served == 7


def test_a_view_that_cannot_start_leaves_the_one_before_in_its_place(keep, tmp_path, monkeypatch):
    kept = keep()
    kept.tend("wanted")
    first = kept.key
    monkeypatch.setenv("PATH", "/nowhere")
    kept.tend("safety")
    assert kept.error
    assert kept.key == first
    assert kept.shows == "wanted"
    monkeypatch.undo()
    assert reads_right(tmp_path)
    until(kept, lambda: kept.shows == "safety", "safety")


def test_a_view_that_dies_while_the_disk_is_full_is_replaced_when_there_is_room(keep, tmp_path, monkeypatch):
    """P6-14: its owner must not end with it, or the storage daemon that a machine's root comes from ends as well."""

    def full(path, _value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    kept = keep()
    kept.tend("wanted")
    monkeypatch.setattr(config, "write_json", full)
    os.kill(int(kept.key.partition(":")[0]), signal.SIGKILL)
    until(kept, lambda: kept.error)
    assert "No space left on device" in kept.error and not kept.key
    monkeypatch.undo()
    until(kept, lambda: kept.key)
    assert reads_right(tmp_path) and not kept.error
