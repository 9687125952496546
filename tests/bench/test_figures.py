"""The arithmetic of the figures: a wrong ratio would be believed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.bench import disk, figures
from tests.bench.measure import Cost, measure

CHUNK = 64 << 10


def cost(seconds: float, cpu: float, rss: int = 0) -> Cost:
    return Cost(seconds, cpu, rss, rss)


def test_every_other_round_goes_backwards():
    """A8: contenders take turns ABBA."""
    rounds = [figures.order("AB", number) for number in range(4)]
    assert "".join(name for one in rounds for name in one) == "ABBAABBA"


def test_medians_rates_and_peaks():
    """A8: MB/s, processor seconds per GiB, peak memory."""
    found = figures.summary([cost(4, 8, 10), cost(2, 6, 30), cost(100, 7, 20)], 2 << 30)
    assert found["seconds"] == 4
    assert found["cpu_seconds_per_gib"] == 3.5
    assert found["mb_per_second"] == pytest.approx((2 << 30) / 4e6, abs=0.1)
    assert found["peak_rss_bytes"] == 30
    assert [one["cpu_seconds"] for one in found["rounds"]] == [8, 6, 7]


def test_nothing_is_divided_by_nothing():
    found = figures.summary([cost(0, 0)], 0)
    assert found["mb_per_second"] is None
    assert found["cpu_seconds_per_gib"] is None
    assert figures.against([cost(1, 1)], [cost(0, 0)]) == {"seconds": None, "cpu_seconds": None}


def test_ratios_are_of_one_round_each():
    """A8: paired. The slow round of both is 1:1 and must not be hidden by the fast ones."""
    mine, theirs = [cost(2, 1), cost(30, 1), cost(3, 1)], [cost(1, 2), cost(30, 4), cost(1, 2)]
    found = figures.against(mine, theirs)
    assert found["seconds"] == {"median": 2, "lowest": 1, "highest": 3}
    assert found["cpu_seconds"] == {"median": 0.5, "lowest": 0.25, "highest": 0.5}


def test_who_gave_up_is_not_compared():
    costs = {"rewind": [cost(1, 1), cost(1, 1)], "borg": [cost(2, 2)]}
    assert list(figures.complete(costs)) == ["rewind"]
    assert figures.complete({}) == {}


def test_goals_are_told_only_where_there_are_figures():
    costs = {"rewind": [cost(3, 3)], "nbdcopy": [cost(1, 1)], "disk": [cost(2, 1)], "borg": [cost(6, 2)]}
    rows = [
        figures.row("first_full", costs, 1, {}),
        figures.row("epoch", {"rewind": [cost(1, 1)]}, 1, {"moved_per_dirty": 1.0}),
        figures.row("revert_live", {"rewind": [cost(1, 1)]}, 1, {"moved_per_changed": 1.05}),
        figures.row("revert_offline", {"rewind": [cost(1, 1)]}, 1, {"moved_per_changed": 1.2}),
    ]
    told = {one["goal"]: one for one in figures.goals({"rows": rows, "scale": {"points_10000": {"list_seconds": 0.1}}})}
    full = told["first full within 1.5 times the slower of nbdcopy and the disk"]
    assert (full["found"], full["where"], full["met"]) == (1.5, "disk", True)
    assert told["no peer is faster in any row"]["found"] == 0.5
    assert told["no peer needs less processor in any row"] | {"limit": 0} == {
        "goal": "no peer needs less processor in any row", "limit": 0, "found": 1.5, "where": "first_full: borg",
        "met": False,
    }  # fmt: skip
    assert not told["a revert moves at most 1.1 times the changed bytes"]["met"]
    assert told["10 000 points listed in less than 0.2 s"]["met"]
    assert "diff of two 1 TiB instants at 1 % in less than 1 s" not in told
    smaller = {"points_10000": {"list_seconds": 0.1, "reduced": True}}
    assert not [one for one in figures.goals({"rows": [], "scale": smaller}) if "points" in one["goal"]]


def test_a_change_is_one_percent_in_two_sizes():
    size = 256 << 20
    change = disk.change(size, 3)
    assert change.changed == pytest.approx(size / 100, rel=0.05)
    assert {length for _, length in change.granules} == {4096, CHUNK}
    ends = [offset + length for offset, length in change.granules]
    assert all(end <= start for end, (start, _) in zip(ends, change.granules[1:], strict=False))
    assert change.dirty == CHUNK * len(change.granules)
    assert change == disk.change(size, 3) != disk.change(size, 4)


def test_what_is_written_is_new_everywhere(tmp_path):
    size = 16 << 20
    raw = tmp_path / "raw"
    raw.write_bytes(b"text" * (size // 4))
    change = disk.change(size, 1, 0.02)
    blocks = [content[at : at + 2048] for _, content in change.contents(raw) for at in range(0, len(content), 2048)]
    assert len(set(blocks)) == len(blocks)
    assert all(block[16:] == (b"text" * 512)[16:] for block in blocks)


def test_processor_time_of_grandchildren_counts():
    """Also of one that nobody has waited for."""
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {busy!r}])"
    found = measure(lambda: subprocess.run([sys.executable, "-c", script], check=True))
    assert found.cpu >= 0.3
    assert found.rss > 0


def test_a_process_that_was_there_counts_with_its_time_alone():
    busy = "import time\nprint(flush=True)\ninput()\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as lasting:
        lasting.stdout.readline()

        def work():
            lasting.stdin.write(b"\n")
            lasting.stdin.flush()
            lasting.stdout.readline()

        found = measure(work, [lasting.pid])
        lasting.stdin.write(b"\n")
        lasting.stdin.close()
    assert found.cpu >= 0.2
    assert found.rss == 0
