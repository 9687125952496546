"""A tiny guest under continuous capture by the real verbs, and what tests ask of it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from appliance.capture import tap
from appliance.config import Home
from appliance.hypervisor.graph import base
from appliance.process import lives
from appliance.service import Session
from appliance.service import tap as verbs
from appliance.service.instant import resolve
from appliance.service.protection import point, protect, unprotect
from appliance.service.setup import init
from appliance.units import CHUNK, chunks_of
from tests.support import stamps

__all__ = ["SpoolDisk", "Tapped"]


class Tapped:
    """`guest` runs. Everything ends with the context; a tap process that is left is killed. `home` is its folder.

    The journal's watchdog is more patient than by default: where it is not what is tested, a disk of the host that
    stands still for a moment shall not end a span.
    """

    def __init__(self, guest, *, uri="", latency=None, home=None, journal_stall=2.0, **settings):
        self.guest = guest
        self.home = Home(home or Path(tempfile.mkdtemp(prefix="rw-")))
        self.home.create()
        (self.home.path / "rewind.yaml").write_text(yaml.safe_dump({"journal_stall": journal_stall, **settings}))
        self.uri = uri or guest.uri
        self.latency = latency
        with Session(self.home, self.uri) as session:
            init(session)
            self.uuid = session.hypervisor().domain(guest.name).uuid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        running = tap.current(self.home, self.uuid)
        try:
            with self.session() as session:
                if session.record(self.guest.name):
                    unprotect(session, self.guest.name, wait=20)
        finally:
            if running and lives(running.process):
                os.kill(int(running.process.partition(":")[0]), signal.SIGKILL)

    def session(self):
        return Session(self.home, self.uri)

    def protect(self, **options):
        with self.session() as session:
            protect(session, self.guest.name, continuous=True, max_added_latency=self.latency, **options)
        return self.attached()

    def ensure(self):
        """What the daemon does."""
        with self.session() as session:
            verbs.ensure(session, session.protected(self.guest.name))

    @property
    def running(self):
        return tap.current(self.home, self.uuid)

    @property
    def server(self):
        """The number of the journal's process."""
        return int(self.running.server.partition(":")[0])

    @property
    def log(self):
        return (self.home.log / f"tap-{self.uuid}.log").read_text()

    def ledger(self):
        return tap.ledger_of(self.home, self.uuid)

    def spans(self):
        return self.ledger().spans()

    def until(self, done, what, timeout=40.0):
        limit = time.monotonic() + timeout
        while not (found := done()):
            assert time.monotonic() < limit, f"{what}: {self.running}\n{self.log[-3000:]}"
            time.sleep(0.05)
        return found

    def attached(self, after=0, timeout=40.0):
        """Wait until it records, in a span that began after the first `after` ones, with a point to count from.
        Impatient: a lost tap is not waited for longer and longer."""
        asked = 0.0

        def done():
            nonlocal asked
            running = self.running
            if running and running.state == "waiting" and time.monotonic() > asked + 0.5:
                asked = time.monotonic()
                os.kill(int(running.process.partition(":")[0]), signal.SIGUSR1)
            spans = self.spans()
            return bool(running and running.attached and len(spans) > after and spans[-1].open and spans[-1].since)

        self.until(done, "no tap", timeout)
        return self.running

    def point(self, **options):
        with self.session() as session:
            return point(session, self.guest.name, wait=20, **options)

    def at(self, when):
        """The point of any instant."""
        with self.session() as session:
            return resolve(session, self.guest.name, str(when))

    def points(self):
        with self.session() as session:
            return session.repository.points(self.uuid)

    def exact(self, found):
        """Raises unless the point is exactly the state after some write of each writer, over all disks."""
        with self.session() as session:
            repository = session.repository

            def reader(target):
                held = repository.map(found.disk(target).map)

                def read(offset, length):
                    first, last = offset // CHUNK, chunks_of(offset + length)
                    data = b"".join(repository.read_chunk(held.get(index)) for index in range(first, last))
                    return data[offset - first * CHUNK :][:length]

                return read

            state = stamps.check([reader(target) for target in self.guest.targets], self.guest.layout)
        assert state.exact, (found.id, found.reason, found.sequence, state.messages)
        return state

    def nothing_left(self):
        with self.session() as session:
            assert base.leftovers(session.hypervisor().domain(self.guest.name).monitor()) == []


class SpoolDisk:
    """A small disk of its own for a domain's journal, which can be filled and which can hang."""

    def __init__(self, home, uuid, megabytes=96):
        self.folder = home.spool(uuid)
        self.folder.mkdir(parents=True)
        self.image = home.path / "spool.img"
        with self.image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m0", str(self.image)], check=True)
        made = subprocess.run(["mount", "-o", "loop", str(self.image), str(self.folder)], check=False)
        self.mounted = made.returncode == 0

    def fill(self):
        """All that is free now; more becomes free when segments go that were shipped."""
        ballast = (self.folder / "ballast").open("ab")
        try:
            while True:
                ballast.write(bytes(1 << 16))
                ballast.flush()
        except OSError:
            pass
        finally:
            try:
                ballast.close()
            except OSError:
                pass

    def empty(self):
        (self.folder / "ballast").unlink()

    def hang(self):
        subprocess.run(["fsfreeze", "-f", str(self.folder)], check=True)

    def go_on(self):
        subprocess.run(["fsfreeze", "-u", str(self.folder)], check=True)

    def close(self):
        if self.mounted:
            subprocess.run(["fsfreeze", "-u", str(self.folder)], check=False, capture_output=True)
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
