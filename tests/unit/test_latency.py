"""When recording is too slow for a guest, by the journal's own statistics."""

from __future__ import annotations

from appliance.capture.latency import Latency


class Journal:
    """Adds up as the journal does: requests by the upper bound of their time in microseconds."""

    def __init__(self):
        self.counts = {}

    def add(self, below, count):
        self.counts[below] = self.counts.get(below, 0) + count
        return {"latency": {"histogram": [[one, self.counts[one]] for one in sorted(self.counts)]}}


def test_only_a_row_of_slow_intervals_counts():
    """P5-42: what is measured is the last interval, not all since the beginning."""
    journal, latency = Journal(), Latency(0.005)
    latency.measure(journal.add(100, 10_000))
    for _ in range(4):
        latency.measure(journal.add(8192, 100))
        assert latency.verdict() == ""
    latency.measure(journal.add(8192, 100))
    assert "8.19 ms" in latency.verdict() and "5 ms are allowed" in latency.verdict()


def test_one_fast_interval_in_between_begins_anew():
    """P5-42."""
    journal, latency = Journal(), Latency(0.005)
    for _ in range(4):
        latency.measure(journal.add(8192, 100))
    latency.measure(journal.add(100, 100))
    assert latency.p99 == 100e-6
    for _ in range(4):
        latency.measure(journal.add(8192, 100))
    assert latency.verdict() == ""


def test_few_requests_are_collected_until_they_say_something():
    """P5-42: a guest that writes now and then is judged by several intervals together."""
    journal, latency = Journal(), Latency(0.005)
    latency.measure(journal.add(100, 50))
    for _ in range(3):
        latency.measure(journal.add(8192, 5))
    assert latency.p99 == 100e-6
    latency.measure(journal.add(8192, 5))
    assert latency.p99 == 8192e-6


def test_nothing_is_too_slow_without_a_limit():
    """P5-42."""
    journal, latency = Journal(), Latency(None)
    for _ in range(10):
        latency.measure(journal.add(1 << 20, 100))
    assert latency.verdict() == "" and latency.p99 > 1
