"""A domain under continuous capture against a model: whatever happens to it and to us, every record of every branch
that the ledger claims reads back, and a revert to any of them leaves that state (P5-01, P5-23, P5-31, P5-37, P5-39)."""

from __future__ import annotations

import collections
import os
import random
import tempfile
from pathlib import Path

import pytest

from tests.support.taphistory import TappedHistory

# What happens between bursts of writes, and how often.
STEPS = {
    "revert": 30, "torn_revert": 16, "undo": 6, "point": 8, "tap": 4, "journal": 4, "hang": 2, "cycle": 2, "crash": 4,
    "point_off": 2, "paused": 3, "torn_point": 3, "delete": 3, "collect": 2, "grow": 2, "lose_cache": 1,
    "begun_anew": 1, "look": 12,
}  # fmt: skip
VICTIMS = ("ours", "view", "qemu", "tap", "journal", "hang", "tap ours", "ours qemu", "journal view", "all")
SIZES = {"vda": 2 << 20, "vdbr": (1 << 20) + 512}


def run(history: TappedHistory, reverts: int) -> collections.Counter:
    """Random steps until so many reverts were made. Returns how often each was taken."""
    taken: collections.Counter = collections.Counter()
    while taken["revert"] + taken["torn_revert"] + taken["undo"] < reverts:
        name = history.random.choices(list(STEPS), list(STEPS.values()))[0]
        history.note(name)
        history.burst(history.random.randrange(5, 40))
        if name == "torn_revert":
            victim = history.random.choice(VICTIMS)
            taken[f"{victim} killed: {history.revert(kill=victim)}"] += 1
        elif name == "undo":
            history.revert(undo=True)
        elif name in ("tap", "journal", "hang"):
            history.strike(name)
        else:
            getattr(history, name)()
        taken[name] += 1
        history.burst(history.random.randrange(5))
        history.await_attached()
        history.look_at_unseen()
        print(name, end=" ", flush=True)
    return taken


def prove(history: TappedHistory, numbers: int) -> None:
    """All that can be promised at the end: every point, many records of all branches, and the disks themselves."""
    history.burst(10)
    history.check_confirmed()
    found = history.reachable()
    for number in history.random.sample(found, min(numbers, len(found))):
        history.check_number(number)
    history.check_all_points()
    history.power_off()
    history.check_disks()


def told(history: TappedHistory, taken: collections.Counter) -> str:
    ledger, known = history.ledger(), len(history.tale.numbers)
    return (
        f"{dict(taken)}\n{history.tale.length} writes, {known} numbers, {len(history.reachable())} reachable, "
        f"{history.looked} looked at, {history.unseen} of them behind the end of a span, {len(ledger.spans())} spans, "
        f"{len(ledger.branches())} branches"
    )


@pytest.fixture
def short_path():
    """pytest's own folders are too long for the sockets below them."""
    with tempfile.TemporaryDirectory(prefix="tapmodel-") as folder:
        yield Path(folder)


@pytest.mark.timeout(300)
def test_every_record_of_every_branch_can_be_reverted_to(short_path):
    """One history, the seed fixed, so that a failure speaks of the change at hand; new ones are for the soak."""
    seed = int(os.environ.get("REWIND_TEST_SEED", "20261124"))
    print(f"REWIND_TEST_SEED={seed}")
    history = TappedHistory(short_path, seed, SIZES)
    try:
        taken = run(history, int(os.environ.get("REWIND_TEST_REVERTS", "8")))
        prove(history, 40)
        print(told(history, taken))
    finally:
        history.end()


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("iothread", [False, True])
def test_two_hundred_reverts_with_kills(short_path, iothread):
    """`REWIND_TEST_SEED` and `REWIND_TEST_REVERTS` choose another history."""
    seed = int(os.environ.get("REWIND_TEST_SEED") or random.randrange(1 << 32))
    print(f"REWIND_TEST_SEED={seed}", flush=True)
    history = TappedHistory(short_path, seed, SIZES, iothread=iothread)
    try:
        taken = run(history, int(os.environ.get("REWIND_TEST_REVERTS", "200")))
        prove(history, 200)
        print(told(history, taken), flush=True)
    finally:
        history.end()
