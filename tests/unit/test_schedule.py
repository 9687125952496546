"""What is due, by a clock that is passed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.daemon.shared import pause
from appliance.schedule import Task, due, next_time

NOW = 1_000_000.0


def task(**values):
    return Task(**({"uuid": "u", "domain": "web", "every": 60.0} | values))


def test_a_domain_without_points_is_due_at_once():
    """P5-23: points every n seconds."""
    assert due([task()], NOW) == [task()]


def test_it_is_due_one_interval_after_the_last_point():
    assert next_time(task(last=NOW - 10), NOW) == NOW + 50
    assert not due([task(last=NOW - 59)], NOW)
    assert due([task(last=NOW - 60)], NOW)


def test_missed_intervals_are_not_made_up_for():
    """After a night off one point is taken, and the next one an interval later."""
    late = task(last=NOW - 3600)
    assert due([late], NOW) == [late]
    assert next_time(task(last=NOW), NOW) == NOW + 60


def test_the_one_that_waits_longest_comes_first():
    one, two, three = (task(uuid=name, last=NOW - age) for name, age in (("a", 70), ("b", 90), ("c", 80)))
    assert due([one, two, three], NOW) == [two, three, one]


def test_failures_back_off_up_to_an_hour():
    waits = [next_time(task(last=NOW - 90, tried=NOW, failures=count), NOW) - NOW for count in range(1, 12)]
    assert waits[:3] == [30, 60, 120]
    assert max(waits) == 3600
    assert waits == sorted(waits)


def test_weeks_of_failures_are_an_hour_each():
    """The power alone is too much for a number after a thousand of them: it ended the daemon, for all domains."""
    assert next_time(task(last=NOW - 90, tried=NOW, failures=5000), NOW) - NOW == 3600
    assert pause(5000) == 3600


def test_a_failure_of_a_moment_costs_no_interval():
    """libvirt was started anew, say."""
    failed = task(every=86400, last=NOW - 90000, tried=NOW, failures=1)
    assert next_time(failed, NOW) - NOW == 60


def test_a_clock_set_back_makes_due_instead_of_silent():
    assert due([task(last=NOW + 500)], NOW)
    assert due([task(last=NOW + 500, tried=NOW + 400, failures=3)], NOW)


@given(
    st.floats(1, 1e6),
    st.one_of(st.none(), st.floats(0, 2e6)),
    st.one_of(st.none(), st.floats(0, 2e6)),
    st.integers(0, 50),
)
def test_nobody_waits_longer_than_an_interval_or_an_hour(every, last, tried, failures):
    wait = next_time(task(every=every, last=last, tried=tried, failures=failures), NOW) - NOW
    assert wait <= max(every, 3600)
