"""A5: many random faults in the middle of epochs, in four shapes of guest. `REWIND_FAULTS` is how many for each shape.

After every fault: no I/O error in the guest, no write of it waited 300 ms (its clock stands still in a pause, which is
counted apart; what the host itself makes everybody wait for is measured), the next point is exact over all disks, and
nothing of ours is left.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from appliance.errors import RewindError
from appliance.hypervisor.base import DomainState
from appliance.units import MiB
from tests.support import libvirt, stamps
from tests.support.hoststall import HostStall
from tests.support.protect import Once, Protected
from tests.support.shared import RoomyGuest
from tests.support.tiny import TinyDisk, make_disk

_COUNT = int(os.environ.get("REWIND_FAULTS", "75"))
_STALL_US = int(os.environ.get("REWIND_STALL_US", "300000"))


_EXTRA = "vdx"


class SmallStore:
    """The repository's folder on a disk of its own that can be made full at once."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700,size=8g", "rewind", folder], check=True)

    def fill(self):
        """No more than what is there, and a little."""
        disk = os.statvfs(self.folder)
        self._resize((disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024 + 512)

    def empty(self):
        self._resize(8 << 20)

    def _resize(self, kilobytes):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.folder], check=True)

    def close(self):
        subprocess.run(["umount", self.folder], check=True)


class Scene:
    """The guest, and what can happen to it. Each fault is done when the push has begun."""

    def __init__(self, guest, world, repository, chance, host):
        self.host = host
        self.guest = guest
        self.world = world
        self.repository = repository
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

    def intake_slow(self):
        """It stands still again and again, each time for less than anybody gives up."""
        for _ in range(8):
            self.intake_stopped()
            time.sleep(0.1)
            os.kill(self.world.intake_pid(), signal.SIGCONT)
            time.sleep(0.02)

    def scratch_full(self):
        """The guest overwrites what waits to be pushed, more than may be kept of it (see `suffer`)."""
        self.write_again()

    def write_again(self):
        target = self.guest.targets[0]
        self.guest.ask(f"scatter {target} 400 {self.scattered} {16 * MiB} {60 * MiB}")

    def repository_full(self):
        self.repository.fill()

    def asked_to_shut_down(self):
        """It does so, or goes on where nobody in it listens to the button."""
        libvirt.virsh("shutdown", self.guest.name, "--mode", "acpi")

    def backed_up(self):
        """By libvirt, into files of its own; it may say no as long as we are in its way."""
        libvirt.virsh("backup-begin", self.guest.name, check=False)

    def committed(self):
        """Refused by libvirt where there is nothing to commit or we are in its way."""
        for target in self.guest.targets:
            libvirt.virsh("blockcommit", self.guest.name, target, "--active", "--pivot", "--wait", check=False)

    def detached(self):
        libvirt.virsh("detach-disk", self.guest.name, _EXTRA, "--live")

    def attach(self):
        """A disk that can be taken away: no writer stamps it."""
        path = make_disk(self.guest.folder / f"extra-{time.time_ns()}.qcow2", 16 * MiB)
        kind = ["--driver", "qemu", "--subdriver", "qcow2", "--cache", "none", "--targetbus", "virtio"]
        libvirt.virsh("attach-disk", self.guest.name, path, _EXTRA, *kind)
        time.sleep(2)  # the guest has to take it, or it does not let go of it
        self.world.point()

    def faults(self):
        return [
            self.intake_killed, self.intake_stopped, self.intake_slow, self.intake_stopped_and_reset, self.scratch_full,
            self.repository_full, self.reset, self.suspended, self.asked_to_shut_down, self.daemon_restarted,
            self.destroyed, self.snapshot, self.backed_up, self.committed, self.detached, self.killed_ourselves,
        ]  # fmt: skip

    def suffer(self, fault):
        if fault == self.detached:
            self.attach()
        self.write()
        if fault == self.killed_ourselves:
            number = str(self.chance.randrange(10, 120))
            command = [sys.executable, "-m", "tests.support.die", str(self.world.folder), self.guest.uri]
            subprocess.run([*command, self.guest.name, number], capture_output=True)
            time.sleep(1)
            self.world.reload()
            return
        usual = self.world.settings
        if fault == self.scratch_full:
            self.write_again()  # what is dirty is what will be overwritten
            self.world.settings = replace(usual, scratch_limit=MiB)
        try:
            self.world.point(progress=Once(fault))
        except RewindError as error:
            print("   ", type(error).__name__, error.message[:150])
        finally:
            self.world.settings = usual
            self.repository.empty()
        if fault == self.backed_up:
            self.await_backup()

    def await_backup(self):
        """Its files are not needed, only that it comes to its end."""
        limit = time.monotonic() + 60
        while "None" not in libvirt.virsh("domjobinfo", self.guest.name).stdout.split("Job type:")[1].splitlines()[0]:
            assert time.monotonic() < limit, "the backup does not end"
            time.sleep(0.1)
        for disk in self.guest.disks:
            for copy in disk.path.parent.glob(f"{disk.path.name}.[0-9]*"):
                copy.unlink()

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
        waited, host = stats.get("longest_us", stats.get("longest", 0)), int(2e6 * self.host.worst())
        print(f"    {waited} us, of which the host's {host}", flush=True)
        self.stalls.append((max(0, waited - host), waited))
        self.host.reset()
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
    with (
        contextlib.closing(SmallStore(tmp_path / "repo")) as repository,
        RoomyGuest(libvirt_images, disks, name="soak", span=1 << 20, durable=True) as guest,
        HostStall(libvirt_images) as host,
    ):
        guest.boot()
        with Protected(tmp_path, guest.uri, guest.name, rate_limit=8 * MiB) as world:
            scene = Scene(guest, world, repository, chance, host)
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
            longest = max(waited for _, waited in scene.stalls)
            print(f"longest write {longest} us, {max(scene.stalls)[0]} us beyond the host's own stalls")
            print(f"longest pause {max(pauses) * 1000:.0f} ms")
            assert max(scene.stalls)[0] < _STALL_US
