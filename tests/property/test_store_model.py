"""The repository against a model: a dict of disks as bytearrays of one letter a chunk, and copies of them as points.

Rules write, resize, commit, delete, collect, merge, reopen, and damage the cache; after each, the points that exist
read back equal.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from appliance.model import DiskPoint, MapRef, Point
from appliance.store import Key, Repository, open_backend
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.store.merge import merge
from appliance.units import CHUNK

DISKS = ("vda", "vdb")
DOMAIN = "8d0a4f0e-6f0c-4d8e-9d6e-000000000001"


def content(letter: int) -> bytes:
    """A chunk of its own for each letter, 0 is zeroes. A third of them do not compress."""
    if not letter:
        return bytes(CHUNK)
    return (
        random.Random(letter).randbytes(CHUNK) if letter % 3 == 0 else bytes([letter & 255, letter >> 8]) * (CHUNK // 2)
    )


class Model(RuleBasedStateMachine):
    encrypted = True

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed):
        self.folder = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.random = random.Random(seed)
        self.key = Key.generate() if self.encrypted else None
        self.repo = Repository.create(open_backend(str(self.folder / "r")), cache=self.folder / "c", key=self.key)
        self.disks = {disk: bytearray(40) for disk in DISKS}
        self.refs: dict[str, MapRef | None] = dict.fromkeys(DISKS)
        self.changed = {disk: set() for disk in DISKS}
        self.points: dict[str, dict[str, bytes]] = {}
        self.last = None
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)

    def teardown(self):
        if hasattr(self, "repo"):
            report = check(self.repo, read_data=True)
            assert report.ok, report
            self.repo.close()
            shutil.rmtree(self.folder)

    @rule(
        disk=st.sampled_from(DISKS),
        at=st.integers(0, 10**6),
        letters=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    )
    def write(self, disk, at, letters):
        data = self.disks[disk]
        at %= len(data)
        letters = letters[: len(data) - at]
        data[at : at + len(letters)] = bytes(letters)
        self.changed[disk].update(range(at, at + len(letters)))

    @rule(disk=st.sampled_from(DISKS), size=st.sampled_from([1, 15, 16, 17, 40, 255, 256, 257, 300, 5000, 70000]))
    def resize(self, disk, size):
        data = self.disks[disk]
        if size < len(data):
            self.changed[disk] = {index for index in self.changed[disk] if index < size}
            del data[size:]
        else:
            base = self.refs[disk]
            if base is not None:
                # Gone and come back since the last point: zero now, whatever the base has there.
                self.changed[disk].update(range(len(data), min(size, base.size // CHUNK)))
            data.extend(bytes(size - len(data)))

    @rule(early=st.booleans())
    def commit(self, early):
        self.clock += timedelta(seconds=1)
        name = f"{len(self.points):04x}{self.random.randbytes(4).hex()}"
        disks = []
        with self.repo.writer() as writer:
            for disk, data in self.disks.items():
                changes = [(index, writer.put(content(data[index]))) for index in sorted(self.changed[disk])]
                if early:
                    writer.flush()
                base = self.refs[disk]
                ref = self.repo.write_map(base, len(data) * CHUNK, changes, writer)
                different = tuple(self.repo.diff(base, ref))
                disks.append(DiskPoint(disk, ref.size, ref, changed=different))
                self.refs[disk] = ref
                self.changed[disk] = set()
        point = Point(name, "guest", DOMAIN, "test:///", self.clock, "t", self.last, tuple(disks))
        self.repo.commit(point)
        self.last = name
        self.points[name] = {disk: bytes(data) for disk, data in self.disks.items()}
        assert self.repo.point(name) == point

    @precondition(lambda self: len(self.points) > 1)
    @rule(which=st.integers(0, 10**6))
    def delete(self, which):
        # The last point is the base of what comes next; everything else may go.
        name = sorted(set(self.points) - {self.last})[which % (len(self.points) - 1)]
        self.repo.delete_point(name)
        del self.points[name]

    @precondition(lambda self: self.points)
    @rule(which=st.integers(0, 10**6))
    def revert(self, which):
        name = sorted(self.points)[which % len(self.points)]
        point = self.repo.point(name)
        self.last = name
        for disk in DISKS:
            self.disks[disk] = bytearray(self.points[name][disk])
            self.refs[disk] = point.disk(disk).map
            self.changed[disk] = set()

    @rule()
    def collect(self):
        report = gc(self.repo)
        assert not report.waiting

    @rule()
    def join(self):
        merge(self.repo, at_least=2)

    @rule(forget=st.booleans())
    def reopen(self, forget):
        self.repo.close()
        if forget:
            shutil.rmtree(self.folder / "c")
        self.repo = Repository.open(open_backend(str(self.folder / "r")), cache=self.folder / "c", key=self.key)

    @invariant()
    def every_point_reads_back(self):
        if not hasattr(self, "points") or not self.points:
            return
        listed = self.repo.points(DOMAIN)
        assert {point.id for point in listed} == set(self.points)
        point = self.random.choice(listed)
        for disk in DISKS:
            found = self.repo.map(point.disk(disk).map)
            data = self.points[point.id][disk]
            items = dict(found.items())
            assert sorted(items) == [index for index, letter in enumerate(data) if letter]
            for index in self.random.sample(sorted(items), min(4, len(items))):
                assert self.repo.read_chunk(items[index]) == content(data[index])
                assert found.get(index) == items[index]

    @precondition(lambda self: len(getattr(self, "points", ())) > 1)
    @invariant()
    def differences_are_exact(self):
        one, two = self.random.sample(sorted(self.points), 2)
        points = {point.id: point for point in self.repo.points(DOMAIN)}
        for disk in DISKS:
            a, b = self.points[one][disk], self.points[two][disk]
            size = max(len(a), len(b))
            a, b = a.ljust(size, b"\0"), b.ljust(size, b"\0")
            expected = [index for index in range(size) if a[index] != b[index]] if a != b else []
            refs = points[one].disk(disk).map, points[two].disk(disk).map
            assert list(self.repo.diff(*refs)) == expected
            if refs[0].size == refs[1].size:
                assert (refs[0].root == refs[1].root) == (not expected)


class PlainModel(Model):
    encrypted = False


_few = settings(
    max_examples=14,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestEncrypted = pytest.mark.timeout(120)(Model.TestCase)
TestEncrypted.settings = _few
TestPlain = pytest.mark.timeout(120)(PlainModel.TestCase)
TestPlain.settings = settings(_few, max_examples=4)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_for_long():
    """P5-09: thousands of steps."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Model, settings=settings(_few, max_examples=500, stateful_step_count=60))
