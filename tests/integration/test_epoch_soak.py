"""A5: many random faults in the middle of epochs, in four shapes of guest. `REWIND_FAULTS` is how many for each shape.

After every fault: no I/O error in the guest, no write of it waited 300 ms (its clock stands still in a pause, which is
counted apart), the next point is exact over all disks, and nothing of ours is left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from appliance.errors import RewindError
from appliance.hypervisor.base import DomainState
from appliance.units import MiB
from tests.support import libvirt, stamps
from tests.support.protect import Once, Protected
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

_COUNT = int(os.environ.get("REWIND_FAULTS", "75"))
_STALL_US = int(os.environ.get("REWIND_STALL_US", "300000"))


class Scene:
    """The guest, and what can happen to it. Each fault is done when the push has begun."""

    def __init__(self, guest, world, chance):
        self.guest = guest
        self.world = world
        self.chance = chance
        self.scattered = 0
        self.stalls = []

    def write(self):
        self.scattered += 1
        target = self.chance.choice(self.guest.targets)
        self.guest.ask(f"scatter {target} 40 {self.scattered} {16 * MiB} {60 * MiB}")

    def intake_killed(self):
        os.kill(self.world.intake_pid(), signal.SIGKILL)

    def intake_stopped(self):
        os.kill(self.world.intake_pid(), signal.SIGSTOP)

    def intake_stopped_and_reset(self):
        self.intake_stopped()
        subprocess.Popen(["virsh", "-q", "-c", self.guest.uri, "reset", self.guest.name])

    def reset(self):
        self.world.domain.reset()

    def suspended(self):
        self.world.domain.suspend()
        time.sleep(self.chance.random() / 5)
        self.world.domain.resume()

    def daemon_restarted(self):
        libvirt.stop()
        libvirt.start()

    def destroyed(self):
        self.world.domain.destroy()

    def snapshot(self):
        name = f"s{time.time_ns()}"
        libvirt.virsh("snapshot-create-as", self.guest.name, name, "--disk-only", "--no-metadata")

    def killed_ourselves(self):
        """Not from within: another process takes a point and dies."""

    def faults(self):
        return [
            self.intake_killed, self.intake_stopped, self.intake_stopped_and_reset, self.reset, self.suspended,
            self.daemon_restarted, self.destroyed, self.snapshot, self.killed_ourselves,
        ]  # fmt: skip

    def suffer(self, fault):
        self.write()
        if fault == self.killed_ourselves:
            number = str(self.chance.randrange(10, 120))
            command = [sys.executable, "-m", "tests.support.die", str(self.world.folder), self.guest.uri]
            subprocess.run([*command, self.guest.name, number], capture_output=True)
            time.sleep(1)
            self.world.reload()
            return
        try:
            self.world.point(progress=Once(fault))
        except RewindError as error:
            print("   ", type(error).__name__, error.message[:150])

    def recover(self):
        self.world.reload()
        if self.world.domain.state() is DomainState.SHUTOFF:
            self.guest.boot()
        elif self.world.domain.state() is DomainState.PAUSED:
            raise AssertionError("left paused")
        answered = False
        for _ in range(30):
            try:
                answered = bool(self.guest.ask("hello", timeout=2))
                break
            except Exception:
                continue
        assert answered, self.guest.console[-2000:]
        stats = self.guest.ask("stats reset")
        while "errors" not in stats:  # what was asked while it booted is answered late
            time.sleep(0.5)
            stats = self.guest.ask("stats reset")
        assert stats.get("errors") == 0, stats
        self.stalls.append(stats.get("longest_us", stats.get("longest", 0)))
        self.guest.ask("start 20")

    def prove(self):
        point = self.world.point()
        readers = [self.world.reader(point, target) for target in self.guest.targets]
        state = stamps.check(readers, self.guest.layout)
        assert state.exact, state.messages
        self.world.nothing_left()
        assert not any("compare" in note for note in point.notes), point.notes
        return point

    def commit_overlays(self):
        for target in self.guest.targets:
            libvirt.virsh("blockcommit", self.guest.name, target, "--active", "--pivot", "--wait", check=False)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_random_faults(libvirt_images, tmp_path, count, iothread):
    """P5-05, P5-06, P5-07, A5."""
    seed = int(os.environ.get("REWIND_SEED", str(time.time_ns() % 100000)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    disks = [TinyDisk(make_disk(libvirt_images / f"{i}.qcow2", 64 * MiB), iothread=iothread) for i in range(count)]
    with LibvirtGuest(libvirt_images, disks, name="soak", span=1 << 20, durable=True) as guest:
        guest.boot()
        with Protected(tmp_path, guest.uri, guest.name, rate_limit=8 * MiB) as world:
            scene = Scene(guest, world, chance)
            world.point()
            guest.ask("start 20")
            pauses = []
            for number in range(_COUNT):
                fault = chance.choice(scene.faults())
                print(number, fault.__name__, flush=True)
                scene.suffer(fault)
                scene.recover()
                pauses.append(scene.prove().stats.pause_seconds)
                if fault == scene.snapshot:
                    scene.commit_overlays()
                    scene.prove()
            print(f"longest write {max(scene.stalls)} us, longest pause {max(pauses) * 1000:.0f} ms")
            assert max(scene.stalls) < _STALL_US
