"""Which recovery points the rules keep."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import ConfigError
from appliance.timeline.retention import Policy, is_safety, plan

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


@dataclass(frozen=True)
class P:
    id: str
    time: datetime
    reason: str = "schedule"
    label: str = ""


def every(step: timedelta, count: int, newest: datetime = NOW) -> list[P]:
    """Oldest first; the id is the number of steps before the newest."""
    return [P(str(number), newest - number * step) for number in reversed(range(count))]


def kept(points, zone=UTC, now=NOW, **policy) -> list[str]:
    return [one.point.id for one in plan(points, Policy(**policy), now, zone) if one.keep]


def test_last_keeps_the_newest():
    assert kept(every(DAY, 10), last=3) == ["2", "1", "0"]
    assert kept(every(DAY, 2), last=3) == ["1", "0"]
    assert kept([], last=3) == []


def test_a_day_keeps_its_newest_point():
    """Every 6 hours, the newest at noon: 12:00 of today, 18:00 of each day before."""
    points = every(timedelta(hours=6), 40)
    assert kept(points, daily=3) == ["7", "3", "0"]
    reasons = {one.point.id: one.reasons for one in plan(points, Policy(daily=3), NOW, UTC)}
    assert reasons["3"] == ("daily 2026-11-23",)
    assert reasons["4"] == ("no rule keeps it",)


def test_only_days_with_points_count():
    points = [P("old", NOW - 300 * DAY), P("older", NOW - 400 * DAY), P("oldest", NOW - 500 * DAY), P("new", NOW)]
    assert kept(points, daily=3) == ["older", "old", "new"]
    assert kept(points, yearly=2) == ["older", "new"]


@pytest.mark.parametrize(
    ("rule", "step", "expected"),
    [
        ("hourly", timedelta(minutes=20), ["4", "1", "0"]),  # 12:00, 11:40, 10:40
        ("weekly", DAY, ["9", "2", "0"]),  # a Tuesday, and the two Sundays before
        ("monthly", DAY, ["55", "24", "0"]),  # 24 November, 31 October, 30 September
        ("yearly", 30 * DAY, ["24", "11", "0"]),  # 24 November 2026, 29 December 2025, 4 December 2024
    ],
)
def test_spans_are_those_of_the_calendar(rule, step, expected):
    assert kept(every(step, 60), **{rule: 3}) == expected


def test_the_week_that_ends_a_year_is_one_week():
    """2026-12-31 is a Thursday of week 53, as is 2027-01-03."""
    newest = datetime(2027, 1, 3, 12, tzinfo=UTC)
    assert kept(every(DAY, 8, newest), now=newest, weekly=2) == ["7", "0"]


def test_a_young_history_keeps_its_beginning():
    points = every(timedelta(hours=1), 10)
    assert kept(points, yearly=3) == ["9", "0"]
    reasons = {one.point.id: one.reasons for one in plan(points, Policy(yearly=3), NOW, UTC)}
    assert reasons["9"] == ("oldest for yearly",)
    assert kept(points, yearly=1) == ["0"]


def test_days_are_local():
    """23:30 and 00:30 in Berlin are one day in UTC and two there."""
    points = [
        P("a", datetime(2026, 11, 20, 12, 0, tzinfo=UTC)),
        P("b", datetime(2026, 11, 22, 22, 30, tzinfo=UTC)),
        P("c", datetime(2026, 11, 22, 23, 30, tzinfo=UTC)),
    ]
    assert kept(points, daily=2) == ["a", "c"]
    assert kept(points, ZoneInfo("Europe/Berlin"), daily=2) == ["b", "c"]


def test_the_hour_that_comes_twice_is_two_hours():
    points = [
        P("first", datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
        P("second", datetime(2026, 10, 25, 1, 30, tzinfo=UTC)),
    ]
    points.insert(0, P("before", points[0].time - DAY))
    assert kept(points, ZoneInfo("Europe/Berlin"), hourly=2) == ["first", "second"]


def test_within_counts_from_the_newest_point():
    """P5-34: after a month in which nothing was taken, the rule must not drop all there is."""
    points = every(DAY, 10, NOW - 30 * DAY)
    assert kept(points, within=2 * 86400) == ["2", "1", "0"]


def test_a_point_of_the_future_does_not_make_all_others_old():
    """A9: a stepped clock."""
    points = [*every(DAY, 3), P("future", NOW + 900 * DAY)]
    assert kept(points, within=86400) == ["1", "0", "future"]


def test_without_rules_everything_stays():
    decisions = plan(every(DAY, 3), Policy(), NOW, UTC)
    assert [one.reasons for one in decisions] == [("there is no rule",)] * 3
    assert Policy().empty
    assert not Policy(within=1).empty


def test_the_state_before_a_revert_does_not_stay_for_what_the_revert_calls_it():
    """It has a window of its own; else each revert would leave a point for ever."""
    old = P("before", NOW - 9 * DAY, reason="safety", label="kept as revert to 01a2 began")
    assert kept([old, *every(DAY, 3)], last=1) == ["0"]


def test_what_has_a_label_stays():
    points = [P("named", NOW - 9 * DAY, label="before-upgrade"), *every(DAY, 3)]
    assert kept(points, last=1) == ["named", "0"]
    assert plan(points, Policy(last=1), NOW, UTC)[0].reasons == ("it has a label",)
    assert kept(points, last=1, labelled=False) == ["0"]
    assert Policy(labelled=True).empty


def test_rules_add_up_and_each_is_named():
    decisions = plan(every(DAY, 3), Policy(last=1, daily=2, within=3600), NOW, UTC)
    assert [one.reasons for one in decisions] == [
        ("no rule keeps it",),
        ("daily 2026-11-23",),
        ("last", "daily 2026-11-24", "within 1 h"),
    ]


@pytest.mark.parametrize("field", [field.name for field in fields(Policy)])
def test_less_than_nothing_is_refused(field):
    with pytest.raises(ConfigError, match=f"-1 of {field}"):
        Policy(**{field: -1})


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("safety", True),
        ("safety point before revert to 3f0c", True),
        ("undo", True),
        ("revert", True),
        ("Safety: undo", True),
        ("manual", False),
        ("schedule", False),
        ("before revert", False),
        ("safetyfirst", False),
        ("", False),
    ],
)
def test_points_that_undo_a_revert_are_known_by_their_reason(reason, expected):
    assert is_safety(P("x", NOW, reason)) is expected


def test_a_revert_can_be_undone_whatever_the_rules_say():
    """P5-34, promise 3: the state that a revert left stays for the protection window."""
    points = [replace(point, reason="safety") if point.id in {"2", "9"} else point for point in every(DAY, 10)]
    assert kept(points, last=1) == ["2", "0"]
    assert kept(points, last=1, protect=0) == ["0"]
    assert kept(points, last=1, protect=30 * 86400) == ["9", "2", "0"]


def test_ten_thousand_points_are_planned_quickly():
    import time

    points = every(timedelta(minutes=15), 10_000)
    start = time.process_time()
    plan(points, Policy(last=10, hourly=48, daily=30, weekly=8, monthly=24, yearly=5, within=86400), NOW)
    assert time.process_time() - start < 2


POINTS = st.lists(
    st.builds(
        P,
        st.integers(0, 1 << 64).map(str),
        st.datetimes(datetime(2023, 1, 1), datetime(2026, 11, 24, 12), timezones=st.just(UTC)),
        st.sampled_from(["schedule", "manual", "safety"]),
    ),
    max_size=40,
    unique_by=lambda point: point.id,
)
COUNTS = st.integers(0, 6)
POLICIES = st.builds(
    Policy, **dict.fromkeys(RULES, COUNTS), within=st.integers(0, 200).map(lambda days: days * 86400.0)
)
ZONES = st.sampled_from([UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kathmandu"), ZoneInfo("America/St_Johns")])


def keys(policy, points, zone=UTC) -> set[str]:
    return {one.point.id for one in plan(points, policy, NOW, zone) if one.keep}


@given(POINTS, POLICIES, ZONES)
def test_every_point_is_decided_once_oldest_first(points, policy, zone):
    decisions = plan(points, policy, NOW, zone)
    assert [one.point for one in decisions] == sorted(points, key=lambda point: (point.time, point.id))
    assert all(one.reasons for one in decisions)
    shuffled = random.Random(1).sample(points, len(points))
    assert plan(shuffled, policy, NOW, zone) == decisions


@given(POINTS, POLICIES, ZONES)
def test_the_newest_point_and_what_undoes_a_revert_always_stay(points, policy, zone):
    found = keys(policy, points, zone)
    if points:
        assert max(points, key=lambda point: (point.time, point.id)).id in found
    assert {point.id for point in points if is_safety(point) and point.time >= NOW - 7 * DAY} <= found


@given(POINTS, POLICIES, st.sampled_from(RULES), ZONES)
def test_asking_for_more_never_keeps_less(points, policy, rule, zone):
    more = replace(policy, **{rule: getattr(policy, rule) + 1})
    if not policy.empty:
        assert keys(policy, points, zone) <= keys(more, points, zone)


@given(POINTS, POLICIES, ZONES)
def test_forgetting_twice_forgets_no_more(points, policy, zone):
    first = keys(policy, points, zone)
    assert keys(policy, [point for point in points if point.id in first], zone) == first


@given(POINTS, POLICIES, ZONES)
def test_rules_are_independent(points, policy, zone):
    if policy.empty:
        return
    single = [Policy(**{rule: getattr(policy, rule)}) for rule in RULES if getattr(policy, rule)]
    single += [Policy(within=policy.within)] if policy.within else []
    assert keys(policy, points, zone) == set().union(*(keys(one, points, zone) for one in single))


@given(POINTS, st.integers(1, 6), ZONES)
def test_a_calendar_rule_is_the_newest_of_each_of_the_last_days(points, count, zone):
    """Against a plain model of the sentence in the help text."""
    days: dict = {}
    for point in sorted(points, key=lambda point: (point.time, point.id)):
        days[point.time.astimezone(zone).date()] = point.id
    expected = {days[day] for day in sorted(days)[-count:]}
    if points and len(days) < count:
        expected.add(min(points, key=lambda point: (point.time, point.id)).id)
    assert keys(Policy(daily=count, protect=0), points, zone) == expected
