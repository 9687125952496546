"""Retention in tiers: what is made, what goes, and in which order it gets coarser; pure, then with real files."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.capture import tap
from appliance.capture.tiers import HOUR, MINUTE, Tiers, plan, replaced, step_for
from appliance.config import Home
from appliance.errors import JournalError, NoSuchPoint
from appliance.journal import Journal
from appliance.service import tiers as service
from appliance.service import upkeep
from appliance.timeline.retention import Policy
from appliance.timeline.spans import Base, CapturedSpan
from tests.unit.test_instant import TEN, UUID, Captured

JOURNAL = "ab" * 16


@dataclass(frozen=True)
class Kept:
    id: str
    time: datetime
    sequence: int | None
    reason: str = "journal"
    label: str = ""
    timeline: str = "t"
    journal: str = JOURNAL


def at(minutes: float) -> datetime:
    return TEN + timedelta(minutes=minutes)


def span(first, last, start, end, *, ended="", name="s", bases=()):
    made = tuple(Base(JOURNAL, base.sequence, base.time, base.id) for base in bases)
    return CapturedSpan(name, JOURNAL, first, last, at(start), at(end), at(end), ended, made)


def test_each_minute_of_a_span_is_made_and_of_an_ended_one_its_last_write():
    """P5-27: nothing before the first base, nothing twice, nothing in a gap."""
    begin, again = Kept("b", at(0.5), 5, "manual"), Kept("c", at(10.2), 60, "manual")
    spans = [span(0, 50, 0, 3.5, ended="died", bases=[begin]), span(55, 90, 10, 12, name="s2", bases=[again])]
    found = plan([begin, again], spans, Tiers(), at(12))
    assert [one.time for one in found.make] == [at(1), at(2), at(3), at(3.5), at(11), at(12)]
    assert [one.sequence for one in found.make] == [None] * 3 + [50] + [None] * 2
    assert found.step == MINUTE and found.drop == ()
    assert [one.time for one in plan([begin, again], spans, Tiers(), at(12), done=at(3)).make] == [
        at(3.5), at(11), at(12)
    ]  # fmt: skip
    assert [one.time for one in plan([begin, again], spans, Tiers(), at(12), done=at(11)).make] == [at(12)]
    made = [Kept("m", at(3.5), 50), Kept("n", at(11.99), 90)]
    assert [one.time for one in plan([begin, again, *made], spans, Tiers(), at(12)).make] == [at(12)]
    # Without the base nothing of the span can be reached.
    assert {one.span.id for one in plan([again], spans, Tiers(), at(12)).make} == {"s2"}


def test_it_gets_coarser_in_the_announced_order():
    """P5-28, P5-29: by what is left to be done and by the room that is left."""
    assert [step_for(used, 0) for used in (0, 0.7, 0.84, 0.85, 0.94, 0.95, 1)] == [60, 60, 60, 300, 300, 3600, 3600]
    assert [step_for(0, behind) for behind in (0, 600, 601, 3000, 3001)] == [60, 60, 300, 300, 3600]
    begin = Kept("b", at(0), 0, "manual")
    spans = [span(0, 500, 0, 30, bases=[begin])]
    assert [one.time for one in plan([begin], spans, Tiers(), at(30)).make] == [at(n) for n in range(5, 35, 5)]
    assert [one.time for one in plan([begin], spans, Tiers(), at(30), used=0.96, done=at(25)).make] == []
    assert plan([begin], spans, Tiers(), at(30), used=0.9, done=at(25)).step == 5 * MINUTE


def test_of_the_old_only_the_newest_of_a_minute_or_hour_stays():
    """P5-28: labelled, safety and schedule points stay whatever happens; the young ones all."""
    tiers = Tiers(journal=600, minutes=3600, hours=3 * 3600)
    now = at(300)
    young = [Kept(f"y{n}", at(299) + timedelta(seconds=n), 900 + n) for n in range(5)]
    minutes = [Kept(f"m{n}", at(270) + timedelta(seconds=15 * n), 800 + n) for n in range(1, 9)]
    hours = [Kept(f"h{n}", at(180 + 10 * n), 700 + n) for n in range(1, 6)]
    old = [Kept("old", at(60), 1)]
    others = [
        Kept("label", at(185), 600, label="upgrade"), Kept("safety", at(186), 601, "safety"),
        Kept("cron", at(187), None, "schedule", journal=""), Kept("manual", at(50), None, "manual", journal=""),
    ]  # fmt: skip
    everything = [*young, *minutes, *hours, *old, *others]
    assert set(plan(everything, [], tiers, now).drop) == {
        "m1", "m2", "m3", "m5", "m6", "m7", "h1", "h2", "h3", "h4", "old",
    }  # fmt: skip
    # From the last one that is older than the journal the first records that are kept are counted.
    base = Kept("first", at(269), 790, "manual")
    running = span(700, 1000, 200, 300, bases=[base])
    assert "m7" in plan([*everything, base], [running], tiers, now).drop
    later = [
        *everything,
        Kept(
            "late",
            at(
                272,
            )
            + timedelta(seconds=1),
            815,
        ),
        Kept("z", at(272.5), 820),
        base,
    ]
    assert "z" not in plan(later, [running], tiers, now).drop


def test_records_go_only_up_to_a_point():
    """P5-27: by time; of a span that is over all, when its end is a point or could not become one."""
    begin = Kept("b", at(0), 0, "manual")
    made = [Kept(f"m{n}", at(n), n * 10) for n in range(1, 6)]
    running = [span(0, 58, 0, 5.8, bases=[begin])]
    points = [begin, *made]
    assert [replaced(points, running, JOURNAL, at(n), None) for n in (-1, 0, 0.5, 1, 3.9, 99)] == [0, 0, 0, 10, 30, 50]
    assert replaced(points, running, "cd" * 16, at(99), None) == 0
    ended = [span(0, 58, 0, 5.8, bases=[begin], ended="died"), span(70, 80, 8, 9, name="s2")]
    assert replaced(points, ended, JOURNAL, at(7), None) == 50
    assert replaced(points, ended, JOURNAL, at(7), at(5.8)) == 58
    assert replaced([*points, Kept("e", at(5.8), 58)], ended, JOURNAL, at(7), None) == 58
    assert replaced([], ended, JOURNAL, at(7), None) == 58
    assert replaced(points, ended, JOURNAL, at(4), at(99)) == 40


def test_a_plan_over_months_takes_little_time():
    """P5-28: 5000 points in 100 spans."""
    points, spans = [], []
    for number in range(100):
        base = Kept(f"b{number}", at(number * 60), number * 1000, "manual")
        points.append(base)
        points += [Kept(f"{number}-{n}", at(number * 60 + n), number * 1000 + n * 10) for n in range(1, 50)]
        spans.append(span(number * 1000, number * 1000 + 600, number * 60, number * 60 + 55, name=str(number),
                          ended="x", bases=[base]))  # fmt: skip
    begun = time.process_time()
    plan(points, spans, Tiers(), at(6000))
    assert time.process_time() - begun < 2


class Spool:
    """Stands for the process that writes: it deletes what it is told to, as that does."""

    def __init__(self, captured, limit=0):
        self.captured, self.limit, self.asked = captured, limit, []

    def status(self):
        used = sum(path.stat().st_size for path in self.folder.iterdir())
        return SimpleNamespace(bytes=used, limit=self.limit, fields={"journal": self.captured.journal})

    @property
    def folder(self):
        return self.captured.home.spool(UUID)

    def forget(self, upto):
        self.asked.append(upto)
        with Journal(self.folder) as journal:
            gone = [part.path for part in journal.parts if part.sealed and part.last <= upto]
        freed = sum(path.stat().st_size for path in gone)
        for path in gone:
            path.unlink()
        return freed


@pytest.fixture
def captured():
    with tempfile.TemporaryDirectory(prefix="rw-") as folder:
        captured = Captured(Path(folder) / "home")
        with captured.session:
            captured.minutes(8)
            yield captured


def run(captured, minutes, **more):
    captured.session.__dict__.pop("catalogue", None)
    record = SimpleNamespace(uuid=UUID, domain="web")
    return service.run(captured.session, record, more.pop("budget", 60), now=at(minutes), **more)


def test_a_run_makes_points_then_forgets_what_they_stand_for(captured):
    """P5-27, P5-28: each minute is the state at its end; again there is nothing to do; every later write is there."""
    spool = Spool(captured)
    captured.home.path.joinpath("rewind.yaml").write_text("journal_keep: 240\n")
    first = run(captured, 8.0, control=spool)
    assert (first.made, first.left, first.step, first.dropped) == (8, 0, 60, 0)
    made = [point for point in captured.session.repository.points() if point.reason == "journal"]
    assert [point.sequence for point in made] == [6, 12, 18, 24, 30, 36, 42, 48]
    for point in made:
        captured.holds(point, range(1, point.sequence + 1))
    assert spool.asked == [24] and first.freed > 0 and first.expired == {captured.journal: 24}
    assert len(list(spool.folder.iterdir())) == 4
    captured.holds(captured.asked("#27", at(8)), range(1, 28))
    again = run(captured, 8.1, control=spool)
    assert (again.made, again.left) == (0, 0)
    captured.session.repository.delete_point("10")
    captured.holds(captured.asked("#29", at(8)), range(1, 30))
    # What is older than the journal is the newest point before it; what is as young must be exact.
    assert captured.asked("2026-09-21 10:01:35Z", at(8)).sequence == 6


def test_a_run_without_time_makes_what_it_can(captured):
    """P5-28: the oldest first, and the next run goes on; nothing goes that has no point."""
    spool = Spool(captured)
    captured.home.path.joinpath("rewind.yaml").write_text("journal_keep: 0\n")
    assert run(captured, 8.0, budget=0, control=spool).left == 8
    assert spool.asked == []
    done = run(captured, 8.0, control=spool)
    assert done.made == 8 and spool.asked[-1] == 48


def test_a_full_spool_is_emptied_in_the_announced_order(captured):
    """P5-29, P5-31: into points where nothing is shipped, else only what was shipped; the ledger tells."""
    used = Spool(captured).status().bytes
    spool = Spool(captured, limit=int(used / 0.75))
    outcome = run(captured, 8.0, control=spool, shipped=20)
    assert spool.asked == [20] and outcome.step == 60
    assert not list(Path(spool.folder).glob("*-00000000000000000018.rwj"))
    assert "not shipped: the spool is 75% full" in captured.ledger.events()[-1].detail
    spool.limit = 1
    outcome = run(captured, 8.5, control=spool)
    assert spool.asked[-1] == 48 and outcome.step == HOUR
    assert "each hour" in captured.ledger.events()[-1].detail
    spool.limit = 0
    run(captured, 9.0, control=spool)
    assert [event.kind for event in captured.ledger.events()] == ["tiers"] * 3
    assert captured.ledger.events()[-1].detail == "a point for each minute"


def test_what_is_damaged_costs_its_minutes_and_nothing_else(captured):
    """P5-36: the run goes on, and points that cannot be made are not tried for ever."""
    spool = Spool(captured)
    path = sorted(spool.folder.iterdir())[3]
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    outcome = run(captured, 8.0, control=spool)
    assert outcome.made == 3 and outcome.left == 0
    assert outcome.damaged, "later writes cannot be reached without a new point to count from"
    again = run(captured, 8.1, control=spool)
    assert again.made == 0 and not again.damaged


def test_dropped_points_are_gone_and_the_others_are_not(captured):
    """P5-28: after the hours only what people made is left."""
    spool = Spool(captured)
    run(captured, 8.0, control=spool)
    captured.point("lab", at(3), sequence=18, label="upgrade")
    captured.ledger.ended(captured.journal, 48, at(8), "stopped")
    outcome = run(captured, 60 * 24 * 100, control=spool)
    assert outcome.dropped == 8
    assert {point.id for point in captured.session.repository.points()} == {"10", "lab"}
    assert spool.asked[-1] == 48 and outcome.expired == {captured.journal: 48}


def test_a_silent_process_costs_nothing(captured):
    """P5-29: it is told, and nothing is forgotten."""

    class Silent:
        def status(self):
            raise JournalError(reason="it does not answer")

    with pytest.raises(JournalError):
        run(captured, 8.0, control=Silent())


def test_forgetting_by_rules_leaves_what_writes_are_counted_from(captured):
    """P5-27: the journal stays of use; who names a time to forget does not make a point of it first."""
    upkeep.forget(captured.session, "web", Policy(last=0, within=0.0, hourly=1), now=at(8))
    assert [point.id for point in captured.session.repository.points()] == ["10"]
    captured.point("20", at(9), label="only this")
    found = upkeep.forget(captured.session, "web", Policy(last=1), now=at(9))
    assert [(one.point.id, one.keep, one.reasons) for one in found] == [
        ("10", True, ("later writes are counted from it",)), ("20", True, ("last", "it has a label")),
    ]  # fmt: skip
    captured.holds(captured.asked("#27", at(8)), range(1, 28))
    # When nothing of the journal is that young any more it is a point as every other.
    captured.ledger.ended(captured.journal, 48, at(8), "stopped")
    gone = upkeep.forget(captured.session, "web", Policy(last=1), now=at(60 * 24))
    assert next(one.point.id for one in gone if not one.keep) == "10"
    with pytest.raises(NoSuchPoint):
        upkeep.forget(captured.session, "web", None, ["#30"])


def test_a_spool_that_fills_while_points_are_made_is_told_at_once_and_once(tmp_path):
    """P5-29: the ledger says that it got coarser before it has a gap to tell of, whatever a run is busy with."""
    home = Home(tmp_path / "home")
    home.create()
    for used in (0.71, 0.99):
        service.press(home, UUID, used)
    (event,) = tap.ledger_of(home, UUID).events()
    assert event.kind == "tiers"
    assert event.detail.startswith("a point for each minute, and of the journal only what was not shipped")
    assert event.detail.endswith("71% full")
