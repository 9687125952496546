"""The store dies at every one of its operations: what was acknowledged is there afterwards, nothing is in the way."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance.errors import Locked, NoSpace, RewindError
from appliance.store import Key, Repository, open_backend
from appliance.store.backend.faulty import Crashed, Fault, Faulty, at
from appliance.store.backend.memory import MemoryBackend
from appliance.store.check import check
from appliance.store.gc import gc
from appliance.store.merge import merge
from tests.support.store import expect, read, take

KEY = Key(bytes(range(32)))
_names = itertools.count()


def copy_of(place) -> MemoryBackend:
    other = MemoryBackend(f"crash-{next(_names)}")
    for info in place.list():
        other.put(info.name, place.get(info.name))
    return other


def prepared(tmp_path):
    """Three points, of which the first is deleted: gc has packs to drop whole and to rewrite."""
    place = MemoryBackend(f"crash-{next(_names)}")
    repo = Repository.create(place, cache=tmp_path / "c0", key=KEY)
    one = take(repo, "p1", {i: i + 1 for i in range(8)})
    two = take(repo, "p2", {i: i + 50 for i in range(7)}, base=one, parent="p1", second=1)
    take(repo, "p3", {9: 99}, base=two, parent="p2", second=2)
    repo.delete_point("p1")
    repo.close()
    state = {i: i + 50 for i in range(7)} | {7: 8}
    return place, {"p2": state, "p3": state | {9: 99}}, two


def capture(repo, points, base, acknowledged):
    for step in range(2):
        name = f"q{step}"
        letters = {3: 1 + step, 20 + step: 7}
        take(repo, name, letters, base=base, parent="p2", second=10 + step)
        points[name] = points["p2"] | letters
        acknowledged.add(name)
    acknowledged.discard("q0")
    repo.delete_point("q0")


def collect(repo, points, base, acknowledged):
    gc(repo)


def join(repo, points, base, acknowledged):
    merge(repo, at_least=2)


def assert_whole(place, cache, points, acknowledged):
    for info in list(place.list("locks/")):
        place.delete(info.name)  # of the dead process, which is ours in these tests and therefore seems to live
    repo = Repository.open(place, cache=cache, key=KEY)
    listed = {point.id: point for point in repo.points()}
    assert acknowledged <= listed.keys()
    for name, point in listed.items():
        if name in points:
            assert read(repo, point.disks[0].map) == expect(points[name])
    report = check(repo, read_data=True)
    assert report.ok, report
    # Everything goes on from here.
    after = take(repo, "after", {1: 1}, base=listed["p2"].disks[0].map, parent="p2", second=60)
    merge(repo, at_least=2)
    collected = gc(repo)
    assert not collected.waiting
    again = gc(repo)
    assert not again.condemned_packs
    assert not again.deleted_packs
    assert read(repo, after) == expect(points["p2"] | {1: 1})
    report = check(repo, read_data=True)
    assert report.ok, report
    repo.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("work", [capture, collect, join])
@pytest.mark.parametrize("fault", [Fault.CRASH_BEFORE, Fault.CRASH_AFTER])
def test_death_at_every_operation(tmp_path, work, fault):
    """P5-09: nothing acknowledged is lost, nothing half-done is seen."""
    place, points, base = prepared(tmp_path)
    for number in itertools.count(1):
        copy, expected, acknowledged = copy_of(place), dict(points), {"p2", "p3"}
        faulty = Faulty(copy, at(number, fault))
        crashed = False
        try:
            repo = Repository.open(faulty, cache=tmp_path / f"c-{number}", key=KEY)
            work(repo, expected, base, acknowledged)
        except Crashed:
            crashed = True
        assert_whole(copy, tmp_path / f"d-{number}", expected, acknowledged)
        if not crashed:
            break
    assert number > 10


@pytest.mark.timeout(120)
@pytest.mark.parametrize("work", [capture, collect, join])
@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.LOSE, Fault.NO_SPACE])
def test_error_at_every_operation(tmp_path, work, fault):
    """A full or failing store: an error of ours, and the same promises."""
    place, points, base = prepared(tmp_path)
    for number in itertools.count(1):
        copy, expected, acknowledged = copy_of(place), dict(points), {"p2", "p3"}
        faulty = Faulty(copy, at(number, fault))
        with contextlib.suppress(RewindError):
            with Repository.open(faulty, cache=tmp_path / f"c-{number}", key=KEY) as repo:
                work(repo, expected, base, acknowledged)
        assert_whole(copy, tmp_path / f"d-{number}", expected, acknowledged)
        if len(faulty.operations) < number:
            break


def test_a_failed_upload_poisons_the_writer(tmp_path):
    place = MemoryBackend(f"crash-{next(_names)}")
    Repository.create(place, cache=tmp_path, key=None).close()
    faulty = Faulty(place, lambda op: Fault.NO_SPACE if op.kind == "put" and op.name.startswith("packs/") else None)
    repo = Repository.open(faulty, cache=tmp_path, key=None)
    writer = repo.writer()
    writer.put(b"x")
    for _ in range(2):
        with pytest.raises(NoSpace):
            writer.flush()
    with pytest.raises(NoSpace):
        writer.put(b"y")
    writer.close()
    assert not list(place.list("locks/"))


CHILD = """
import os, sys
from pathlib import Path
from appliance.store import Key, Repository, open_backend
from tests.support.store import take
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
repo = Repository.open(open_backend(str(folder / "r")), cache=folder / sys.argv[3], key=Key(bytes(range(32))))
base, parent, state = None, None, {}
for step in range(int(sys.argv[4])):
    letters = {(seed * 7 + step * 3 + i) % 100: 1 + (seed + step * 5 + i) % 60 for i in range(4)}
    name = f"{seed:02x}{step:04x}"
    base = take(repo, name, letters, base=base, parent=parent, second=seed * 1000 + step)
    parent = name
    print(name, flush=True)
repo.close()
"""


def child(folder, seed, cache, steps):
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(seed), cache, str(steps)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}, cwd=root,
    )  # fmt: skip


def states(seed, steps):
    found, state = {}, {}
    for step in range(steps):
        state = state | {(seed * 7 + step * 3 + i) % 100: 1 + (seed + step * 5 + i) % 60 for i in range(4)}
        found[f"{seed:02x}{step:04x}"] = state
    return found


@pytest.mark.timeout(120)
def test_two_processes_write_while_a_third_collects(tmp_path):
    """P5-09: two writers of the same content at once, with gc and merge beside them; one cache or two."""
    repo = Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path / "gc", key=KEY)
    children = [child(tmp_path, 1, "c1", 25), child(tmp_path, 2, "c1", 25), child(tmp_path, 3, "c3", 25)]
    waited = 0
    while any(one.poll() is None for one in children):
        for point in repo.points()[:-6:2]:
            # Parents stay: a point's base is the newest of its writer.
            newest = max(other.id for other in repo.points() if other.id[:2] == point.id[:2])
            if point.id != newest:
                repo.delete_point(point.id)
        waited += len(gc(repo).waiting)
        merge(repo, at_least=6)
        time.sleep(0.02)
    assert [one.wait() for one in children] == [0, 0, 0]
    gc(repo)
    expected = states(1, 25) | states(2, 25) | states(3, 25)
    assert {"010018", "020018", "030018"} <= {point.id for point in repo.points()}
    for point in repo.points():
        assert read(repo, point.disks[0].map) == expect(expected[point.id])
    report = check(repo, read_data=True)
    assert report.ok, report
    repo.close()


@pytest.mark.timeout(120)
def test_kill_at_random_moments(tmp_path):
    """P5-09: kill -9 of a capturing process; its lock does not stop the next one."""
    chance = random.Random(5)
    repo = Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path / "c0", key=KEY)
    expected, acknowledged = {}, set()
    for seed in range(6):
        process = child(tmp_path, seed, "c1", 400)
        seen = []
        stop = time.monotonic() + 1.5 + chance.random()
        # The first of them may need all of this time to begin.
        while (time.monotonic() < stop or len(seen) < 4) and (line := process.stdout.readline()):
            seen.append(line.strip())
        os.kill(process.pid, signal.SIGKILL)
        seen += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        acknowledged |= set(seen)
        expected |= states(seed, 400)
        listed = {point.id: point for point in repo.points()}
        assert acknowledged <= listed.keys()
        report = gc(repo)
        assert not report.waiting
        for name in chance.sample(sorted(listed), 3):
            assert read(repo, listed[name].disks[0].map) == expect(expected[name])
    assert acknowledged
    with contextlib.suppress(Locked):
        merge(repo)
    report = check(repo, read_data=True)
    assert report.ok, report
    repo.close()
