"""A repository and a protected domain in a few words, for tests that take points of real guests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from appliance.capture import epoch, protection
from appliance.config import Home, Settings
from appliance.hypervisor import connect
from appliance.hypervisor.graph import base
from appliance.store import Key, Repository, RepositorySpec, open_backend
from appliance.units import CHUNK, chunks_of

__all__ = ["Protected", "Once", "image_content"]


class Protected:
    """One domain protected into a new repository under `folder`. Everything is closed with the context."""

    def __init__(self, folder: Path, uri: str, name: str, disks=(), **settings):
        # Sockets live below the home, and their paths may have 107 bytes: pytest's folders are too deep.
        link = folder / "home"
        if not link.exists():
            link.symlink_to(tempfile.mkdtemp(prefix="rewind-"))
        self.home = Home(link.resolve())
        self.home.create()
        self.folder = folder
        self.settings = Settings(**settings)
        key_file = folder / "key"
        if not key_file.exists():
            Key.generate().save(key_file)
            Repository.create(open_backend(str(folder / "repo")), cache=self.home.cache, key=Key.load(key_file)).close()
        self.spec = RepositorySpec(str(folder / "repo"), self.home.cache, key_file, None)
        self.repo = self.spec.open()
        self.hypervisor = connect(uri)
        self.domain = self.hypervisor.domain(name)
        self.record = protection.load(self.home, self.domain.uuid)
        if self.record is None:
            self.record = protection.new(self.repo, self.domain, tuple(disks))
            protection.save(self.home, self.record)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hypervisor.close()
        self.repo.close()

    def point(self, **options):
        """Take a point; the record moves on."""
        taken = epoch.take(self.domain, self.spec, self.home, self.settings, self.record, self.repo, **options)
        self.record = taken.record
        return taken.point

    def reload(self):
        """As a new process would find it."""
        self.record = protection.load(self.home, self.domain.uuid)

    def intake_pid(self):
        """The nbdkit that an epoch is being pushed into."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes()
                    if words.startswith(b"nbdkit") and os.fsencode(self.home.path) in words:
                        return int(entry.name)
        raise AssertionError("no intake runs")

    def nothing_left(self):
        """Nothing of ours in the block graph, one recording bitmap on each disk, every device on its own node."""
        monitor = self.domain.monitor()
        assert base.leftovers(monitor) == []
        graph = base.nodes.read(monitor)
        for disk in self.domain.disks():
            assert graph.devices[disk.device] == disk.node
            top = graph.nodes[disk.storage]
            ours = [one for one in top.bitmaps.values() if one.name.startswith("rw-")]
            assert [one.recording for one in ours] == [True], (disk.target, ours)

    def reader(self, point, disk):
        """`reader(offset, length)` of a disk of a point, for `stamps.check`."""
        held = self.repo.map(point.disk(disk).map)

        def read(offset, length):
            first, last = offset // CHUNK, chunks_of(offset + length)
            data = b"".join(self.repo.read_chunk(held.get(index)) for index in range(first, last))
            return data[offset - first * CHUNK :][:length]

        return read

    def content(self, point, disk):
        """All bytes of a disk of a point."""
        return self.reader(point, disk)(0, point.disk(disk).size)


class Once:
    """A progress function that does something when the push has moved its first bytes (or at once)."""

    def __init__(self, act, at=1):
        self.act = act
        self.at = at
        self.done = False

    def __call__(self, done, total, rate, left):
        if not self.done and done >= self.at:
            self.done = True
            self.act()


def image_content(path: Path, form: str = "qcow2") -> bytes:
    """All bytes of an image as qemu-img reads them, also of one in use."""
    out = path.with_suffix(".copy")
    subprocess.run(["qemu-img", "convert", "-U", "-f", form, "-O", "raw", str(path), str(out)], check=True)
    data = out.read_bytes()
    out.unlink()
    return data
