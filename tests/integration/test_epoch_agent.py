"""Points with a real guest agent: the file systems of a Debian guest are frozen at the instant, and thawed whatever
happens to us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from appliance.model import Consistency
from tests.support import libvirt
from tests.support.debian import DebianGuest
from tests.support.protect import Protected

# ext4's superblock: where it says which features it has, and the bit of a journal that has to be replayed.
_INCOMPAT = 1024 + 0x60
_NEEDS_RECOVERY = 4


def status(guest):
    command = '{"execute":"guest-fsfreeze-status"}'
    return json.loads(libvirt.virsh("qemu-agent-command", guest.name, command, "--timeout", "20").stdout)["return"]


def wait_for_agent(guest):
    limit = time.monotonic() + 180
    while True:
        try:
            return status(guest)
        except (RuntimeError, subprocess.SubprocessError, ValueError):
            assert time.monotonic() < limit, guest.console[-2000:]
            time.sleep(1)


def writes(guest):
    """The guest's file system takes a write, and what was written is on the disk."""
    guest.run("date >/root/written && sync /root/written", timeout=30)


def needs_recovery(world, point):
    features = int.from_bytes(world.reader(point, "vda")(_INCOMPAT, 4), "little")
    return bool(features & _NEEDS_RECOVERY)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_frozen_at_the_instant_and_thawed_after_it(libvirt_images, tmp_path):
    """P5-24: quiesce `require` gives a point that needs no journal replayed; killed while the guest is frozen, or
    frozen and paused, we leave it thawed and running."""
    with DebianGuest(libvirt_images) as guest:
        guest.boot()
        assert wait_for_agent(guest) == "thawed"
        with Protected(tmp_path, guest.uri, guest.name) as world:
            crash = world.point(quiesce="never")
            assert crash.consistency is Consistency.CRASH
            assert needs_recovery(world, crash)
            writes(guest)
            begun = time.monotonic()
            point = world.point(quiesce="require")
            print(f"{point.notes}, pause {point.stats.pause_seconds:.3f} s, whole {time.monotonic() - begun:.2f} s")
            assert point.consistency is Consistency.FILESYSTEM
            assert not needs_recovery(world, point)
            assert status(guest) == "thawed"
            writes(guest)
            world.hypervisor.close()
            for when in ("frozen", "paused"):
                command = [sys.executable, "-m", "tests.support.die", str(tmp_path), guest.uri, guest.name, when]
                died = subprocess.run(command, capture_output=True, text=True)
                assert died.returncode == -signal.SIGKILL, died.stderr
                begun = time.monotonic()
                while libvirt.virsh("domstate", guest.name).stdout.strip() != "running" or status(guest) != "thawed":
                    assert time.monotonic() < begun + 30, "nobody thawed it"
                    time.sleep(0.1)
                print(f"killed while {when}: thawed within {time.monotonic() - begun:.2f} s")
                writes(guest)
        with Protected(tmp_path, guest.uri, guest.name) as world:
            point = world.point(quiesce="require")
            assert point.consistency is Consistency.FILESYSTEM
            assert not needs_recovery(world, point)
            assert not any("compare" in note for note in point.notes), point.notes
            world.nothing_left()
        assert guest.documents_intact()
