"""A random walk over everything that a domain's history knows, against a model of bytes (A2).

Steps: guest writes and zeroes, points, deletes of points, gc, growing a disk, reverts back and forward (plain,
instant, in the background, shut off), undo, roll back, kills of the view, the keeper and QEMU in the middle. After
each step the guest reads random places; at the end the images and every listed point are compared with the model,
byte for byte.
"""

import os
import random
import time

import pytest

from appliance.errors import NothingToResume, NothingToUndo, RewindError
from appliance.hypervisor import connect
from appliance.restore.intent import Phase
from appliance.store.gc import gc
from appliance.units import CHUNK, chunks_of
from tests.support.revert_bench import Bench


class Walk:
    """The steps, and what they must have done to the model."""

    def __init__(self, seed):
        self.rand = random.Random(seed)
        self.log = []
        self.b = Bench(targets=("vda", "vdb"), size=(6 << 20) - 512 * 5, seed=seed)
        self.b.start()
        self.last = None  # (point, models before) of the last revert
        self.b.scribble(10)
        self.b.point()

    def step(self):
        steps = {"write": 6, "point": 4, "revert": 4, "undo": 1, "delete": 1, "gc": 1, "grow": 1, "background": 2,
                 "roll_back": 1, "power_cut": 1, "offline": 1}  # fmt: skip
        name = self.rand.choices(list(steps), list(steps.values()))[0]
        self.log.append(name)
        getattr(self, name)()
        if self.b.machine.process.poll() is None:
            assert self.b.reads_right(4), self.log

    def write(self):
        self.b.scribble(self.rand.randrange(1, 12), longest=2)

    def point(self):
        self.b.point()

    def _any_point(self):
        return self.b.repo.point(self.rand.choice(list(self.b.points)))

    def _begun(self, point):
        self.last = {target: bytes(model) for target, model in self.b.models.items()}
        self._at(self.b.points[point.id])

    def _at(self, content):
        """The models become that, at the size that the disks have now."""
        for target, data in content.items():
            size = len(self.b.models[target])
            self.b.models[target] = bytearray(data[:size].ljust(size, b"\0"))

    def _listed(self, result):
        """The safety point is an ordinary one."""
        self.b.points[result.safety_point] = dict(self.last)

    def revert(self):
        point = self._any_point()
        result = self.b.reverter().revert(point, instant=self.rand.random() < 0.5)
        self._begun(point)
        self._listed(result)

    def undo(self):
        if self.last is None:
            with pytest.raises(NothingToUndo):
                self.b.reverter().undo()
            return
        content = self.last
        result = self.b.reverter().undo(instant=self.rand.random() < 0.5)
        self.last = {target: bytes(model) for target, model in self.b.models.items()}
        self._at(content)
        self._listed(result)

    def delete(self):
        record = self.b.record()
        free = [p for p in self.b.points if p not in (record.last_point, record.parent) and not self._pinned(p)]
        if len(free) > 2:
            victim = self.rand.choice(free)
            self.b.repo.delete_point(victim)
            del self.b.points[victim]

    def _pinned(self, point):
        intent = self.b.intent()
        return intent is not None and point in (intent.point, intent.safety_point)

    def gc(self):
        gc(self.b.repo, False, lambda *_: None)

    def grow(self):
        target = self.rand.choice(list(self.b.models))
        more = 512 * self.rand.randrange(1, 400)
        size = len(self.b.models[target]) + more
        self.b.machine.monitor.execute("block_resize", node_name=target.upper(), size=size)
        self.b.models[target] += bytes(more)

    def background(self):
        """Begun, written on, and one of us killed."""
        point = self._any_point()
        result = self.b.reverter().revert(point, instant=True, background=True, rate=4 << 20)
        self._begun(point)
        self._listed(result)
        self.b.domain.close()
        for _ in range(3):
            self.b.scribble(1, longest=1)
            self.b.kill(*self.rand.sample(["view", "keeper"], self.rand.randrange(3)))
        self._resume("done")

    def roll_back(self):
        point = self._any_point()
        result = self.b.reverter().revert(point, instant=True, background=True, rate=1 << 19)
        before = {target: bytes(model) for target, model in self.b.models.items()}
        self.b.points[result.safety_point] = before
        self.b.kill("keeper")
        while self.b.keeper_pid() is not None:
            time.sleep(0.02)
        if self.b.intent().phase is Phase.SWITCHED:
            self._resume("rolled-back", roll_back=True)
            self.last = None
            return
        self._resume("done")
        self._begun(point)

    def _resume(self, ending, **options):
        self.b.domain.close()
        self.b.domain = connect(self.b.uri).domain("bare")
        try:
            assert self.b.reverter().resume(**options).state == ending
        except NothingToResume:
            assert self.b.intent().phase is Phase.DONE

    def power_cut(self):
        """QEMU killed in the middle of a revert; the guest's flushed writes survive, and it starts again."""
        point = self._any_point()
        result = self.b.reverter().revert(point, instant=True, background=True, rate=2 << 20)
        self._begun(point)
        self._listed(result)
        self.b.domain.close()
        self.b.scribble(2, longest=1)
        for target in self.b.models:
            self.b.machine.hmp(target, "flush")
        self.b.kill("qemu", *self.rand.sample(["view", "keeper"], self.rand.randrange(3)))
        self._resume("done")
        self._restart()

    def offline(self):
        """Shut off, taken elsewhere, started again."""
        self.b.domain.close()
        self.b.machine.quit()
        point = self._any_point()
        result = self.b.reverter().revert(point)
        assert result.mode == "offline"
        self._begun(point)
        self._listed(result)
        self._restart()

    def _restart(self):
        if self.b.machine.process.poll() is None:
            return
        self.b.machine.monitor.close()
        self.b.machine.start()
        self.b.domain = connect(self.b.uri).domain("bare")

    def finish(self):
        """Every listed point and both images, byte for byte."""
        b = self.b
        listed = {point.id for point in b.repo.points(b.uuid)}
        assert set(b.points) <= listed
        for point, content in b.points.items():
            found = b.repo.point(point)
            for target, data in content.items():
                held = b.repo.map(found.disk(target).map)
                for index in range(chunks_of(len(data))):
                    chunk = held.get(index)
                    got = b.repo.read_chunk(chunk) if chunk else bytes(CHUNK)
                    want = data[index * CHUNK : (index + 1) * CHUNK].ljust(CHUNK, b"\0")
                    assert got == want, (self.log, point, target, index)
        if b.machine.process.poll() is None:
            b.domain.close()
            b.machine.quit()
        assert b.images_equal() == [], self.log


def walk(seed, steps):
    """One walk; the steps are in the message if anything is wrong."""
    one = Walk(seed)
    try:
        for _ in range(steps):
            try:
                one.step()
            except RewindError as error:
                raise AssertionError(f"seed {seed}: {error!r} after {one.log}") from error
        one.finish()
    finally:
        one.b.close()
    return one.log


@pytest.mark.timeout(170)
def test_a_walk():
    """A2 P5-17 P5-18: the same steps in each run of the tests; the soak takes others."""
    seed = int(os.environ.get("REWIND_SEED", "20261124"))
    print("seed", seed, walk(seed, 12))


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_walks():
    """A2: until it is told to stop, or for a thousand walks."""
    for seed in range(1000):
        print("seed", seed, walk(seed, 60), flush=True)
