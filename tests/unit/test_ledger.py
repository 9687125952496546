"""The ledger claims what was confirmed and nothing else, whatever is torn, damaged, late or set back."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import JournalError, NoSpace
from appliance.timeline.catalogue import Gap
from appliance.timeline.ledger import Base, Branch, Event, Ledger, state_at

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
ONE, TWO = "1" * 32, "2" * 32


def at(seconds):
    return START + timedelta(seconds=seconds)


def usable(ledger, sequence, journal=ONE):
    return [base.point for base in state_at(ledger.spans(), journal, sequence)]


def said(ledger, now):
    return [
        (round((one.start - START).total_seconds(), 3), round((one.end - START).total_seconds(), 3), one.reason)
        for one in ledger.gaps(at(now))
    ]


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger" / "uuid.jsonl")


@pytest.fixture
def covered(ledger):
    """Captured from 0 to 60 s, records 1 to 600, with a point at 100 and one at 300."""
    ledger.began(ONE, 0, at(0))
    ledger.based(ONE, 100, at(10), "p1")
    ledger.based(ONE, 300, at(30), "p2")
    ledger.confirmed(ONE, 600, at(60))
    return ledger


def test_nothing_was_ever_captured(ledger):
    assert (ledger.spans(), ledger.gaps(at(9)), ledger.events(), ledger.branches(), ledger.at(at(1))) == ([],) * 4 + (
        None,
    )
    assert not ledger.path.exists()


def test_a_running_capture(covered):
    """P5-37: any write from the first point on can be reached, by the nearest point before it."""
    [span] = covered.spans()
    assert (span.first, span.last, span.start, span.end, span.open) == (0, 600, at(0), at(60), True)
    assert (span.since, span.base_points) == (at(10), ("p1", "p2"))
    assert usable(covered, 99) == []
    assert usable(covered, 100) == ["p1"]
    assert usable(covered, 299) == ["p1"]
    assert usable(covered, 300) == ["p2", "p1"]
    assert usable(covered, 600) == ["p2", "p1"]
    assert usable(covered, 601) == []
    assert usable(covered, 300, TWO) == []
    assert said(covered, 61) == [(0, 10, "the capture had no baseline yet")]


def test_a_capture_that_is_not_seen_any_more_is_a_gap_until_somebody_looks_again(covered):
    assert said(covered, 65)[1:] == []
    assert said(covered, 90)[1:] == [(60, 90, "the capture has not been seen to run since")]
    covered.confirmed(ONE, 900, at(90))
    assert said(covered, 90)[1:] == []


def test_a_gap_goes_from_the_last_confirmed_place_to_the_next_point(covered):
    covered.ended(ONE, None, None, "the journal did not answer for 250 ms")
    assert said(covered, 70)[1:] == [(60, 70, "the journal did not answer for 250 ms")]
    covered.began(ONE, 640, at(80))
    covered.confirmed(ONE, 650, at(81))
    assert said(covered, 82)[1:] == [(60, 82, "the journal did not answer for 250 ms")]
    covered.based(ONE, 655, at(83), "p3")
    covered.confirmed(ONE, 700, at(90))
    assert said(covered, 91)[1:] == [(60, 83, "the journal did not answer for 250 ms")]
    assert [usable(covered, n) for n in (600, 601, 640, 654, 655, 700)] == [["p2", "p1"], [], [], [], ["p3"], ["p3"]]


def test_an_end_that_was_seen_counts_further_than_the_last_look(covered):
    """A clean detach: inside its pause the jobs were seen to run, and nothing is written after it."""
    covered.ended(ONE, 620, at(62), "paused by the operator")
    assert (covered.spans()[0].last, covered.spans()[0].end) == (620, at(62))


def test_the_second_to_say_that_it_has_ended_is_not_believed(covered):
    covered.ended(ONE, None, None, "the guest was shut off")
    covered.ended(ONE, 700, at(70), "again")
    assert [one.reason_ended for one in covered.spans()] == ["the guest was shut off"]
    assert covered.spans()[0].last == 600
    with pytest.raises(JournalError, match="no open span"):
        covered.confirmed(ONE, 700, at(70))


def test_a_writer_that_died_claims_nothing_after_its_last_look(covered):
    again = Ledger(covered.path)
    again.began(TWO, 0, at(100))
    again.based(TWO, 1, at(101), "p3")
    again.confirmed(TWO, 50, at(110))
    assert [(one.journal, one.last, one.end) for one in again.spans()] == [(ONE, 600, at(60)), (TWO, 50, at(110))]
    assert said(again, 111)[1:] == [(60, 101, "the process that captured ended without a word")]
    assert usable(again, 100) == ["p1"]


def test_confirming_for_a_day_adds_nothing_to_the_file(covered):
    sizes = {covered.path.stat().st_size}
    for second in range(61, 400):
        covered.confirmed(ONE, 600 + second, at(second))
        sizes.add(covered.path.stat().st_size)
    assert len(sizes) == 1
    assert covered.path.with_suffix(".at").stat().st_size == 1024
    assert covered.spans()[0].end == at(399)


def test_a_confirmed_place_outlives_many_spans(ledger):
    for number in range(200):
        ledger.began(ONE, number * 10, at(number * 10))
        ledger.based(ONE, number * 10 + 1, at(number * 10 + 1), f"p{number}")
        ledger.confirmed(ONE, number * 10 + 9, at(number * 10 + 5))
    again = Ledger(ledger.path)
    assert [(one.first, one.last) for one in again.spans()] == [(n * 10, n * 10 + 9) for n in range(200)]
    assert len(again.gaps(at(1996))) == 200
    assert usable(again, 1239) == ["p123"]


def test_a_revert_divides_the_span(covered):
    """P5-37: writes after a revert count from the point gone to; those before it stay reachable."""
    covered.branch(ONE, 650, at(65), "p1", "timeline2")
    assert usable(covered, 650) == [], "not confirmed yet"
    covered.confirmed(ONE, 700, at(70))
    old, new = covered.spans()
    assert (old.last, old.end, old.reason_ended, old.timeline) == (650, at(65), "a revert to p1", "")
    assert (new.first, new.last, new.start, new.timeline, new.open) == (650, 700, at(65), "timeline2", True)
    assert usable(covered, 649) == ["p2", "p1"]
    assert usable(covered, 650) == ["p2", "p1"], "at the number itself it is the state that was left"
    assert new.usable(650) == (Base(ONE, 650, at(65), "p1"),)
    assert usable(covered, 651) == ["p1"]
    assert said(covered, 71)[1:] == []
    assert covered.branches() == [Branch(ONE, 650, at(65), "p1", "timeline2")]
    assert covered.at(at(64), at(71)) == old
    assert covered.at(at(66), at(71)) == new


def test_points_of_both_sides_of_a_revert_at_one_number(covered):
    """The safety point and the first epoch after it: the guest wrote nothing in between. One that is written down after
    the revert with a time before it is on neither side: the clock may have been set back."""
    covered.based(ONE, 650, at(64), "safety")
    covered.branch(ONE, 650, at(65), "p1", "timeline2")
    covered.based(ONE, 650, at(64), "late")
    covered.based(ONE, 650, at(66), "epoch")
    covered.confirmed(ONE, 700, at(70))
    assert usable(covered, 650) == ["safety", "p2", "p1"]
    assert sorted(usable(covered, 651)) == ["epoch", "p1"]


def test_a_safety_point_written_down_before_the_branch_is_on_the_old_side(covered):
    covered.based(ONE, 650, at(64), "safety")
    covered.branch(ONE, 650, at(64), "p1", "timeline2")
    covered.confirmed(ONE, 700, at(70))
    assert usable(covered, 650) == ["safety", "p2", "p1"]
    assert usable(covered, 651) == ["p1"]


def test_a_revert_after_the_last_look_at_a_dead_capture_claims_nothing(covered):
    covered.branch(ONE, 600, at(65), "p1", "timeline2")
    covered.ended(ONE, None, None, "the mirror ended with an error")
    [span] = covered.spans()
    assert (span.last, span.end, span.timeline) == (600, at(60), "")


def test_a_point_written_down_late_belongs_to_no_later_span(covered):
    """Nothing was written between two spans, so the number fits both; a write that nobody saw may lie between."""
    covered.ended(ONE, None, None, "the host slept")
    covered.based(ONE, 590, at(58), "after the end")
    covered.began(ONE, 600, at(100))
    covered.based(ONE, 600, at(59), "late")
    covered.based(ONE, 600, at(101), "fresh")
    covered.confirmed(ONE, 650, at(110))
    assert [one.base_points for one in covered.spans()] == [("p1", "p2"), ("fresh",)]


def test_a_point_that_may_belong_to_either_of_two_spans_belongs_to_none(covered):
    covered.ended(ONE, None, None, "the host slept")
    covered.began(ONE, 600, at(40))  # the clock was set back
    covered.based(ONE, 600, at(50), "which")
    covered.confirmed(ONE, 650, at(52))
    assert [one.base_points for one in covered.spans()] == [("p1", "p2"), ()]
    covered.based(ONE, 600, at(53), "told", covered.spans()[-1].id)
    covered.confirmed(ONE, 660, at(54))
    assert [one.base_points for one in covered.spans()] == [("p1", "p2"), ("told",)]


def test_a_point_taken_after_the_last_look_holds_writes_that_nobody_saw(covered):
    """The journal still answers with its last number while the mirror is gone."""
    covered.based(ONE, 600, at(61), "blind")
    assert covered.spans()[0].base_points == ("p1", "p2"), "not before somebody has looked again"
    covered.ended(ONE, None, None, "the mirror ended with an error")
    assert covered.spans()[0].base_points == ("p1", "p2")


def test_the_clock_is_set_back_while_it_runs(covered):
    covered.confirmed(ONE, 700, at(-3600))
    covered.based(ONE, 720, at(-3590), "p3")
    covered.confirmed(ONE, 800, at(-3580))
    [span] = covered.spans()
    assert (span.start, span.end, span.seen, span.last) == (at(0), at(60), at(-3580), 800)
    assert usable(covered, 750) == ["p3", "p2", "p1"]
    assert said(covered, -3579)[1:] == []


def test_a_gap_that_the_clock_hides_is_listed_without_length(covered):
    covered.ended(ONE, None, None, "the host was rebooted")
    covered.began(ONE, 600, at(20))
    covered.based(ONE, 605, at(22), "p3")
    covered.confirmed(ONE, 700, at(40))
    assert said(covered, 41)[1:] == [(60, 60, "the host was rebooted")]
    assert covered.at(at(35), at(41)) == covered.spans()[0], "of two the earlier one"
    assert usable(covered, 650) == ["p3"]


def test_what_holds_an_instant(covered):
    covered.ended(ONE, None, None, "the spool was full")
    assert covered.at(at(-1), at(70)) is None
    assert covered.at(at(5), at(70)) == Gap(at(0), at(10), "the capture had no baseline yet")
    assert covered.at(at(10), at(70)).base_points == ("p1", "p2")
    assert covered.at(at(65), at(70)) == Gap(at(60), at(70), "the spool was full")
    assert covered.at(at(75), at(70)) is None


def test_what_was_given_up_on_purpose_is_no_gap(covered):
    covered.ended(ONE, 610, at(61), "continuous capture was ended")
    covered.stopped(at(62))
    assert said(covered, 5000)[1:] == [(61, 62, "continuous capture was ended")]
    assert covered.at(at(1000), at(5000)) is None
    covered.began(TWO, 0, at(6000))
    assert said(covered, 6004)[2:] == [(6000, 6004, "the capture had no baseline yet")]
    covered.based(TWO, 3, at(6002), "p3")
    covered.confirmed(TWO, 5, at(6004))
    assert said(covered, 6005)[2:] == [(6000, 6002, "the capture had no baseline yet")]


def test_a_capture_that_is_given_up_while_it_is_open_ends_where_it_was_seen(covered):
    covered.stopped(at(100))
    assert covered.spans()[0].end == at(60)
    assert said(covered, 5000)[1:] == [(60, 100, "the process that captured ended without a word")]
    with pytest.raises(JournalError):
        covered.confirmed(ONE, 700, at(70))


def test_nothing_is_written_down_for_what_never_was(ledger):
    ledger.stopped(at(1))
    assert not ledger.path.exists()


def test_events_are_kept_in_order(ledger):
    ledger.event("latency", at(1), "9 ms added, 5 ms allowed: epochs")
    ledger.event("trimmed", at(2), "ä" * 5000)
    assert ledger.events() == [
        Event("latency", at(1), "9 ms added, 5 ms allowed: epochs"), Event("trimmed", at(2), "ä" * 1024),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two spans, points, a revert, an event: the bytes of the ledger and of the place beside it."""
    ledger = Ledger(tmp_path_factory.mktemp("story") / "uuid.jsonl")
    ledger.began(ONE, 0, at(0))
    ledger.based(ONE, 1, at(1), "p1")
    ledger.confirmed(ONE, 10, at(5))
    ledger.branch(ONE, 12, at(6), "p1", "timeline2")
    ledger.confirmed(ONE, 20, at(8))
    ledger.ended(ONE, None, None, "killed")
    ledger.event("latency", at(9), "too slow")
    ledger.began(TWO, 0, at(10))
    ledger.based(TWO, 2, at(11), "p2")
    ledger.confirmed(TWO, 9, at(15))
    return ledger


def places(ledger):
    """Every (journal, number, point) that is claimed."""
    return {
        (span.journal, number, base.point)
        for span in ledger.spans()
        for number in range(span.first, span.last + 1)
        for base in span.usable(number)
    }


def test_torn_at_every_byte_of_the_file(story, tmp_path):
    """A crash leaves a beginning of it: that claims less and never something else, and it can be gone on from."""
    whole, claimed = story.path.read_bytes(), places(story)
    for length in range(len(whole)):
        torn = Ledger(tmp_path / f"{length}.jsonl")
        torn.path.write_bytes(whole[:length])
        torn.path.with_suffix(".at").write_bytes(story.path.with_suffix(".at").read_bytes())
        assert places(torn) <= claimed
        torn.event("again", at(20), "after the crash")
        assert places(torn) <= claimed
        assert torn.path.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, length) + 1])
        assert torn.events()[-1].kind == "again"


def test_torn_at_every_byte_of_the_place(story, tmp_path):
    """One slot is always whole: what was confirmed before is still known."""
    side = story.path.with_suffix(".at")
    before = side.read_bytes()
    torn = Ledger(tmp_path / "uuid.jsonl")
    torn.path.write_bytes(story.path.read_bytes())
    torn.path.with_suffix(".at").write_bytes(before)
    torn.confirmed(TWO, 12, at(16))
    after = torn.path.with_suffix(".at").read_bytes()
    for length in range(len(after)):
        torn.path.with_suffix(".at").write_bytes(after[:length] + before[length:])
        assert Ledger(torn.path).spans()[-1].last in (9, 12)
    torn.path.with_suffix(".at").write_bytes(b"")
    assert Ledger(torn.path).spans()[-1].last == 0
    Ledger(torn.path).confirmed(TWO, 13, at(17))
    assert Ledger(torn.path).spans()[-1].last == 13


def test_a_damaged_line_ends_the_span_before_it(story, tmp_path):
    """It may have been a revert: what comes after it must not be counted from what was before."""
    rows = story.path.read_bytes().splitlines(keepends=True)
    for number, row in enumerate(rows):
        damaged = Ledger(tmp_path / f"{number}.jsonl")
        flipped = row[:20] + bytes([row[20] ^ 1]) + row[21:]
        damaged.path.write_bytes(b"".join([*rows[:number], flipped, *rows[number + 1 :]]))
        damaged.path.with_suffix(".at").write_bytes(story.path.with_suffix(".at").read_bytes())
        assert places(damaged) <= places(story)
    branch = next(number for number, row in enumerate(rows) if b'"branch"' in row)
    assert not [place for place in places(Ledger(tmp_path / f"{branch}.jsonl")) if place[0] == ONE and place[1] > 1]


def test_a_full_disk_leaves_the_ledger_as_it_was(covered, monkeypatch):
    before, write = covered.path.read_bytes(), os.write

    def full(file, data):
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return write(file, data[:-5])

    monkeypatch.setattr("appliance.timeline.ledger.os.write", full)
    with pytest.raises(NoSpace):
        covered.event("latency", at(1), "x")
    assert covered.path.read_bytes() == before
    assert covered.spans()[0].last == 600


def test_points_that_are_gone_can_be_left_out(covered):
    reader = Ledger(covered.path)
    assert usable(reader, 600) == ["p2", "p1"]
    assert covered.forget_points({"p2"}) == 1
    assert covered.forget_points({"p2"}) == 0
    assert usable(covered, 600) == usable(reader, 600) == ["p2"]
    assert [usable(reader, n) for n in (299, 300)] == [[], ["p2"]]
    covered.confirmed(ONE, 700, at(70))
    assert reader.spans()[0].last == 700


def _write_events(path, name, count):
    ledger = Ledger(path)
    for number in range(count):
        ledger.event(name, at(number), "x" * (number % 300))
        if number % 20 == 0:
            ledger.forget_points(set())


def test_writers_of_several_processes_take_turns(ledger):
    context = get_context("spawn")
    writers = [context.Process(target=_write_events, args=(ledger.path, name, 40)) for name in ("a", "b", "c")]
    for one in writers:
        one.start()
    for one in writers:
        one.join(20)
        assert one.exitcode == 0
    found = [event.kind for event in ledger.events()]
    assert {name: found.count(name) for name in found} == {"a": 40, "b": 40, "c": 40}
    assert all(line.what for line in ledger.lines())


class World:
    """A guest, its disk as the hash of all that was written to it, and a capture that is honest about what it sees."""

    def __init__(self, path, dice):
        self.ledger, self.dice = Ledger(path), dice
        self.now, self.disk, self.sequence = 0.0, 0, 0
        self.attached = self.blind = False
        self.records, self.truth, self.points = {}, {0: 0}, {}
        self.waiting = None

    def step(self):
        self.now += self.dice.choice([0.0, 0.1, 1.0, 1.0, 7.0, -5.0])
        kinds = ["write"] * 6 + ["look"] * 3 + ["point"] * 2 + ["revert", "attach", "end", "die", "lose", "late"]
        getattr(self, self.dice.choice(kinds))()

    def write(self):
        write = self.dice.getrandbits(60)
        self.disk = hash((self.disk, write))
        if self.attached and not self.blind:
            self.sequence += 1
            self.records[self.sequence], self.truth[self.sequence] = write, self.disk

    def look(self):
        if self.attached and not self.blind:
            self.ledger.confirmed(ONE, self.sequence, at(self.now))

    def point(self, now=True):
        if self.attached:
            name = f"p{len(self.points)}"
            self.points[name] = self.disk
            self.waiting = (ONE, self.sequence, at(self.now), name, "" if now else self.span)
            if now:
                self.late()

    def late(self):
        """A point's line comes some time after its instant."""
        waiting, self.waiting = self.waiting, None
        if waiting:
            self.ledger.based(*waiting)
        elif self.dice.random() < 0.5:
            self.point(now=False)

    def revert(self):
        if self.waiting:
            self.late()  # a verb that works on the domain ends before the next one begins
        if self.points:
            name = self.dice.choice(list(self.points))
            self.disk = self.points[name]
            self.now += 0.01
            if self.attached:
                self.ledger.branch(ONE, self.sequence, at(self.now), name, "t")

    def attach(self):
        if not self.attached:
            self.attached, self.blind = True, False
            self.truth.setdefault(self.sequence, self.disk)
            self.span = self.ledger.began(ONE, self.sequence, at(self.now))

    def end(self):
        if self.attached:
            place = (None, None) if self.blind or self.dice.random() < 0.5 else (self.sequence, at(self.now))
            self.ledger.ended(ONE, *place, "end")
            self.attached = False

    def die(self):
        self.attached = False
        self.ledger = Ledger(self.ledger.path)

    def lose(self):
        """The mirror ends; nobody has seen it yet."""
        self.blind = True

    def check(self):
        for span in self.ledger.spans():
            for number in range(span.first + 1, span.last + 1):
                for base in span.usable(number):
                    state = self.points[base.point]
                    for record in range(base.sequence + 1, number + 1):
                        state = hash((state, self.records[record]))
                    assert state == self.truth[number], (number, base)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_claimed_can_be_rebuilt(tmp_path_factory, seed):
    """P5-37: base and records give the state that the disk had, for every number that is claimed, whatever happened.

    At the number at which a span begins there are two: what was before it, unseen or reverted, and its own.
    """
    dice = random.Random(seed)
    world = World(tmp_path_factory.mktemp("world") / "uuid.jsonl", dice)
    for _ in range(dice.randrange(10, 120)):
        world.step()
    world.check()
