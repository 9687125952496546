"""The arithmetic of `./dev bench tap`."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from tests.bench import tap_figures
from tests.bench.measure import cpu_clock
from tests.bench.tap_figures import CELLS, Cell, Turn

SMALL, LARGE = Cell("4k-random-1", "randwrite", 4096, 1), Cell("64k-random-1", "randwrite", 65536, 1)


def turn(p50=100.0, iops=1000.0, written=1 << 30, recorded=0, qemu=1.0, sink=1.0, p99=200.0):
    return Turn(iops, written, p50, p99, qemu, sink, recorded, 0.0)


def test_all_patterns_are_measured_once():
    """B5: 4 KiB and 64 KiB random, 1 MiB sequential, depth 1, 16, 32."""
    assert len({cell.name for cell in CELLS}) == 9
    assert {(cell.block, cell.kind, cell.depth) for cell in CELLS} == {
        (block, kind, depth)
        for block, kind in ((4096, "randwrite"), (65536, "randwrite"), (1 << 20, "write"))
        for depth in (1, 16, 32)
    }


def test_processor_time_is_for_a_gib_of_the_guest():
    found = tap_figures.summary([turn(written=1 << 29, qemu=2, sink=1), turn(written=1 << 30, qemu=4, sink=2)])
    assert found["cpu_seconds_per_gib"] == {"qemu": 4, "sink": 2}
    assert "journal_bytes_per_byte" not in found


def test_journal_bytes_are_of_all_rounds_together():
    """P5-23: the journal's bytes for a byte of the guest."""
    found = tap_figures.summary([turn(written=100, recorded=110), turn(written=900, recorded=910)])
    assert found["journal_bytes_per_byte"] == 1.02


def test_a_round_is_compared_with_itself():
    """A slow round of both is 1:1 and must not be hidden, nor made ours."""
    mine = [turn(p50=110), turn(p50=2000, iops=50), turn(p50=120)]
    floor = [turn(p50=100), turn(p50=2000, iops=50), turn(p50=100)]
    found = tap_figures.against(mine, floor)
    assert found["p50"] == {"median": 1.1, "lowest": 1.0, "highest": 1.2}
    assert found["throughput"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}


def test_nothing_is_compared_with_a_sink_that_is_not_there():
    assert tap_figures.against([turn()], [turn(sink=0)])["sink_cpu"] is None


def test_goals_name_the_worst_cell_and_all_that_miss():
    """B5: 1.10 of the floor's p50, 0.9 of its throughput, 1.03 bytes at 4 KiB, 1.02 at 64 KiB."""
    floor = [turn()]
    found = {
        SMALL: {"none": floor, "floor": floor, "tap": [turn(p50=111, iops=900, recorded=int(1.03 * (1 << 30)))]},
        LARGE: {"none": floor, "floor": floor, "tap": [turn(p50=110, iops=890, recorded=int(1.021 * (1 << 30)))]},
    }
    p50, throughput, small, large = tap_figures.goals(tap_figures.cells(found))
    assert (p50["worst"], p50["where"], p50["missed"], p50["met"]) == (1.11, "4k-random-1", ["4k-random-1"], False)
    assert (throughput["worst"], throughput["missed"]) == (0.89, ["64k-random-1"])
    assert small["met"] and small["worst"] == 1.03
    assert large["missed"] == ["64k-random-1"]


def test_the_processor_clock_of_another_process():
    """Also threads that have ended count; /proc would tell no less than 10 ms."""
    with subprocess.Popen(["sh", "-c", "read x; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo; read x"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdin and child.stdout
        before = cpu_clock(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        used = cpu_clock(child.pid) - before
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.wait()
    assert 0.001 < used < 30
    own = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    assert cpu_clock(os.getpid()) == pytest.approx(own, abs=0.5)
