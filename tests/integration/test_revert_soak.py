"""A5: many random faults in the middle of instant reverts, in four shapes of guest. `REWIND_FAULTS` is how many for
each shape.

After every fault: no I/O error in the guest, no read of it waited for longer than `view_timeout` and what its own host
costs, nothing it read was wrong; the revert comes to its end, the next point is what the images hold, and nothing of
ours is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from appliance.errors import NothingToResume, RewindError
from appliance.hypervisor.base import DomainState
from appliance.hypervisor.graph import base
from appliance.restore import intent as intents
from appliance.restore import keeper
from appliance.restore.revert import Reverter
from appliance.units import MiB
from tests.support import libvirt
from tests.support.protect import Protected, image_content
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

_COUNT = int(os.environ.get("REWIND_FAULTS", "25"))
_VIEW_TIMEOUT = 2.0
# Of a read: the bound, and a second for a guest that is emulated on a machine with other things to do.
_LONGEST_US = (_VIEW_TIMEOUT + 1.0) * 1e6


class Scene:
    """The guest, and what can happen to it while blocks are pending."""

    def __init__(self, guest, world, chance):
        self.guest, self.world, self.chance = guest, world, chance
        self.scattered = 0
        self.waits = []

    # What can happen.

    def _process(self, name):
        key = keeper.state(self.world.home, self.world.domain.uuid).get(name, "")
        return int(key.partition(":")[0]) if keeper.lives(key) else None

    def _signal(self, name, number):
        if (pid := self._process(name)) is not None:
            os.kill(pid, number)

    def view_killed(self):
        self._signal("view", signal.SIGKILL)

    def view_stopped(self):
        self._signal("view", signal.SIGSTOP)

    def view_slow(self):
        """It stands still again and again, each time for less than it is given up for."""
        for _ in range(8):
            if (pid := self._process("view")) is None:
                return
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)

    def keeper_killed(self):
        """The view goes on without it; whoever resumes starts the next."""
        self._signal("key", signal.SIGKILL)

    def both_killed(self):
        """Nobody brings the view back until somebody resumes: done at once, as a daemon would."""
        self.keeper_killed()
        self.view_killed()
        self.end()

    def suspended(self):
        self.world.domain.suspend()
        time.sleep(self.chance.random() / 5)
        self.world.domain.resume()

    def reset(self):
        boots = self.guest.channel.boots
        self.world.domain.reset()
        self.guest.channel.wait_up(boots + 1)

    def daemon_restarted(self):
        libvirt.stop()
        libvirt.start()

    def destroyed(self):
        """It cannot be started on half a disk; after `resume` it can."""
        self.world.domain.destroy()
        self._start_again()

    def _start_again(self):
        refused = libvirt.virsh("start", self.guest.name, check=False)
        if refused.returncode != 0:
            self.end()
            self.guest._forget_channel()
            libvirt.virsh("start", self.guest.name)
        self.guest.channel.wait_up()

    def asked_to_shut_down(self):
        """It does so in a moment, or goes on where nobody in it listens to the button."""
        libvirt.virsh("shutdown", self.guest.name, "--mode", "acpi")
        limit = time.monotonic() + 8
        while time.monotonic() < limit and self.world.domain.state() is not DomainState.SHUTOFF:
            time.sleep(0.2)
        if self.world.domain.state() is DomainState.SHUTOFF:
            self._start_again()

    def snapshot_wanted(self):
        """May be refused: the disk is neither one state nor the other."""
        name = f"s{time.time_ns()}"
        libvirt.virsh("snapshot-create-as", self.guest.name, name, "--disk-only", "--no-metadata", check=False)

    def commit_wanted(self):
        for target in self.guest.targets:
            libvirt.virsh("blockcommit", self.guest.name, target, "--active", "--pivot", "--wait", check=False)

    def point_wanted(self):
        with pytest.raises(RewindError):
            self.world.point()

    def faults(self):
        return [
            self.view_killed, self.view_stopped, self.view_slow, self.keeper_killed, self.both_killed, self.suspended,
            self.reset, self.daemon_restarted, self.destroyed, self.asked_to_shut_down, self.snapshot_wanted,
            self.commit_wanted, self.point_wanted,
        ]  # fmt: skip

    # One revert.

    def change(self):
        self.scattered += 1
        for target in self.guest.targets:
            self.guest.ask(f"scatter {target} 150 {self.scattered} {16 * MiB} {60 * MiB}")

    def write(self, seconds):
        """Let the guest write for a while; its N of each writer."""
        self.guest.ask("start 40")
        time.sleep(seconds)
        return self.guest.ask("stop")["seq"]

    def suffer(self, fault):
        self.change()
        self.write(0.3)
        wanted = self.world.point()
        self.change()
        self.write(0.5)
        self.guest.ask("stats reset")
        boots = self.guest.channel.boots
        self.reverter().revert(wanted, instant=True, background=True, rate=1 << 14)
        self.guest.channel.wait_up(boots + 1)
        assert self.pending()
        self.guest.ask("start 40")
        fault()
        print("   ", self.world.domain.state().value, "pending" if self.pending() else "ended", flush=True)
        deep = self.guest.ask("reads 1 16", timeout=60)
        assert (deep["wrong"], deep["errors"]) == (0, 0), deep
        self.waits.append(deep["longest_us"])
        assert deep["longest_us"] < _LONGEST_US, deep
        self.end()

    def pending(self):
        found = intents.load(self.world.home, self.world.domain.uuid)
        return found is not None and not found.ended

    def end(self):
        """As fast as it goes: the rate was for there to be time for the fault."""
        resuming = threading.Thread(target=self._resume)
        resuming.start()
        limit = time.monotonic() + 90
        while self.pending():
            assert time.monotonic() < limit, "the revert does not end"
            with contextlib.suppress(RewindError):  # the job has just ended, or the domain is shut off
                monitor = self.world.domain.monitor()
                for job in base.jobs(monitor):
                    monitor.execute("block-job-set-speed", device=job["id"], speed=0)
            time.sleep(0.1)
        resuming.join()
        assert keeper.wait_gone(self.world.home, self.world.domain.uuid)

    def _resume(self):
        with contextlib.suppress(NothingToResume):  # it has ended by itself
            self.reverter().resume()

    def reverter(self):
        world = self.world
        return Reverter(world.home, world.settings, world.spec, world.repo, world.domain, world.home.path / "none")

    def prove(self):
        assert self.world.domain.state() is DomainState.RUNNING
        seq = self.write(0.2)
        state = self.guest.ask("state", timeout=60)
        assert state["exact"] and state["seq"] == seq, (state, seq)
        assert self.guest.ask("stats")["errors"] == 0
        self.world.reload()
        point = self.world.point()
        assert not any("compare" in note for note in point.notes), point.notes
        paths = {disk.target: disk.source for disk in self.world.domain.disks()}
        for target in self.guest.targets:
            assert self.world.content(point, target) == image_content(Path(paths[target])), target
        self.world.nothing_left()


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("iothread", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_random_faults_in_reverts(libvirt_images, tmp_path, count, iothread):
    """P5-17, P5-36, A5."""
    seed = int(os.environ.get("REWIND_SEED", str(time.time_ns() % 100000)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    disks = [TinyDisk(make_disk(libvirt_images / f"{i}.qcow2", 64 * MiB), iothread=iothread) for i in range(count)]
    with LibvirtGuest(libvirt_images, disks, name="revertsoak", span=1 << 20, durable=True) as guest:
        guest.boot()
        with Protected(tmp_path, guest.uri, guest.name, view_timeout=_VIEW_TIMEOUT) as world:
            scene = Scene(guest, world, chance)
            world.point()
            for number in range(_COUNT):
                fault = chance.choice(scene.faults())
                print(number, fault.__name__, flush=True)
                scene.suffer(fault)
                scene.prove()
            print(f"longest read {max(scene.waits)} us")
