"""A protected guest that other tools work on too: what an admin does with virsh, and whether both sides are right.

    scene = Scene(folder)                     a libvirt guest with three disks, protected by the service
    scene.during(act)                         a point whose push is slowed down, with `act` while it runs
    scene.settle()                            the guest is quiet: the next point is what an independent reader finds

`vda` and `vdb` are stamped by the writers (one instant across both can be proven), `vdc` only gets scattered blocks, so
that it may be taken away without taking a writer's disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from appliance.capture import protection as records
from appliance.config import Home
from appliance.errors import DomainLost
from appliance.hypervisor.graph import base
from appliance.service import protection, setup
from appliance.service.session import Session
from appliance.units import CHUNK, MiB, chunks_of
from tests.support import libvirt, stamps
from tests.support.protect import Once, image_content
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

__all__ = ["Refused", "RoomyGuest", "Scene", "Went", "patience", "run"]

_SIZE = 64 * MiB
# Slow enough that whatever is done meanwhile is done meanwhile.
_SLOW = 4 * MiB


class Refused(Exception):
    """The other tool failed; its words."""


def run(*words, timeout=60.0) -> str:
    """What a program says. Raises Refused with its complaint."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise Refused((done.stderr or done.stdout).strip())
    return done.stdout


def patience() -> float:
    """By how much everything takes longer now: a machine with more to do than it has processors stalls everybody."""
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


class RoomyGuest(LibvirtGuest):
    """With free slots for disks that are attached later."""

    def xml(self) -> str:
        root = "<controller type='pci' index='0' model='pcie-root'/>"
        ports = "".join(f"<controller type='pci' index='{n}' model='pcie-root-port'/>" for n in range(1, 13))
        return super().xml().replace("<devices>", f"<devices>{root}{ports}")


@dataclass
class Scene:
    """See the head of this module. `spent`: the next test needs a new one, unless `settle` takes that back."""

    folder: Path
    iothread: bool = False
    spent: bool = False
    used_up: bool = False
    pauses: list[float] = field(default_factory=list)
    _seed: int = 0

    def __post_init__(self):
        disks = [TinyDisk(make_disk(self.folder / f"{n}.qcow2", _SIZE), iothread=self.iothread) for n in "abc"]
        self.guest = RoomyGuest(self.folder, disks, name="shared", span=1 << 20, data=("vda", "vdb"))
        self.guest.undefine()
        self.guest.boot()
        self.name = self.guest.name
        self._home = tempfile.mkdtemp(prefix="rewind-")
        self.session = Session(Home(Path(self._home)), libvirt.URI, settings_file=Path(self._home) / "no.yaml")
        setup.init(self.session)
        protection.protect(self.session, self.name)
        self.scatter(60)
        self.point()

    def close(self):
        self.guest.undefine()
        self.session.close()
        shutil.rmtree(self._home, ignore_errors=True)

    # The guest

    def virsh(self, *words, timeout=60.0) -> str:
        return run("virsh", "-q", "-c", libvirt.URI, *words, timeout=timeout)

    def write(self, rate=40):
        assert self.guest.ask(f"start {rate}")["ok"]

    def quiet(self):
        """The writers stand still and everything is in the images; what each of them has written."""
        return self.guest.ask("stop")["seq"]

    def scatter(self, count, target="vda"):
        """Random blocks beyond what the writers stamp."""
        self._seed += 1
        answer = self.guest.ask(f"scatter {target} {count} {self._seed} {16 * MiB} {_SIZE}")
        assert answer["ok"], answer

    def unharmed(self):
        """No I/O error; the longest write in seconds since this was asked last."""
        stats = self.guest.ask("stats reset")
        assert stats["errors"] == 0, stats
        return max(stats["longest_us"], stats["under_way_us"]) / 1e6

    def images(self) -> dict[str, Path]:
        """What each disk of the domain is now, in libvirt's words."""
        lines = [line.split() for line in self.virsh("domblklist", self.name).splitlines()]
        return {target: Path(path) for target, path in lines}

    # Points

    def point(self, **options):
        found = protection.point(self.session, self.name, **options)
        self.pauses.append(found.stats.pause_seconds)
        return found

    def during(self, act, rate=_SLOW, at=1):
        """(point, what `act` returned) with `act` called while the push runs; what it raised is raised when the point
        is there, so that it is not taken for a reason to give the epoch up."""
        self.scatter(120)
        kept = []

        def quietly():
            try:
                kept.append((act(), None))
            except Exception as error:
                kept.append((None, error))

        once = Once(quietly, at)
        found = self.point(rate=rate, progress=lambda done, total, _: once(done, total, 0, None))
        assert once.done, "nothing was pushed"
        result, error = kept[0]
        if error is not None:
            raise Went(found, error)
        return found, result

    def reader(self, point, target):
        held = self.session.repository.map(point.disk(target).map)

        def read(offset, length):
            first, last = offset // CHUNK, chunks_of(offset + length)
            data = b"".join(self.session.repository.read_chunk(held.get(index)) for index in range(first, last))
            return data[offset - first * CHUNK :][:length]

        return read

    def exact(self, point, expected=(0, 0, 0)):
        """The point is one instant over both stamped disks."""
        return self.exact_in([self.reader(point, target) for target in ("vda", "vdb")], expected)

    def exact_in(self, readers, expected=(0, 0, 0)):
        state = stamps.check(readers, self.guest.layout, expected)
        assert state.exact, state.messages
        return state.seq

    def exact_files(self, paths, expected=(0, 0, 0)):
        """Raw copies of vda and vdb that somebody else made are one instant too."""
        return self.exact_in([stamps.file_reader(str(path)) for path in paths], expected)

    def same_as_images(self, point):
        for target, path in self.images().items():
            content = self.reader(point, target)(0, point.disk(target).size)
            assert content == image_content(path)[: len(content)], target

    def nothing_left(self):
        """Nothing of ours in the block graph, every device on its own node, one recording bitmap on each."""
        domain = self.session.domain(self.name)
        try:
            monitor = domain.monitor()
        except DomainLost:
            return
        assert base.leftovers(monitor) == []
        graph = base.nodes.read(monitor)
        prefix = records.load(self.session.home, domain.uuid).prefix
        for disk in domain.disks():
            assert graph.devices[disk.device] == disk.node
            ours = [one for one in graph.nodes[disk.storage].bitmaps.values() if one.name.startswith("rw-")]
            assert [(one.recording, one.name.startswith(prefix)) for one in ours] == [(True, True)], (disk.target, ours)
        everywhere = json.dumps(monitor.execute("query-named-block-nodes", flat=True))
        assert '"rw-ep' not in everywhere and "7000" not in str(monitor.execute("query-fdsets"))

    def settle(self, compared=False):
        """The writers stand still; one more point is byte for byte what is in the images; nothing of ours is left."""
        seq = self.quiet()
        found = self.point()
        self.exact(found, seq)
        self.same_as_images(found)
        self.nothing_left()
        if not compared:
            assert not any("compare" in note for note in found.notes), found.notes
        self.spent = self.used_up
        return found

    def wait_up(self, boots):
        """Until the guest has started so often since it was connected to."""
        self.guest.channel.wait_up(boots)

    def again(self):
        """Connect to a guest that libvirt has just started, and wait for it."""
        self.guest._forget_channel()
        limit = time.monotonic() + 60
        while True:
            with contextlib.suppress(Exception):
                self.guest.channel.ask("hello", 2)
                return
            assert time.monotonic() < limit, self.guest.console[-2000:]
            self.guest._forget_channel()


class Went(Exception):
    """`act` of `during` failed with `error`, and the point was taken all the same."""

    def __init__(self, point, error):
        super().__init__(str(error))
        self.point = point
        self.error = error
