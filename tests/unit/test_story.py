"""What `rewind timeline` tells and how it is drawn, as exact text."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cli import records
from appliance.cli.chart import columns_of, draw, plain, remarks, standing
from appliance.model import Timeline
from appliance.service.capturing import missing
from appliance.timeline.catalogue import Gap, Summary
from appliance.timeline.spans import Base, Branch, CapturedSpan, Event
from appliance.timeline.story import Flow, Known, Mark, reachable, tell

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
ONE = "1" * 32


def at(seconds):
    return START + timedelta(seconds=seconds)


def point(name, seconds, timeline="aaaa1111", since=None, changed=1000, label=""):
    return Summary(
        name, "uuid", "web", "qemu:///system", at(seconds), timeline, since, "crash", "schedule", label, 1 << 20,
        changed, 0, 0, 0.0, 0.0, "[]", (), since=since,
    )  # fmt: skip


def span(first, last, start, end, base, reason="", **more):
    bases = (Base(ONE, first, at(start), base),)
    return CapturedSpan("s", ONE, first, last, at(start), at(end), at(end), reason, bases, **more)


@pytest.fixture(autouse=True)
def clock_of_the_wall(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def bytes_of(known, since, until, buckets):
    return [one.bytes for one in tell(known, at(since), at(until), buckets).buckets]


def test_what_points_differ_is_spread_over_the_time_between_them():
    """P5-22: the amount of changed blocks is shown over time."""
    known = Known([point("a", 0), point("b", 100, since="a", changed=1000), point("c", 150, since="b", changed=800)])
    assert bytes_of(known, 0, 200, 4) == [500, 500, 800, 0]
    assert bytes_of(known, 75, 125, 2) == [250, 400]
    assert not any(one.exact for one in tell(known, at(0), at(200), 4).buckets)


def test_a_journal_knows_better_than_points():
    flows = [Flow(at(60), at(60), 7), Flow(at(70), at(90), 20)]
    known = Known([point("a", 0), point("b", 100, since="a")], flows=flows)
    story = tell(known, at(0), at(100), 4)
    told = [(one.bytes, one.exact) for one in story.buckets]
    assert told == [(250, False), (250, False), (7 + 5, True), (15, True)]


def test_what_the_journal_does_not_tell_of_is_told_by_points():
    """While capture stepped aside, in the busiest hour say, nothing was recorded; that is not the same as no writes."""
    known = Known(
        [point("a", 0), point("b", 60, since="a", changed=1000)],
        flows=[Flow(at(5), at(6), 7), Flow(at(90), at(91), 9)],
        covered=[(at(0), at(19)), (at(80), at(99))],
    )  # fmt: skip
    told = [(one.bytes, one.exact) for one in tell(known, at(0), at(100), 5).buckets]
    assert [exact for _, exact in told] == [True, False, False, False, True]
    assert told[1][0] > 300 and told[2][0] > 300


def test_a_flow_that_ends_before_it_begins_is_of_one_instant():
    """The clock was set back inside of a segment."""
    assert bytes_of(Known([], flows=[Flow(at(10), at(5), 9)]), 0, 20, 2) == [0, 9]


@given(
    flows=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.integers(0, 10**9)), max_size=20),
    count=st.integers(1, 50),
)
def test_no_byte_is_lost_or_counted_twice(flows, count):
    known = Known([], flows=[Flow(at(min(a, b)), at(max(a, b)), size) for a, b, size in flows])
    told = tell(known, at(-1), at(101), count)
    assert abs(sum(one.bytes for one in told.buckets) - sum(size for _, _, size in flows)) <= 1


def test_each_timeline_is_the_present_until_the_next_one_begins():
    """P5-37: the timeline that a revert left stays in the picture, with its points."""
    known = Known(
        [point("a", 0), point("b", 50), point("c", 120, "bbbb2222")],
        [Timeline("aaaa1111", "uuid", at(-5)), Timeline("bbbb2222", "uuid", at(80), "aaaa1111", "a")],
    )
    old, new = tell(known, at(10), at(200), 10).lanes
    assert (old.timeline, old.start, old.end, [one.id for one in old.points]) == ("aaaa1111", at(10), at(80), ["b"])
    assert (new.start, new.end, new.parent, new.origin) == (at(80), at(200), "aaaa1111", "a")
    assert [one.timeline for one in tell(known, at(100), at(200), 10).lanes] == ["bbbb2222"]


def test_a_timeline_that_only_the_ledger_knows():
    known = Known([point("a", 0)], branches=[Branch(ONE, 7, at(40), "a", "bbbb2222")])
    _, new = tell(known, at(0), at(100), 10).lanes
    assert (new.timeline, new.start, new.parent, new.origin, new.points) == ("bbbb2222", at(40), "aaaa1111", "a", ())


def test_a_revert_that_was_given_up_is_not_drawn():
    """Promise 2: its timeline is written down before it changes anything; killed before that it never was the present.
    One that was, and of which no point is left, stays."""
    points = [point("a", 0), point("c", 90), point("d", 150, "dddd4444")]
    timelines = [
        Timeline("aaaa1111", "uuid", at(-5)), Timeline("bbbb2222", "uuid", at(40), "aaaa1111", "a"),
        Timeline("cccc3333", "uuid", at(100), "aaaa1111", "a"), Timeline("dddd4444", "uuid", at(140), "cccc3333", "c"),
        Timeline("eeee5555", "uuid", at(160), "dddd4444", "d"),
    ]  # fmt: skip
    lanes = tell(Known(points, timelines), at(0), at(200), 10).lanes
    assert [(one.timeline, one.end) for one in lanes] == [
        ("aaaa1111", at(100)), ("cccc3333", at(140)), ("dddd4444", at(200)),
    ]  # fmt: skip
    lanes = tell(Known(points, timelines, lived=["eeee5555"]), at(0), at(200), 10).lanes
    assert [one.timeline for one in lanes] == ["aaaa1111", "cccc3333", "dddd4444", "eeee5555"]


def test_what_was_forgotten_is_not_drawn_as_captured():
    """A span counts from the first point that is still there with every record behind it."""
    points = [point("a", 0), point("c", 100)]
    bases = tuple(Base(ONE, number, at(number), name) for number, name in ((0, "a"), (50, "b"), (100, "c")))
    whole = CapturedSpan("s", ONE, 0, 150, at(0), at(150), at(150), "", bases)

    def usable(*held):
        [found] = reachable([whole], points, {ONE: held})
        return found.base_points

    assert usable((1, 1 << 63)) == ("a", "c")
    assert usable((101, 150), (1, 60), (61, 100)) == ("a", "c")
    assert usable((40, 150)) == ("c",)
    assert usable((101, 150)) == ("c",)
    assert usable((1, 99), (102, 150)) == ()
    assert usable((1, 149)) == ()
    assert usable() == ()


def test_only_what_touches_the_window_is_told():
    known = Known(
        [], spans=[span(0, 9, 0, 50, "a"), span(9, 12, 60, 70, "b")],
        gaps=[Gap(at(50), at(60), "x"), Gap(at(80), at(95), "y")],
        events=[Event("latency", at(10), "slow"), Event("latency", at(65), "slow")],
        marks=[Mark(at(64), "before", ONE, 10), Mark(at(4), "early", ONE, 1)],
    )  # fmt: skip
    story = tell(known, at(58), at(90), 4)
    assert [one.first for one in story.spans] == [9]
    assert [one.reason for one in story.gaps] == ["x", "y"]
    assert (story.gap_seconds, len(story.events), [one.label for one in story.marks]) == (12, 1, ["before"])


@pytest.fixture
def eventful():
    """Points by the clock, then every write; a gap, a mark, a revert."""
    return Known(
        [
            point("p0", 0), point("p1", 600, since="p0", changed=6 << 20),
            point("p2", 1200, since="p1", changed=12 << 20, label="good"), point("p3", 2100, since="p2"),
            point("p4", 3000, "bbbb2222"),
        ],
        [Timeline("aaaa1111", "uuid", at(0)), Timeline("bbbb2222", "uuid", at(2700), "aaaa1111", "p2")],
        [
            span(0, 500, 1200, 1800, "p2", "the journal did not answer"),
            span(500, 900, 2100, 2700, "p3", "a revert to p2"),
            span(900, 950, 2700, 3600, "p2", timeline="bbbb2222", branched=True),
        ],
        [Gap(at(1800), at(2100), "the journal did not answer")],
        [Branch(ONE, 900, at(2700), "p2", "bbbb2222")],
        [Event("latency", at(1750), "12 ms added, 5 ms are allowed")],
        [Flow(at(1200), at(1800), 100 << 20), Flow(at(2100), at(3600), 50 << 20)],
        [Mark(at(2400), "deploy", ONE, 700)],
    )  # fmt: skip


def test_the_drawing(eventful):
    """P5-37 and P5-39: rate, both timelines, points, a mark and the gap, in 50 columns."""
    story = tell(eventful, at(0), at(3600), columns_of(50))
    assert draw(story) == "\n".join(
        [
            "2026-03-01 12:00:00 to 2026-03-01 13:00:00 (1 h), up to 171 KiB/s written, 5 points",
            "rate      ▁▁▁▁▁▁▁▁▁▁▁▁▁▅██████ ▁▁▁▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂",
            "                                    ▾",
            "aaaa1111  ●·····●······◆──────xxx●───────",
            "bbbb2222                                ╰──●──────",
            "          12:00               12:30",
            "          ● point  ◆ labelled  ▾ mark  ─ every write  · points only  x gap  ╰ revert",
        ]
    )


def test_the_drawing_is_never_wider_than_it_may_be(eventful):
    for width in (30, 47, 80, 132, 300):
        rows = draw(tell(eventful, at(0), at(3600), columns_of(width))).splitlines()
        assert all(len(row) <= width for row in rows[1:-1])


def test_a_gap_of_a_second_is_seen_in_a_day():
    known = Known([point("p0", 0)], spans=[span(0, 5, 0, 40000, "p0", "x"), span(5, 9, 40001, 86400, "p1")],
                  gaps=[Gap(at(40000), at(40001), "x")])  # fmt: skip
    assert "x" in draw(tell(known, at(0), at(86400), 70)).splitlines()[2][10:]


def test_without_unicode_the_shape_stays(eventful):
    text = plain(draw(tell(eventful, at(0), at(3600), 40)))
    assert text.isascii()
    assert "x" in text and "`--o" in text and "@---" in text


def test_what_is_said_below(eventful):
    assert remarks(tell(eventful, at(0), at(3600), 40)) == [
        "2026-03-01 12:20:00  point p2 'good'",
        "2026-03-01 12:29:10  latency: 12 ms added, 5 ms are allowed",
        "2026-03-01 12:30:00  gap of 5 m: the journal did not answer",
        "2026-03-01 12:40:00  mark 'deploy' at write 700",
        "2026-03-01 12:45:00  revert to point p2, at write 900",
    ]


def test_of_many_gaps_the_newest_are_told():
    known = Known([], gaps=[Gap(at(10 * n), at(10 * n + 1), f"r{n}") for n in range(30)])
    lines = remarks(tell(known, at(0), at(300), 40))
    assert lines[0] == "and earlier in this time: 22 gaps (--json has them)"
    assert [line[-3:] for line in lines[1:]] == [f"r{n}" for n in range(22, 30)]


def capture(mode, **more):
    known = dict.fromkeys(
        ("near_seconds", "far_seconds", "journal", "sequence", "durable", "added_latency_seconds", "spool_bytes",
         "spool_limit_bytes", "shipped_bytes", "last_gap")
    )  # fmt: skip
    return records.Capture(mode, more.pop("reason", ""), **(known | more))


def test_how_it_stands_in_a_sentence():
    """P5-42: what the capture adds to a write is shown; achieved RPO near and far."""
    assert standing(None) == []
    here = "the repository is on this host (ext4): all would be lost with it"
    assert standing(capture("tap", near_seconds=0.4, journal="ab", far_reason=here)) == [
        f"now: every write is captured, 400 ms would be lost in a power cut, {here}"
    ]
    assert standing(capture("epochs", near_seconds=200.0, far_reason=here)) == [
        f"now: points are taken by the clock, 3 m 20 s would be lost, {here}"
    ]
    assert standing(capture("epochs", near_seconds=200.0, far_seconds=200.0)) == [
        "now: points are taken by the clock, 3 m 20 s would be lost"
    ]
    tapped = capture(
        "tap", near_seconds=0.4, far_seconds=7.25, added_latency_seconds=0.000131, spool_bytes=3 << 30,
        spool_limit_bytes=16 << 30, shipped_bytes=5 << 20,
    )  # fmt: skip
    assert standing(tapped) == [
        "now: every write is captured, 400 ms would be lost in a power cut, 7.25 s would be lost with the host, "
        "131 us added to a write, journal 3 GiB of 16 GiB, 5 MiB in the repository"
    ]
    assert standing(capture("waiting", reason="the domain is shut off")) == [
        "now: writes are not captured now (the domain is shut off)"
    ]


def gap_times(*arguments):
    return [((one.start - START).total_seconds(), (one.end - START).total_seconds()) for one in missing(*arguments)]


def test_gaps_of_the_clock_end_where_the_ledger_begins():
    points = [point("a", 0), point("b", 1000), point("c", 5000)]
    spans = [span(0, 9, 1000, 2000, "b", "x"), span(9, 12, 2500, 3000, "c")]
    assert gap_times(points, 60, [], False, at(5001)) == [(0, 1000), (1000, 5000)]
    assert gap_times(points, 60, spans, True, at(3001)) == [(0, 1000), (2000, 2500)]
    assert gap_times(points, None, spans, True, at(4000)) == [(2000, 2500), (3000, 4000)]


def test_what_the_clock_misses_counts_again_when_the_capture_was_given_up():
    points = [point("a", 1000), point("b", 5000), point("c", 5050)]
    spans = [span(0, 9, 1000, 2000, "a", "ended", stopped=at(2100))]
    assert gap_times(points, 60, spans, False, at(5051)) == [(2000, 2100), (2100, 5000)]
    assert gap_times(points, None, spans, False, at(9999)) == [(2000, 2100)]
