"""The whole product against a model: whatever a guest and an admin do, every listed point reads back as it was, and a
revert leaves one state, never a mix (P5-04, P5-17, P5-18, P5-35, P5-36, P5-37, P5-39, P5-41)."""

from __future__ import annotations

import collections
import os
import random
import tempfile
from pathlib import Path

import pytest

from tests.support.history import History

# What happens, and how often. A seed and a number of steps tell the whole story of a failure.
STEPS = {
    "write": 1200, "zero": 160, "discard": 80, "point": 40, "delete": 16, "collect": 6, "grow": 5, "cycle": 6,
    "crash": 6, "lose_cache": 4, "point_off": 6, "revert": 14, "undo": 6, "torn_revert": 12, "torn_point": 6,
    "read": 20,
}  # fmt: skip
VICTIMS = ("ours", "view", "qemu", "ours qemu", "all")


def run(history: History, steps: int) -> collections.Counter:
    """Take `steps` random steps. Returns how often each was taken."""
    taken: collections.Counter = collections.Counter()
    for _ in range(steps):
        name = history.random.choices(list(STEPS), list(STEPS.values()))[0]
        history.note(name)
        if name == "torn_revert":
            victim = history.random.choice(VICTIMS)
            taken[f"{victim} killed: {history.revert(kill=victim)}"] += 1
        elif name == "undo":
            history.revert(undo=True)
        else:
            getattr(history, name)()
        taken[name] += 1
    history.check_graph()
    history.check_all_points()
    history.power_off()
    history.check_disks()
    return taken


@pytest.fixture
def short_path():
    """pytest's own folders are too long for the sockets below them."""
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        yield Path(folder)


@pytest.mark.timeout(600)
def test_a_domain_keeps_its_promises(short_path):
    """About two thousand steps of one history. The seed is fixed, so that a failure speaks of the change at hand; new
    histories are for the soak."""
    seed = int(os.environ.get("REWIND_TEST_SEED", "3915505631"))
    print(f"REWIND_TEST_SEED={seed}")
    history = History(short_path, seed, {"vda": 4 << 20, "vdbr": (3 << 20) + 512})
    try:
        print(dict(run(history, int(os.environ.get("REWIND_TEST_STEPS", "2000")))))
    finally:
        history.kill()


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_domain_keeps_its_promises_for_hours(short_path):
    """Unbounded unless REWIND_SOAK_ROUNDS says how many histories."""
    rounds = int(os.environ.get("REWIND_SOAK_ROUNDS", "0"))
    number = 0
    while not rounds or number < rounds:
        seed = random.randrange(1 << 32)
        print(f"REWIND_TEST_SEED={seed}", flush=True)
        (folder := short_path / str(number)).mkdir()
        history = History(folder, seed, {"vda": 4 << 20, "vdbr": (3 << 20) + 512, "vdc": 1 << 20})
        try:
            print(dict(run(history, 3000)), flush=True)
        finally:
            history.kill()
        number += 1
