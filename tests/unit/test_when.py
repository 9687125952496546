"""From what a person types to a recovery point."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import AmbiguousPoint, InGap, NoSuchPoint
from appliance.timeline.catalogue import Gap
from appliance.timeline.when import named, outdone, parse_time, reading, resolve

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


@dataclass(frozen=True)
class P:
    id: str
    time: datetime
    label: str = ""


def at(text: str, id: str = "", label: str = "") -> P:
    time = datetime.fromisoformat(text).replace(tzinfo=UTC)
    return P(id or f"{int(time.timestamp() * 1000):x}", time, label)


POINTS = [
    at("2026-11-23T10:00:00.500", "aaaa1111", "before-upgrade"),
    at("2026-11-23T22:00:00", "aaaa2222", "nightly"),
    at("2026-11-24T10:15:30.250", "bbbb1111"),
    at("2026-11-24T10:15:30.750", "bbbb2222"),
    at("2026-11-24T10:16:00", "cccc0000", "nightly"),
    at("2026-11-24T11:50:00", "dddd0000", "10:00"),
]


def find(text, points=POINTS, **options):
    return resolve(points, text, NOW, "web", **{"zone": UTC, **options}).id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latest", "dddd0000"),
        ("LATEST", "dddd0000"),
        (" latest ", "dddd0000"),
        ("aaaa1111", "aaaa1111"),
        ("AAAA1111", "aaaa1111"),
        ("cccc", "cccc0000"),
        ("bbbb2", "bbbb2222"),
        ("before-upgrade", "aaaa1111"),
        ("10:00", "aaaa2222"),  # also the label of another point: a time means a time
        # times
        ("2026-11-24T10:15:30.25Z", "bbbb1111"),
        ("2026-11-24T10:15:30.749999Z", "bbbb1111"),
        ("2026-11-24T10:15:30.7Z", "bbbb2222"),
        ("2026-11-24T10:15:30.75", "bbbb2222"),
        ("2026-11-24T10:15:30,750000123", "bbbb2222"),
        ("2026-11-24 10:15:30", "bbbb2222"),  # as it is shown in a list
        ("2026-11-24  10:15:31", "bbbb2222"),
        ("2026-11-24 10:15:29", "aaaa2222"),
        ("2026-11-24T10:15", "aaaa2222"),  # not the whole minute
        ("2026-11-24t10:16z", "cccc0000"),
        ("2026-11-24", "aaaa2222"),
        ("2026-11-24T10:16+00:00", "cccc0000"),
        ("2026-11-24T11:16:00+01:00", "cccc0000"),
        ("2026-11-24T05:16-05", "cccc0000"),
        ("2026-11-24T15:46+0530", "cccc0000"),
        ("2026-11-24 11:16 Europe/Berlin", "cccc0000"),
        ("2026-11-24 10:16 UTC", "cccc0000"),
        # clock times
        ("10:16", "cccc0000"),
        ("10:15:30", "bbbb2222"),
        ("10:15:30.25", "bbbb1111"),
        ("12:00", "dddd0000"),
        ("12:01", "aaaa1111"),  # yesterday: it is 12:00
        ("23:00", "aaaa2222"),  # yesterday
        ("9:00", "aaaa2222"),
        ("11:16 Europe/Berlin", "cccc0000"),
        # before now
        ("0s ago", "dddd0000"),
        ("10m ago", "dddd0000"),
        ("11 m ago", "cccc0000"),
        ("1h44m ago", "cccc0000"),
        ("1d ago", "aaaa1111"),
        ("1 day ago", "aaaa1111"),
        ("10 min ago", "dddd0000"),
        ("1 hour 44 minutes ago", "cccc0000"),
        ("3600 ago", "cccc0000"),
        ("1H AGO", "cccc0000"),
    ],
)
def test_every_way_to_say_it(text, expected):
    """P5-06, P5-34: any captured instant can be named."""
    assert find(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", " ", "nothing", "aaa", "a", "ffffffff", "25:00", "10:60", "2026-13-01", "2026-02-30", "2026", "10", "1:2",
     "2026-11-24T10:16+99:00", "2026-11-24T10:16 Mars/Olympus", "2026-11 10:16", "2026-11-2410:16", "ago", "soon ago",
     "-5m ago", "10m", "../etc", "9999999999999d ago", "latest latest", "10:00:00:00", "2026-11-24T"],
)  # fmt: skip
def test_what_names_nothing_says_what_would(text):
    with pytest.raises(NoSuchPoint, match="web") as caught:
        find(text)
    assert caught.value.hint
    assert caught.value.fields["when"] == text


def test_a_slip_is_told_what_was_meant():
    with pytest.raises(NoSuchPoint) as caught:
        find("before-updrade")
    assert "'before-upgrade'" in caught.value.hint
    with pytest.raises(NoSuchPoint) as caught:
        find("bbbb111x")
    assert "'bbbb1111'" in caught.value.hint
    with pytest.raises(NoSuchPoint) as caught:
        find("latest", [])
    assert "rewind point web" in caught.value.hint


@pytest.mark.parametrize("text", ["5m", "-5m", "in 5m", "- 5m"])
def test_a_duration_alone_is_told_how_it_leads_back(text):
    with pytest.raises(NoSuchPoint) as caught:
        find(text)
    assert caught.value.hint == "did you mean '5m ago'?"


@pytest.mark.parametrize("text", ["#5", "5"])
def test_a_number_is_told_to_need_recorded_writes(text):
    with pytest.raises(NoSuchPoint) as caught:
        find(text)
    assert "`rewind protect web --continuous`" in caught.value.hint


@pytest.mark.parametrize("text", ["aaaa", "bbbb", "nightly"])
def test_what_names_several_shows_them(text):
    with pytest.raises(AmbiguousPoint) as caught:
        find(text)
    assert caught.value.fields["count"] == 2
    assert "2026-11-" in caught.value.message


def test_many_candidates_are_cut_short():
    points = [at(f"2026-11-24T10:00:{second:02}", f"aaaa{second:02}", "same") for second in range(40)]
    with pytest.raises(AmbiguousPoint, match=r"aaaa39.* and 37 more"):
        find("same", points)


def test_an_exact_id_wins_over_a_longer_one_and_over_a_label():
    points = [at("2026-11-24T10:00", "abcd"), at("2026-11-24T10:01", "abcd12"), at("2026-11-24T10:02", "ffff", "abcd")]
    assert find("abcd", points) == "abcd"
    assert find("abcd1", points) == "abcd12"


@pytest.mark.parametrize(
    "text", ["latest", "LATEST ", "10m ago", "1h30m ago", "10:15", "10:15:30.25", "2026-11-24",
             "2026-11-24T10:15:30Z", "2026-11-24 10:15 Europe/Berlin", "#5", "#81726?", "01a2", "019b5c2d3e4f01234567",
             "ffffffffffffffffffff"],
)  # fmt: skip
def test_a_label_that_means_something_else_never_wins(text):
    """Promise 1: a revert to the newest point or to a time destroys what came after it, so it must be that."""
    assert reading(text)
    labelled = at("2026-11-20", "eeee0000", text.strip())
    points = [*POINTS, labelled]
    assert [one.id for one in outdone(points, text)] == ["eeee0000"]
    if "#" in text:
        assert not named(points, text)
        with pytest.raises(NoSuchPoint):
            find(text, points)
    elif not text.startswith(("01", "ff")):
        assert find(text, points) == find(text)


@pytest.mark.parametrize("text", ["before-update", "nightly 10:00", "at #5", "5", "2026", "20261124", "cafe", "10m",
                                  "25:00", "latest-kernel", "v1.2", "deadbeef"])  # fmt: skip
def test_other_labels_are_free(text):
    assert reading(text) == ""
    assert find(text, [*POINTS, at("2026-11-20", "eeee0000", text)]) == "eeee0000"


def test_a_label_that_begins_as_the_id_of_another_point_is_ambiguous():
    """One of before such labels were refused: neither is a guess that a revert may rest on."""
    points = [at("2026-11-24T10:00", "01a2b3c4"), at("2026-11-24T10:01", "eeee0000", "01a2")]
    with pytest.raises(AmbiguousPoint, match="eeee0000"):
        find("01a2", points)


@pytest.mark.parametrize(
    ("text", "reason", "nearest"),
    [
        ("2026-11-23 09:00", "younger", "aaaa1111"),
        ("2d ago", "younger", "aaaa1111"),
        ("2026-11", "younger", "aaaa1111"),
        ("2026-11-24T12:00:01Z", "to come", "dddd0000"),
        ("2027-01-01", "to come", "dddd0000"),
    ],
)
def test_a_time_outside_the_history_names_the_nearest_point(text, reason, nearest):
    with pytest.raises(InGap, match=reason) as caught:
        find(text)
    assert nearest in caught.value.hint


def test_a_time_in_a_gap_is_refused_with_both_neighbours():
    """Promise 2: a second that was not captured is never passed off as one that was."""
    gap = Gap(POINTS[4].time, POINTS[5].time, "the host was off")
    with pytest.raises(InGap, match="the host was off") as caught:
        find("2026-11-24 11:00", gaps=[gap])
    assert "cccc0000" in caught.value.hint
    assert "dddd0000" in caught.value.hint
    assert find("2026-11-24 10:16", gaps=[gap]) == "cccc0000"
    assert find("2026-11-24 11:50", gaps=[gap]) == "dddd0000"
    assert find("cccc", gaps=[gap]) == "cccc0000"


# --- zones ------------------------------------------------------------------------------------------------------------


def parsed(text, now=NOW, zone=UTC):
    return parse_time(text, now, zone).time


def test_a_time_without_a_zone_is_local():
    assert parsed("2026-11-24 13:00", zone=BERLIN) == NOW
    assert parsed("2026-07-24 14:00", zone=BERLIN) == datetime(2026, 7, 24, 12, tzinfo=UTC)
    assert parsed("13:00", zone=BERLIN) == NOW
    assert parsed("13:01", zone=BERLIN) == NOW - timedelta(hours=23, minutes=59)
    assert parsed("2026-11-24", zone=BERLIN) == datetime(2026, 11, 23, 23, tzinfo=UTC)


def test_the_systems_zone_is_used_where_none_is_given(monkeypatch):
    import time

    try:
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        assert parsed("2026-11-24 17:30", zone=None) == NOW
        assert parsed("17:30", zone=None) == NOW
        assert find("17:30", zone=None) == "dddd0000"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_today_is_the_zones_today():
    late = datetime(2026, 11, 24, 23, 30, tzinfo=UTC)  # 00:30 in Berlin
    assert parsed("00:15", late, BERLIN) == datetime(2026, 11, 24, 23, 15, tzinfo=UTC)
    assert parsed("23:59", late, BERLIN) == datetime(2026, 11, 24, 22, 59, tzinfo=UTC)
    assert parsed("23:15 UTC", late, BERLIN) == datetime(2026, 11, 24, 23, 15, tzinfo=UTC)


def test_an_hour_that_comes_twice_is_the_earlier_one():
    """Clocks go back on 2026-10-25 at 03:00 (01:00 UTC) in Berlin."""
    assert parsed("2026-10-25 02:30", zone=BERLIN) == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert parsed("2026-10-25 02:30+01:00", zone=BERLIN) == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)
    assert parsed("02:30", datetime(2026, 10, 25, 1, 45, tzinfo=UTC), BERLIN) == datetime(
        2026, 10, 25, 0, 30, tzinfo=UTC
    )


def test_an_hour_that_does_not_come_is_read_as_if_clocks_had_not_moved():
    assert parsed("2026-03-29 02:30", zone=BERLIN) == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)


def test_yesterday_is_a_day_of_the_calendar_when_clocks_move():
    morning = datetime(2026, 10, 25, 5, 0, tzinfo=UTC)  # 06:00 in Berlin, after the change
    assert parsed("18:00", morning, BERLIN) == datetime(2026, 10, 24, 16, 0, tzinfo=UTC)


def test_an_error_names_points_by_times_of_the_zone_that_typed_times_are_taken_in():
    points = [at("2026-11-24T10:00:00", "aaaa0000", "twice"), at("2026-11-24T11:00:00", "bbbb0000", "twice")]
    for text in ("twice", "2026-11-24 10:30", "nothing"):
        with pytest.raises((AmbiguousPoint, InGap, NoSuchPoint)) as caught:
            find(text, points, zone=BERLIN)
        assert "+01:00" in f"{caught.value.message} {caught.value.hint}"


TIMES = st.datetimes(datetime(2026, 1, 1), datetime(2026, 11, 24, 11, 59), timezones=st.just(UTC))
ZONES = st.integers(-12 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.lists(TIMES, min_size=1, max_size=20, unique=True), TIMES, ZONES)
def test_a_time_is_the_newest_point_not_younger(times, wanted, zone):
    """Whatever the precision is in which the exact time is given, and in which zone."""
    points = [P(f"{number:08x}", time) for number, time in enumerate(times)]
    older = [point for point in points if point.time <= wanted]
    text = wanted.astimezone(zone).isoformat(timespec="microseconds")
    if older:
        assert find(text, points) == max(older, key=lambda point: point.time).id
    else:
        with pytest.raises(InGap):
            find(text, points)


@given(st.lists(TIMES, min_size=1, max_size=20, unique_by=lambda time: time.replace(microsecond=0)), st.data())
def test_what_was_read_in_a_list_leads_back_to_its_line(times, data):
    points = [P(f"{number:08x}", time) for number, time in enumerate(times)]
    chosen = data.draw(st.sampled_from(points))
    shown = chosen.time.astimezone(BERLIN).strftime("%Y-%m-%d %H:%M:%S%z")
    assert find(shown, points) == chosen.id
    assert find(chosen.id, points) == chosen.id


@given(st.text(max_size=30))
def test_no_text_breaks_it(text):
    try:
        assert find(text) in {point.id for point in POINTS}
    except (NoSuchPoint, AmbiguousPoint, InGap) as error:
        assert error.hint or error.fields["candidates"]
