"""forget, gc and check, without a hypervisor."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

from appliance.capture import protection
from appliance.config import Home
from appliance.service import Session
from appliance.units import CHUNK
from tests.support.clihome import (
    NEWEST,
    UUID,
    Off,
    put_intent,
)


def test_forget_shows_its_plan_first(web):
    found = web.json("forget", "web", "--keep-last", "2", "--no-keep-labelled", "--dry-run")
    assert [one["keep"] for one in found[:-1]] == [False, False, True, True]
    assert found[-1] == {"type": "forget-summary", "dry_run": True, "kept": 2, "forgotten": 2}
    assert web.json("points", "web")[-1]["points"] == 4
    assert web("forget", "web", "--keep-last", "2", "--no-keep-labelled") == 0
    points = [one for one in web.json("points", "web") if one["type"] == "point"]
    assert len(points) == 2
    assert points[0]["since"] is None


def test_forget_by_rules_leaves_what_has_a_label_and_shows_labels(web):
    found = web.json("forget", "web", "--keep-last", "1", "--dry-run")
    told = {one["label"]: (one["keep"], one["reasons"]) for one in found[:-1] if one["label"]}
    assert told == {"before-upgrade": (True, ["it has a label"])}
    assert web("forget", "web", "--keep-last", "1") == 0
    assert [line.split()[-6:-5] for line in web.out.splitlines() if "has a label" in line] == [["before-upgrade"]]
    assert {one["label"] for one in web.json("points", "web") if one["type"] == "point"} == {"before-upgrade", ""}


def test_forget_leaves_the_point_that_the_next_one_continues_from(web):
    """Whatever the rules say: without it the next point would read the whole disks. By name it can be forgotten."""
    with Session(Home(web.home)) as session:
        point = session.repository.points()[-1]
        session.repository.commit(replace(point, id="ffff0000", time=point.time + timedelta(seconds=1), parent=None))
    found = {one["point"]: one for one in web.json("forget", "web", "--keep-last", "1")[:-1]}
    assert found[NEWEST]["keep"] and "continues" in found[NEWEST]["reasons"][0]
    assert web("forget", "web", NEWEST) == 0


def test_forget_of_named_points(web):
    """What stays is counted; a point may be named twice."""
    assert web.json("forget", "web", "before-upgrade", "--dry-run")[-1]["kept"] == 3
    assert web("forget", "web", "before-upgrade", "0001abcd00000001") == 0
    assert "3 kept, 1 forgotten" in web.out
    points = [one for one in web.json("points", "web") if one["type"] == "point"]
    assert [one["changed_bytes"] for one in points] == [2 * CHUNK, 4 * CHUNK, 2 * CHUNK]


def test_the_point_that_undo_needs_is_forgotten_knowingly_only(web, monkeypatch):
    """Promise 3: by name with consent, by rules never; without it undo says what is missing and what there is."""
    put_intent(web.home, "DONE")
    asked, action = [], "forget of point 0003abcd00000003, which `rewind undo web` leads back to,"
    message, hint = web.fails(56, "forget", "web", "latest")
    assert message == f"{action} was not confirmed" and "--yes" in hint
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: asked.append(question))
    assert web("forget", "web", "latest", "before-upgrade") == 56
    assert len(asked) == 1 and asked[0].startswith("`rewind undo web` leads back to point 0003abcd00000003 of ")
    assert web.json("points", "web")[-1]["points"] == 4
    found = web.json("forget", "web", "latest", "before-upgrade", "--dry-run")
    assert [len(one["warnings"]) for one in found[:-1]] == [2, 0]
    assert "undo" in found[0]["warnings"][0] and "whole disks" in found[0]["warnings"][1]
    record = protection.load(Home(web.home), UUID)
    protection.save(Home(web.home), replace(record, last_point="0002abcd00000002"))
    with Session(Home(web.home)) as session:
        newest = session.repository.points()[-1]
        session.repository.commit(replace(newest, id="0004abcd00000004", time=newest.time + timedelta(minutes=1)))
    kept = {one["point"]: one["reasons"] for one in web.json("forget", "web", "--keep-last", "1")[:-1] if one["keep"]}
    assert kept["0003abcd00000003"] == ["`rewind undo` leads back to it"]
    assert web("forget", "web", "0003abcd00000003", "--yes") == 0
    assert "undo" in web.out
    monkeypatch.setattr(Session, "domain", lambda *_: Off())
    for words in (("--dry-run",), ("--yes",)):
        monkeypatch.setattr(Session, "claim", lambda *_args, **_options: nullcontext())
        message, hint = web.fails(41, "undo", "web", *words)
        assert message == "'web' has no recovery point '0003abcd00000003'"
        assert "that revert cannot be undone" in hint and "`rewind points web`" in hint


def test_a_domain_of_which_all_was_forgotten_is_not_said_to_wait_for_its_first_point(web):
    assert web("points", "web", "--timeline", "bbbb") == 0 and "web has no such points\n" in web.out
    points = [one["id"] for one in web.json("points", "web") if one["type"] == "point"]
    assert web("forget", "web", *points) == 0
    assert web("points", "web") == 0 and "web has no points\n" in web.out


def test_forget_without_rules_forgets_nothing(web):
    _message, hint = web.fails(3, "forget", "web")
    assert "--keep" in hint
    assert web.json("points", "web")[-1]["points"] == 4


def test_gc_after_forget_frees_space(web):
    web("forget", "web", "--keep-last", "1", "--no-keep-labelled")
    found = web.json("gc")
    assert (web.code, found[-1]["type"], found[-1]["dry_run"]) == (0, "gc-summary", False)
    assert web.json("points", "web")[-1]["points"] == 1
    assert web("check", "--read-data") == 0


def test_check_is_silent_about_a_sound_repository(web):
    found = web.json("check", "--read-data")
    assert (web.code, found[-1]["problems"], found[-1]["points"]) == (0, 0, 4)


def test_check_names_what_is_damaged(web):
    packs = [path for path in (web.home / "repository/packs").rglob("*") if path.is_file()]
    newest = max(packs, key=lambda path: path.stat().st_size)
    newest.chmod(0o600)
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 0xFF
    newest.write_bytes(data)
    found = web.json("check", "--read-data")
    assert web.code == 32
    assert found[-1]["problems"] >= 1
    assert found[0]["type"] == "problem" and found[0]["reason"]
