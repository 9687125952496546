"""The day of continuous capture in minutes holds what its trace wrote; only memory has a limit here."""

from __future__ import annotations

import pytest

from appliance.units import MiB
from tests.bench import day


def checked(minutes, keep, instants):
    """The instants are held against the trace by `day` itself."""
    found = day.day(minutes, keep, instants, print)
    print(found)
    assert found["left_undone"] == 0
    # Of each minute one point at least, and those that were asked for came later.
    assert found["points"] == minutes + 1
    assert found["to_first_byte_seconds"]["all"]["instants"] == instants
    # Records that points stand for have gone, here and in the repository.
    assert found["spool_bytes"] < found["journal_bytes"] * (keep / 60 + 2) / minutes * 2
    assert found["segments_bytes"] < found["shipped_bytes"]
    assert max(found["tending_peak_rss_bytes"], found["reach_peak_rss_bytes"]) < 300 * MiB
    return found


@pytest.mark.timeout(120)
def test_twelve_minutes():
    """P5-27, P5-28: every write of the last three, of the others a point each minute."""
    checked(12, 180.0, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_day():
    """P5-27, P5-28: with the settings as they are."""
    found = checked(24 * 60, 4 * 3600.0, 200)
    assert found["first_byte_p99_seconds"] < 10
