"""Every write a point, against an independent oracle: clients that write to two disks of one QEMU through its tap.

    client vda ─┐  32 requests in flight each                    ┌─► images
    client vdb ─┴─► exports of the tapped nodes ─► QEMU ─► tap ──┴─► journal ─► points

The clients keep what they sent, when each request was sent and when it was answered, on one clock. The journal is asked
only for the order of the requests, which it may choose among those that were in flight together and among no others;
what a disk holds at any number is worked out from the clients' own data in that order.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nbd
import pytest

from appliance.capture.consolidate import consolidate
from appliance.hypervisor import connect
from appliance.hypervisor.graph import tap
from appliance.journal import Kind
from appliance.model import DiskPoint, Point
from appliance.store import Key, Repository, open_backend
from appliance.units import CHUNK, MiB, chunks_of
from tests.filter.journald import Journald
from tests.support.bare import Machine

SIZES = {"vda": 24 * MiB, "vdb": 12 * MiB + 512}
DEPTH = 32


@dataclass
class Request:
    """One request of a client. `sent` and `answered` are ticks of the common clock."""

    disk: str
    offset: int
    data: bytes
    zero: bool
    sent: int = -1
    answered: int = -1

    @property
    def end(self):
        return self.offset + len(self.data)


class Client(threading.Thread):
    """Keeps DEPTH requests in flight on one disk, none of which overlap."""

    def __init__(self, socket: Path, disk: str, count: int, seed: int, clock):
        super().__init__(name=disk)
        self.disk, self.left, self.clock = disk, count, clock
        self.dice = random.Random(seed)
        self.done: list[Request] = []
        self.flying: list[Request] = []
        self.errors: list[int] = []
        self.nbd = nbd.NBD()
        self.nbd.set_export_name(disk)
        self.nbd.connect_unix(str(socket))

    def run(self):
        while self.left or self.flying:
            while self.left and len(self.flying) < DEPTH:
                self.send(self.some())
            self.nbd.poll(1000)
        self.nbd.flush()
        self.nbd.shutdown()

    def some(self) -> Request:
        """Anywhere, often where something was written already; a stamp makes every payload unique."""
        size, dice = SIZES[self.disk], self.dice
        while True:
            zero = dice.random() < 0.12
            length = dice.choice([4096, 8192, 65536, 131072] if zero else [512, 1536, 4096, 4096, 4096, 16384, 65536])
            offset = dice.randrange(0, size - length + 1, 4096 if zero else 512)
            if dice.random() < 0.5:
                offset = offset % MiB  # a place that is written again and again
            if all(offset + length <= one.offset or one.end <= offset for one in self.flying):
                break
        stamp = f"{self.disk} {len(self.done)} {dice.getrandbits(64)}".encode().ljust(64)
        data = bytes(length) if zero else (stamp + dice.randbytes(64)) * (length // 128)
        return Request(self.disk, offset, data, zero)

    def send(self, one: Request) -> None:
        def answered(error):
            one.answered = next(self.clock)
            self.flying.remove(one)
            if error:
                self.errors.append(error)
            return 1

        self.left -= 1
        self.flying.append(one)
        self.done.append(one)
        one.sent = next(self.clock)
        if one.zero:
            self.nbd.aio_zero(len(one.data), one.offset, completion=answered)
        else:
            self.nbd.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(one.data)), one.offset, completion=answered)


class Oracle:
    """What the disks hold at each number: digests of all chunks, moved forward request by request."""

    def __init__(self, order: list[Request], images: dict[str, bytes]):
        self.order = order
        self.images = {name: bytearray(image) for name, image in images.items()}
        self.at = 0
        self.digests = {
            name: [self._digest(name, n) for n in range(chunks_of(len(image)))] for name, image in images.items()
        }

    def move(self, upto: int) -> None:
        stale = set()
        for one in self.order[self.at : upto]:
            self.images[one.disk][one.offset : one.end] = one.data
            stale |= {(one.disk, n) for n in range(one.offset // CHUNK, (one.end - 1) // CHUNK + 1)}
        for disk, n in stale:
            self.digests[disk][n] = self._digest(disk, n)
        self.at = upto

    def _digest(self, disk: str, n: int) -> bytes:
        return hashlib.sha256(self.images[disk][n * CHUNK : (n + 1) * CHUNK].ljust(CHUNK, b"\0")).digest()


class Scene:
    """QEMU with both disks tapped and exported, the journal, a repository with the base point."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.dice = random.Random(5)
        self.paths = {"vda": folder / "vda.qcow2", "vdb": folder / "vdb.raw"}
        for name, path in self.paths.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", path.suffix[1:], path, str(SIZES[name])], check=True)
            first = f"write -P {len(name)} 1M 3M"
            subprocess.run(["qemu-io", "-f", path.suffix[1:], "-c", first, path], check=True, capture_output=True)
        self.before = self.images()
        self.journald = Journald(folder, SIZES, segment_size="2M", commit="20ms")
        self.machine = Machine(folder, self.paths, device_options=",share-rw=on")
        key = Key.generate()
        Repository.create(open_backend(str(folder / "repository")), cache=folder / "cache", key=key).close()
        self.repo = Repository.open(open_backend(str(folder / "repository")), cache=folder / "cache", key=key)
        self.contents: dict[bytes, bytes] = {}

    def __enter__(self):
        self.journald.start()
        self.machine.start()
        hypervisor = connect(self.machine.uri)
        domain = hypervisor.domain("bare")
        tap.attach(domain.monitor(), domain.disks(), self.journald.socket)
        hypervisor.close()
        self.exports = self.folder / "exports.sock"
        address = {"type": "unix", "data": {"path": str(self.exports)}}
        self.machine.monitor.execute("nbd-server-start", addr=address)
        for name in SIZES:
            self.machine.monitor.execute(
                "block-export-add",
                type="nbd",
                id=f"export-{name}",
                node_name=f"rw-tpg-{name}",
                name=name,
                writable=True,
            )
        self.journal = self.journald.journal()
        self.points = [self._base()]
        return self

    def __exit__(self, *_):
        self.machine.kill()
        self.journald.__exit__()
        self.repo.close()

    def images(self) -> dict[str, bytes]:
        found = {}
        for name, path in self.paths.items():
            raw = self.folder / f"{name}.copy"
            subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", path, raw], check=True)
            found[name] = raw.read_bytes()
        return found

    def _base(self) -> Point:
        with self.repo.writer() as writer:
            disks = tuple(
                DiskPoint(name, len(image), self._stored(writer, image)) for name, image in self.before.items()
            )
        point = Point(
            "000000000001aaaa", "bare", "5a1c0000-0000-4000-8000-000000000001", "qmp:", datetime.now(UTC), "t", None,
            disks, journal=self.journald.control.status().fields["journal"], sequence=0,
        )  # fmt: skip
        self.repo.commit(point)
        return point

    def _stored(self, writer, image: bytes):
        ids = ((n, writer.put(image[n * CHUNK : (n + 1) * CHUNK])) for n in range(chunks_of(len(image))))
        return self.repo.write_map(None, len(image), ((n, one) for n, one in ids if one), writer)

    def make(self, upto: int) -> Point:
        """A point at that number, from any that is there."""
        base = self.dice.choice([point for point in self.points if point.sequence <= upto])
        self.journal.refresh()
        point = consolidate(self.repo, base, self.journal, upto)
        self.points.append(point)
        return point

    def digests(self, point: Point) -> dict[str, list[bytes]]:
        found = {}
        for disk in point.disks:
            chunks = dict(self.repo.map(disk.map).items())
            found[disk.disk] = [self._digest(chunks.get(n, b"")) for n in range(chunks_of(disk.size))]
        return found

    def _digest(self, chunk: bytes) -> bytes:
        if chunk not in self.contents:
            self.contents[chunk] = hashlib.sha256(self.repo.read_chunk(chunk)).digest()
        return self.contents[chunk]


def order_of(journal, clients: list[Client]) -> list[Request]:
    """The clients' requests in the journal's order, each found by its own payload, or by the range that it zeroed."""
    waiting: dict[tuple, list[Request]] = {}
    for one in itertools.chain(*(client.done for client in clients)):
        waiting.setdefault((one.disk, one.offset, len(one.data), b"" if one.zero else one.data), []).append(one)
    found = []
    for record in journal.records():
        assert record.kind in (Kind.WRITE, Kind.ZERO), record
        data = b"" if record.kind is Kind.ZERO else bytes(record.data)
        found.append(waiting[record.disk, record.offset, record.length, data].pop(0))
    assert not any(waiting.values()), "a request is in no record"
    return found


def check_order(order: list[Request]) -> None:
    """No request stands before one that was answered when it had not been sent yet: on no disk, nor across both."""
    latest = -1
    for one in order:
        assert one.answered > latest, f"{one.disk} at {one.offset} comes after what was sent when it had been answered"
        latest = max(latest, one.sent)


def play(requests: int, instants: int) -> None:
    with tempfile.TemporaryDirectory(prefix="rw-oracle-") as folder, Scene(Path(folder)) as scene:
        clock = itertools.count()
        clients = [Client(scene.exports, name, requests // 2, seed, clock) for seed, name in enumerate(SIZES)]
        for client in clients:
            client.start()
        # Some are made while the journal is being written, of what is in the kernel.
        early = []
        while any(client.is_alive() for client in clients):
            if written := scene.journald.control.status().written:
                early.append(scene.make(scene.dice.randint(max(1, written - 400), written)))
        for client in clients:
            client.join()
        assert not any(client.errors for client in clients)
        scene.journal.refresh()
        order = order_of(scene.journal, clients)
        assert len(order) == requests
        check_order(order)
        oracle = Oracle(order, scene.before)
        numbers = scene.dice.sample(range(1, requests + 1), max(0, instants - len(early)))
        made = early + [scene.make(number) for number in [*numbers, requests]]
        for point in sorted(made, key=lambda point: point.sequence):
            oracle.move(point.sequence)
            assert scene.digests(point) == oracle.digests, f"write {point.sequence}"
        assert {name: bytes(image) for name, image in oracle.images.items()} == scene.images()


@pytest.mark.timeout(90)
def test_any_write_of_two_disks_at_depth_32():
    """B1, P5-02, P5-38, P5-39: 40 instants of 4000 writes."""
    play(4000, 40)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_writes_of_two_disks_at_depth_32():
    """B1, P5-02, P5-38, P5-39: 1000 instants of 30000 writes."""
    play(30000, 1000)
