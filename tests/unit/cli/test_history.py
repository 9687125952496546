"""points, diff and timeline, without a hypervisor."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest

from appliance.capture import protection
from appliance.config import Home
from appliance.model import Timeline
from appliance.service import Session
from appliance.units import CHUNK
from tests.support.clihome import (
    DEAD,
    ROOT,
    SIZE,
    START,
    TAPPED,
    UUID,
    put_capture,
    put_intent,
)
from tests.support.journal import Scribe


def test_points_are_listed_with_changed_bytes_and_gaps(web):
    """P5-22: the list to choose from shows the changed bytes between recovery points. libvirt is not asked."""
    found = web.json("points", "web")
    points = [one for one in found if one["type"] == "point"]
    assert [one["changed_bytes"] for one in points] == [2 * CHUNK] * 4
    assert [one["since"] for one in points] == [None, *(one["id"] for one in points[:-1])]
    assert points[1]["label"] == "before-upgrade"
    assert points[0]["time"] == "2026-03-01T12:00:00Z"
    assert found[-2]["type"] == "gap"  # the last one is long ago, and there is a schedule
    assert found[-1] == {"type": "points-summary", "domain": "web", "points": 4, "gaps": 1, "timelines": 1}


def test_points_for_a_person(web):
    assert web("points", "web") == 0
    lines = web.out.splitlines()
    assert lines[0].split()[:2] == ["point", "time"]
    assert "before-upgrade" in lines[2] and "128 KiB" in lines[2]
    assert lines[5].startswith("gap") and "not captured" in lines[5]


def test_a_gap_stands_where_it_begins(web):
    """Promise 2: between the two points that it lies between, with its beginning and its length, in both forms."""
    put_capture(web.home)
    kinds = [(one["type"], one.get("id", one.get("start", ""))[:19]) for one in web.json("points", "web")[:-1]]
    assert kinds == [
        ("point", "0000abcd00000000"), ("gap", "2026-03-01T12:00:58"), ("point", "0001abcd00000001"),
        ("gap", "2026-03-01T12:01:30"), ("point", "0002abcd00000002"), ("point", "0003abcd00000003"),
        ("gap", "2026-03-01T12:04:00"),
    ]  # fmt: skip
    assert web("points", "web") == 0
    row = web.out.splitlines()[4]
    begin = (START + timedelta(seconds=90)).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert row.startswith("gap") and begin in row and "from then on 1 m not captured: the journal did not" in row


def test_points_can_be_narrowed(web):
    assert len([one for one in web.json("points", "web", "--last", "2") if one["type"] == "point"]) == 2
    found = web.json("points", "web", "--since", "2026-03-02")
    assert found[-1]["points"] == 0
    assert web.json("points", "web", "--timeline", "bbbb")[-1]["points"] == 0


@pytest.mark.parametrize("since", ["2h", "15:45", "10m ago", "2030-01-01", "2026-03-02T10:00:30Z", "2026-03-02 10:00"])
def test_points_and_timeline_read_the_same_times(web, since):
    assert web("points", "web", "--since", since) == 0, web.err
    assert web("timeline", "web", "--since", since, "--until", "2031-01-01") == 0, web.err
    assert web.json("points", "web", "--since", "2026-03-01T12:01:30Z")[-1]["points"] == 2
    messages = [web.fails(3, verb, "web", "--since", "soon") for verb in ("points", "timeline")]
    assert messages[0] == messages[1] == ("'soon' is neither a time nor a duration", "14:02, 2026-03-01T14:02 or 2h")


def test_history_is_readable_when_the_domain_is_not_protected_any_more(web):
    protection.remove(Home(web.home), UUID)
    assert web.json("points", "web")[-1]["points"] == 4
    assert web.json("points", UUID)[-1]["points"] == 4


def test_diff_tells_extents_and_bytes(web):
    """P5-03, P5-21: what differs between two recovery points."""
    found = web.json("diff", "web", "before-upgrade", "latest", "--extents")
    assert [(one["offset"], one["length"]) for one in found[:-1]] == [(4 * CHUNK, 4 * CHUNK)]
    assert found[-1]["changed_bytes"] == 4 * CHUNK
    assert found[-1]["unit_bytes"] == CHUNK
    exact = web.json("diff", "web", "before-upgrade", "latest", "--exact")
    assert (exact[-1]["changed_bytes"], exact[-1]["unit_bytes"]) == (4 * CHUNK, 4096)
    assert web.json("diff", "web", "latest", "latest")[-1]["changed_bytes"] == 0


def test_timeline_tells_everything_as_lines(web):
    """P5-37: points, spans, the revert and the gaps between two instants."""
    put_capture(web.home)
    found = web.json("timeline", "web", "--since", "2026-03-01T12:00:30Z", "--until", "2026-03-01T12:04:00Z")
    kinds = {}
    for one in found:
        kinds.setdefault(one["type"], []).append(one)
    assert [one["id"] for one in kinds["point"]] == ["0001abcd00000001", "0002abcd00000002", "0003abcd00000003"]
    assert [(one["timeline"], one["points"], one["origin"]) for one in kinds["lane"]] == [
        ("aaaa000011112222", 3, None), ("bbbb000011112222", 0, "0001abcd00000001"),
    ]  # fmt: skip
    assert [(one["first"], one["last"], one["running"], one["timeline"]) for one in kinds["span"]] == [
        (0, 90, False, None), (120, 200, False, None), (200, 300, True, "bbbb000011112222"),
    ]  # fmt: skip
    assert [one["bases"] for one in kinds["span"]] == [[f"000{n}abcd0000000{n}"] for n in (1, 2, 1)]
    assert [(one["start"][11:], one["seconds"], one["reason"]) for one in kinds["gap"]][:2] == [
        ("12:00:58Z", 2.0, "the capture had no baseline yet"),
        ("12:01:30Z", 60.0, "the journal did not answer for 250 ms"),
    ]
    assert kinds["gap"][2]["reason"] == "the capture has not been seen to run since"
    assert [(one["sequence"], one["point"]) for one in kinds["branch"]] == [(200, "0001abcd00000001")]
    assert [(one["sequence"], one["label"]) for one in kinds["mark"]] == [(210, "before the migration")]
    assert [one["kind"] for one in kinds["capture-event"]] == ["latency"]
    assert sum(one["bytes"] for one in kinds["bucket"] if one["exact"]) == 40960 + len("before the migration")
    last = found[-1]
    assert (last["type"], last["points"], last["gaps"], last["timelines"]) == ("timeline", 3, 3, 2)
    assert last["gap_seconds"] == 62.0
    assert (last["capture"]["mode"], last["capture"]["reason"]) == ("waiting", "the process that captures is not there")
    assert last["capture"]["last_gap"]["reason"] == "the capture has not been seen to run since"


def test_timeline_tells_when_something_was_written_and_invents_nothing(web):
    """The blocks that points differ in are not spread over times of which the journal says that nothing was written."""
    put_capture(web.home)
    window = ("--since", "2026-03-01T12:01:00Z", "--until", "2026-03-01T12:04:00Z")
    found = [one for one in web.json("timeline", "web", *window) if one["type"] == "bucket"]
    told = {one["start"][11:19]: one["bytes"] for one in found if one["exact"] and one["bytes"]}
    assert sum(told.values()) == 40960 + len("before the migration")
    assert min(told) >= "12:03:16" and max(told) <= "12:03:28", told
    captured = [one for one in found if "12:02:30" <= one["start"][11:19] < "12:04:00"]
    assert len(captured) > 20 and all(one["exact"] for one in captured)


def test_timeline_takes_no_promised_room_for_writes(web):
    """The segment that is being written is as long as what was promised to it."""
    put_capture(web.home)
    sealed = next(Home(web.home).spool(UUID).iterdir())
    scribe = Scribe(sealed.parent, {"vda": SIZE}, bytes.fromhex(TAPPED), wall=int(START.timestamp() + 230) * 10**9)
    scribe.sequence = 300
    scribe.write("vda", 0, b"x" * 4096)
    os.truncate(scribe.leave_open(), 1 << 20)
    found = web.json("timeline", "web", "--since", "2026-03-01T12:03:40Z", "--until", "2026-03-01T12:04:00Z")
    assert sum(one["bytes"] for one in found if one["type"] == "bucket") == 4096


def test_timeline_for_a_person(web):
    """The same as a drawing, in the width that was asked for."""
    put_capture(web.home)
    window = ("--since", "2026-03-01T12:00Z", "--until", "2026-03-01T12:04Z", "--width", "50")
    assert web("timeline", "web", *window) == 0
    lines = web.out.splitlines()
    assert [line[:8].strip() for line in lines[1:5]] == ["rate", "", "aaaa0000", "bbbb0000"]
    assert set("●◆─x") <= set(lines[3]) and "╰" in lines[4]
    assert any(line.endswith("gap of 1 m: the journal did not answer for 250 ms") for line in lines)
    assert any(line.endswith("mark 'before the migration' at write 210") for line in lines)
    assert lines[-1].startswith("now: writes are not captured now (the process that captures is not there)")
    assert web("timeline", "web") == 0


def test_a_look_at_a_write_leaves_no_point(web, cut):
    """P5-21, P5-22: what only tells what would be done does nothing, nor does a revert that is not agreed to."""
    put_capture(web.home)
    cut()
    for code, *words in (
        (0, "revert", "web", "--to", "#205", "--dry-run"), (0, "diff", "web", "#205", "latest"),
        (56, "revert", "web", "--to", "#205"),
    ):  # fmt: skip
        assert web(*words) == code, web.err
        assert web.json("points", "web")[-1]["points"] == 4
    assert web("revert", "web", "--to", "#205", "--yes") == 130
    assert web.json("points", "web")[-1]["points"] == 5


@pytest.mark.parametrize(("phase", "lanes"), [("FENCED", 1), ("SWITCHED", 2), ("DONE", 1)])
def test_timeline_draws_the_reverts_that_were(web, phase, lanes):
    """Promise 2: one that was killed before it changed anything is none; one that runs is one from its switch on."""
    with Session(Home(web.home)) as session:
        made = Timeline("t2", UUID, START + timedelta(minutes=5), "aaaa000011112222", "0001abcd00000001")
        session.repository.put_timeline(made)
    put_intent(web.home, phase)
    found = web.json("timeline", "web", "--since", "2026-03-01T12:00Z", "--until", "2026-03-01T12:09Z")
    assert [one["type"] for one in found].count("lane") == lanes


def test_timeline_where_the_output_is_ascii(web):
    done = subprocess.run(
        [sys.executable, "-m", "appliance.cli", "--home", web.home, "timeline", "web", "--since", "2026-03-01"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "aaaa0000" in done.stdout and done.stdout.isascii()


def test_timeline_of_a_domain_that_is_not_protected_any_more(web):
    protection.remove(Home(web.home), UUID)
    last = web.json("timeline", "web", "--since", "2026-03-01T11:59Z", "--until", "2026-03-01T13:00Z")[-1]
    assert (last["points"], last["gaps"], last["capture"]) == (4, 0, None)


def test_timeline_says_which_segment_it_cannot_read(web):
    put_capture(web.home)
    [path] = Home(web.home).spool(UUID).glob("*.rwj")
    path.write_bytes(path.read_bytes()[:-10])
    last = web.json("timeline", "web", "--since", "2026-03-01T12:00Z")[-1]
    assert len(last["notes"]) == 1 and "is damaged at byte" in last["notes"][0]


@pytest.mark.parametrize(
    "window",
    [("--since", "yesterday-ish"), ("--until", "25:00"), ("--since", "1h", "--until", "2h"), ("--since", "0s")],
)
def test_a_window_that_makes_no_sense_is_told(web, window):
    web.fails(3, "timeline", "web", *window)


def test_points_have_the_gaps_of_the_ledger_while_every_write_is_wanted(web):
    put_capture(web.home)
    rows = [one for one in web.json("points", "web") if one["type"] == "gap"]
    assert [(one["start"][11:19], one["seconds"]) for one in rows[:2]] == [("12:00:58", 2.0), ("12:01:30", 60.0)]
    put_again = protection.load(Home(web.home), UUID)
    protection.save(Home(web.home), replace(put_again, continuous=False, every=60))
    rows = [one for one in web.json("points", "web") if one["type"] == "gap"]
    assert [one["reason"] for one in rows] == [
        "the capture had no baseline yet", "the journal did not answer for 250 ms", "no point was taken",
    ]  # fmt: skip
    assert rows[-1]["start"] == "2026-03-01T12:04:00Z"


def test_status_shows_how_the_capture_stands(web):
    """Achieved RPO: the age of the newest point without continuous capture."""
    by_clock = web.json("status")[1]
    assert by_clock["capture"]["mode"] == "epochs"
    assert abs(by_clock["capture"]["near_seconds"] - by_clock["age_seconds"]) < 1
    assert by_clock["capture"]["far_seconds"] is None
    assert by_clock["capture"]["far_reason"].startswith("the repository is on this host (")
    assert by_clock["capture"]["last_gap"]["reason"] == "no point was taken"
    put_capture(web.home)
    wanted = web.json("status")[1]["capture"]
    assert (wanted["mode"], wanted["journal"], wanted["spool_bytes"]) == ("waiting", None, None)
    assert web("status") in (0, 1)
    assert "waiting" in web.out and "the process that captures is not there" in web.out


def test_capture_without_a_point_says_so(web):
    """After the first attempt failed nothing can be recovered, whatever the clock is going to do."""
    assert web.json("status")[1]["capture"]["reason"] == ""
    with Session(Home(web.home)) as session:
        for one in session.repository.points():
            session.repository.delete_point(one.id)
    assert web.json("status")[1]["capture"]["reason"] == "there is no point"
    assert web("timeline", "web") == 0
    assert "now: " in web.out and "(there is no point)" in web.out, web.out


def test_a_repository_elsewhere_has_a_far_figure(web, monkeypatch):
    monkeypatch.setattr("appliance.service.capturing.on_this_host", lambda _url: "")
    found = web.json("status")[1]["capture"]
    assert found["far_seconds"] == found["near_seconds"] and found["far_reason"] == ""
    monkeypatch.setattr("appliance.service.doctor.host.on_this_host", lambda _url: "")
    assert not [one for one in web.json("--connect", DEAD, "doctor") if "is on this host" in one.get("finding", "")]


def test_the_catalogue_may_be_deleted_at_any_time(web):
    before = web.json("points", "web")[:-2]
    for path in (web.home / "cache").glob("catalogue*"):
        path.unlink()
    assert web.json("points", "web")[:-2] == before


def test_a_cache_that_is_made_anew_is_closed_to_others(web):
    shutil.rmtree(web.home / "cache")
    before = os.umask(0o022)
    try:
        assert web("points", "web") == 0
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((web.home / "cache" / name).stat().st_mode) for name in ("", "catalogue.sqlite")]
    assert modes == [0o700, 0o600]
