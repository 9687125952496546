"""Reverts with something killed at a random moment: what is there afterwards is the target or the safety point."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance.daemon import Daemon
from appliance.errors import DomainLost, NothingToResume
from appliance.restore import fence
from appliance.restore.intent import Phase
from appliance.service.session import Session
from appliance.service.setup import init
from appliance.service.underway import abandoned
from tests.support.revert_bench import Bench

ROOT = Path(__file__).resolve().parents[2]
KILLED = [("us",), ("us", "keeper"), ("view",), ("qemu",), ("us", "keeper", "view"), ("us", "keeper", "view", "qemu"),
          ("qemu", "view"), ("keeper",)]  # fmt: skip


class Case:
    """One revert in a child process, the guest's writes meanwhile, the kill, and the judgement."""

    def __init__(self, seed, instant=None, **options):
        self.rand = random.Random(seed)
        self.instant = self.rand.random() < 0.6 if instant is None else instant
        options = {"targets": ("vda", "vdb") if seed % 3 == 0 else ("vda",), "size": 8 << 20} | options
        self.b = b = Bench(seed=seed, **options)
        b.start()
        b.scribble(30)
        self.target = b.point()
        b.scribble(25)
        self.before = {target: bytes(model) for target, model in b.models.items()}
        self.wrote = False
        self.in_flight = None
        self.child = None

    def begin(self, rate=2 << 20, die="", also=()):
        """Start the revert; the monitor is the child's now."""
        self.b.hypervisor.close()
        order = {"home": str(self.b.home.path), "spec": self.b.spec.to_json(), "uri": self.b.uri,
                 "point": self.target.id, "instant": self.instant, "rate": rate, "die": die, "also": list(also),
                 "qemu": self.b.machine.process.pid}  # fmt: skip
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.revert_child", json.dumps(order)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=(self.b.folder / "child.log").open("wb"),
        )  # fmt: skip

    def phase(self):
        found = self.b.intent()
        return found.phase if found is not None and found.point == self.target.id else None

    def run_until(self, stop):
        """Let it go on, the guest writing once it runs on the target, until `stop()` or its end."""
        while not stop() and self.child.poll() is None:
            found = self.b.intent()
            if (
                found is not None
                and found.instant
                and found.phase in (Phase.SWITCHED, Phase.MERGING)
                and (found.extra.get("go_on") is False and self.rand.random() < 0.5)
            ):
                self.write()
            time.sleep(0.02)

    def write(self):
        """One guest write, flushed; QEMU may be killed in it, and then its sectors may be old or new."""
        b = self.b
        if not self.wrote:
            b.now_is(self.target)
            self.wrote = True
        self.in_flight = {target: bytes(model) for target, model in b.models.items()}
        try:
            b.scribble(1, longest=1)
            for target in b.models:
                b.machine.hmp(target, "flush")
        except DomainLost:
            return
        self.in_flight = None

    def kill(self, what):
        if "us" in what:
            self.child.kill()
        self.b.kill(*(name for name in what if name != "us"))

    def resume(self, **options):
        """What an admin does: whoever drives now, it ends."""
        if self.child.poll() is None:
            self.child.wait(25)
        b = self.b
        if b.machine.process.poll() is not None:
            b.machine.monitor.close()
        from appliance.hypervisor import connect

        b.hypervisor = connect(b.uri)
        b.domain = b.hypervisor.domain("bare")
        try:
            return b.reverter().resume(**options).state
        except NothingToResume:
            found = b.intent()
            return "nothing" if found is None else "done"

    def judge(self, state):
        """The disks hold the target and the guest's own writes, or what they held before; nothing of ours is left."""
        b = self.b
        reached = state in ("done", "pending")
        if reached and not self.wrote:
            b.now_is(self.target)
        if not reached:
            assert not self.wrote
            b.models = {target: bytearray(model) for target, model in self.before.items()}
        killed = b.machine.process.poll() is not None
        if not killed:
            assert b.machine.monitor.execute("query-status")["running"]
            assert [name for name in b.ours() if name.startswith(("rw-rv", "rw-ep", "rw-hole"))] == []
            assert b.reads_right(5)
            b.hypervisor.close()
            b.machine.quit()
        assert b.images_equal(self.in_flight, killed=killed) == [], state
        assert not fence.stands(b.home, b.uuid)

    def close(self):
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.b.close()


def one(seed):
    """One random case; what was killed when, for the log."""
    case = Case(seed)
    try:
        what = KILLED[seed % len(KILLED)]
        case.begin()
        after = time.monotonic() + 0.6 + case.rand.random() * 3.5
        case.run_until(lambda: time.monotonic() > after)
        phase = case.phase()
        if phase not in (None, Phase.PLANNED, Phase.PIVOTED, Phase.DONE):
            # It may have ended between the two looks.
            assert fence.stands(case.b.home, case.b.uuid) or case.phase() != phase
        case.kill(what)
        state = case.resume()
        case.judge(state)
        return f"{seed}: {'instant' if case.instant else 'plain'} killed {'+'.join(what)} in {phase}: {state}"
    finally:
        case.close()


STEPS = ["save:planned", "after:take", "save:fenced", "after:switch", "after:power_cycle", "save:switched",
         "after:hydrate", "save:merging", "after:wait_ready", "save:pivoting", "after:complete", "save:pivoted",
         "save:done"]  # fmt: skip
ALSO = [(), ("keeper",), ("keeper", "view", "qemu"), ("qemu",)]
BEGUN = STEPS[STEPS.index("save:switched") :]


def stepwise(seed, step, also, instant):
    """One case in which our process dies right after that step."""
    case = Case(seed, instant=instant)
    try:
        case.begin(rate=0, die=step, also=also)
        case.run_until(lambda: False)
        if "qemu" in also:
            case.b.machine.process.wait(10)
        assert case.child.returncode == -9, (case.b.folder / "child.log").read_text()
        state = case.resume()
        case.judge(state)
        if step in BEGUN:
            assert state == "done"
    finally:
        case.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", range(len(STEPS)))
def test_dead_after_each_step(number):
    """A6 P5-34: whoever dies with us, and wherever, `resume` ends it; what had begun ends at the target."""
    stepwise(number, STEPS[number], ALSO[number % len(ALSO)], number % 2 == 0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(1, 4))
def test_killed_at_a_random_moment(seed):
    """A6: view, our process, QEMU and all of them, plain and instant, one and two disks."""
    print(one(seed))


@pytest.mark.timeout(60)
def test_the_daemon_goes_on_when_nobody_is_left():
    """P5-34: as after a power cut; the domain cannot start before, and nobody has to type anything."""
    case, events = Case(7, instant=True), []
    try:
        case.begin(rate=0, die="save:switched", also=("keeper", "view", "qemu"))
        case.run_until(lambda: False)
        case.b.machine.process.wait(10)
        with Session(case.b.home) as session:
            init(session, f"file://{case.b.folder}/repo", encrypt=False)
            assert [one.domain for one in abandoned(session)] == ["bare"]
            Daemon(session, events.append).round()
            assert [(one.kind, one.domain) for one in events] == [("resumed", "bare")], events
        case.judge("done")
    finally:
        case.close()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_dead_after_each_step_with_everybody():
    """A6: the whole matrix."""
    for number, step in enumerate(STEPS[int(os.environ.get("REWIND_FROM", "0")) :]):
        for also in ALSO:
            for instant in (False, True):
                print(number, step, also, instant, flush=True)
                stepwise(number, step, also, instant)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_a_hundred_times():
    """A6."""
    for seed in range(100, 200):
        print(one(seed), flush=True)
