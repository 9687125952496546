"""A12: bad input of every verb gives one sentence, a hint and its exit code.

Long on purpose: they stand in one place, so that one that is missing shows.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.capture import protection
from appliance.cli import main
from appliance.cli.output import Output
from appliance.config import Home
from appliance.hypervisor.base import DomainState
from appliance.model import Point
from appliance.service import Session
from tests.support.clihome import (
    DEAD,
    NEWEST,
    ROOT,
    UUID,
    Off,
    put_capture,
    put_intent,
)

WITHOUT_HOME = [
    ("status",), ("points", "web"), ("protect", "web"), ("unprotect", "web"), ("point", "web"),
    ("revert", "web", "--to", "latest", "--yes"), ("undo", "web", "--yes"), ("resume",), ("diff", "web", "a", "b"),
    ("export", "web", "--at", "latest"), ("restore", "web", "--at", "latest", "--into", "x"), ("check",), ("gc",),
    ("forget", "--keep-last", "1"), ("key", "show"), ("daemon",), ("image", "list"),
]  # fmt: skip


@pytest.mark.parametrize("words", WITHOUT_HOME, ids=lambda words: words[0])
def test_without_a_home_every_verb_says_what_makes_one(rewind, words):
    """A12"""
    message, hint = rewind.fails(3, *words)
    assert "is not a home of rewind" in message
    assert "rewind init" in hint


UNKNOWN_DOMAIN = [
    ("points", "nobody"), ("unprotect", "nobody"), ("revert", "nobody", "--to", "latest", "--yes"),
    ("undo", "nobody", "--yes"), ("resume", "nobody"), ("diff", "nobody", "a", "b"),
    ("export", "nobody", "--at", "latest"), ("restore", "nobody", "--at", "latest", "--into", "x"),
    ("forget", "nobody", "--keep-last", "1"),
]  # fmt: skip


@pytest.mark.parametrize("words", UNKNOWN_DOMAIN, ids=lambda words: words[0])
def test_an_unknown_domain_is_named(web, words):
    """A12"""
    message, hint = web.fails(22, "--connect", DEAD, *words)
    assert "'nobody'" in message
    assert "nobody" in hint


def test_a_domain_that_was_mistyped_is_guessed(web):
    """A12"""
    assert web.fails(22, "points", "wbe")[1] == "did you mean 'web'?"
    assert web.fails(22, "--connect", DEAD, "undo", "webb", "--yes")[1] == "did you mean 'web'?"
    assert web.fails(12, "--connect", DEAD, "point", "wbe")[1] == "did you mean 'web'?"


@pytest.mark.parametrize(
    "words", [("point", "nobody"), ("protect", "nobody"), ("status", "nobody"), ("doctor", "nobody")]
)
def test_an_unknown_domain_of_a_hypervisor_is_named(web, words):
    """A12"""
    if words[0] == "doctor":
        found = web.json("--connect", DEAD, *words)
        assert web.code == 2
        assert "'nobody'" in found[0]["finding"]
    else:
        message, _hint = web.fails(12, "--connect", DEAD, *words)
        assert "'nobody'" in message


WHENS = [
    ("revert", "web", "--to"), ("export", "web", "--at"), ("restore", "web", "--into", "x", "--at"),
    ("diff", "web", "latest"), ("forget", "web"),
]  # fmt: skip


@pytest.mark.parametrize("words", WHENS, ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("when", "code"),
    [("nonsense", 41), ("ffffffff", 41), ("2026-02-01", 42), ("2030-01-01", 42), ("2026-03-01T13:00:00Z", 42)],
)
def test_a_point_that_is_not_there_is_told(web, words, when, code):
    """A12: unknown point, and a time that was not captured: before the first point, to come, and in a gap."""
    extra = ("--yes",) if words[0] == "revert" else ()
    message, hint = web.fails(code, *words, when, *extra)
    assert when in message
    assert hint


def test_an_ambiguous_label_is_told_with_the_candidates(web):
    """A12"""
    with Session(Home(web.home)) as session:
        point = session.repository.points()[-1]
        fields = {name: getattr(point, name) for name in Point.__slots__}
        session.repository.commit(Point(**fields | {"id": "ffff0000", "label": "before-upgrade"}))
    message, _hint = web.fails(43, "export", "web", "--at", "before-upgrade")
    assert "ffff0000" in message


DISKS = [
    ("export", "web", "--at", "latest"), ("restore", "web", "--at", "latest", "--into", "x"),
    ("diff", "web", "latest", "before-upgrade"), ("revert", "web", "--to", "before-upgrade", "--yes"),
]  # fmt: skip


@pytest.mark.parametrize("words", DISKS, ids=lambda words: words[0])
def test_an_unknown_disk_is_told_with_those_there_are(web, words):
    """A12"""
    message, _hint = web.fails(13, *words, "--disk", "vdz")
    assert "'vdz'" in message
    assert "vda" in message


@pytest.mark.parametrize(
    "words",
    [
        ("key",), ("nonsense",), ("point",), ("revert", "web"), ("point", "web", "--rate", "fast"),
        ("protect", "web", "--every", "often"), ("protect", "web", "--every", "-5"), ("protect", "web", "--every", "0"),
        ("forget", "web", "--keep-last", "-1"), ("forget", "web", "--keep-last", "x"), ("points", "web", "--last", "0"),
        ("point", "web", "--quiesce", "perhaps"), ("export", "web"), ("completion", "tcsh"), ("help", "nothing"),
        ("revert", "web", "--to", "latest", "--background"), ("forget", "web", "latest", "--keep-last", "1"),
        ("init", "--no-encryption", "--passphrase"), ("restore", "web", "--at", "latest"), ("key", "nonsense"),
        ("status", "--nonsense"), ("points", ""), ("point", "a\nb"), ("gc", "surplus"), ("--home",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_arguments_are_told_in_one_sentence(web, words):
    """A12: usage errors have exit code 3 and say where to look."""
    _message, hint = web.fails(3, *words)
    assert "--help" in hint


@pytest.mark.parametrize(
    "words", [("protect", "web", "--every", "15"), ("pause", "web", "--for", "10"), ("forget", "--keep-within", "7"),
              ("protect", "web", "--max-added-latency", "5")], ids=" ".join,
)  # fmt: skip
def test_a_duration_without_a_unit_is_refused(web, words):
    """Promise 1: who means minutes does not get seconds, and who means days loses no points."""
    message, hint = web.fails(3, *words)
    assert f"{words[-1]!r} has no unit" in message and f"`{words[-2]} {words[-1]}m`" in hint
    assert protection.load(Home(web.home), UUID).every == 60


def test_without_a_word_the_help_is_shown(rewind):
    assert rewind(home=False) == 0
    assert rewind.out.startswith("Usage: rewind [OPTIONS] VERB")


@pytest.mark.parametrize("verb", ["points", "point", "export", "gc", "check", "init", "diff", "timeline"])
def test_help_tells_the_codes_of_a_repository_that_is_not_there(rewind, verb):
    assert rewind(verb, "--help", home=False) == 0
    codes = [line.split() for line in rewind.out.partition("Exit codes")[2].splitlines()]
    assert ["30", "RepositoryNotFound"] in codes and ["36", "Temporary"] in codes


def test_a_verb_that_was_mistyped_is_guessed(web):
    message, _hint = web.fails(3, "statsu")
    assert "'status'" in message
    message, _hint = web.fails(3, "verify", "web")
    assert "did you mean 'image verify'?" in message


@pytest.mark.parametrize(
    "words",
    [
        ("point", "web"),
        ("protect", "web"),
        ("protect", "other"),
        ("unprotect", "web"),
        ("revert", "web", "--to", "before-upgrade", "--yes"),
        ("status", "--all"),
    ],
    ids=" ".join,
)
def test_a_libvirt_that_does_not_answer_is_told(web, tmp_path, words):
    """A12: libvirt down."""
    pytest.importorskip("libvirt")
    uri = f"qemu+unix:///system?socket={tmp_path}/nobody"
    message, hint = web.fails(11, "--connect", uri, *words)
    assert uri in message
    assert hint


def test_a_remote_hypervisor_is_refused_with_the_reason(web):
    message, hint = web.fails(15, "--connect", "qemu+ssh://elsewhere/system", "protect", "other")
    assert "elsewhere" in message and hint


def test_a_repository_that_is_gone_is_told(web):
    """A12"""
    os.rename(web.home / "repository", web.home / "moved")
    where = str(web.home / "repository")
    message, hint = web.fails(30, "points", "web")
    assert where in message
    assert "mounted" in hint and f"findmnt --target {web.home}`" in hint, "as far as there is a folder"
    assert "init" not in hint, "that would make an empty one in its place"


def test_doctor_sends_nobody_to_make_a_new_repository(web):
    """What is missing is told once, by the check that it belongs to; the clock is judged without."""
    os.rename(web.home / "repository", web.home / "moved")
    found = [one for one in web.json("--connect", DEAD, "doctor") if "no repository" in one.get("finding", "")]
    assert [(one["name"], one["status"]) for one in found] == [("repository", "fail")]
    assert "mounted" in found[0]["remedy"] and "init" not in found[0]["remedy"]


def test_doctor_of_a_domain_tells_of_a_key_and_a_repository_that_are_missing(web, monkeypatch):
    monkeypatch.setattr("appliance.service.doctor.domains.check", lambda *_: iter(()))
    assert web("doctor", "web") == 0
    assert "the key and the repository were looked at" in web.out
    os.rename(web.home / "repository", web.home / "moved")
    found = web.json("doctor", "web")
    assert [(one["name"], one["status"]) for one in found[:-1] if one["status"] != "ok"] == [("repository", "fail")]
    os.rename(web.home / "moved", web.home / "repository")
    os.rename(web.home / "key", web.home / "away")
    assert [one["name"] for one in web.json("doctor", "web") if one.get("status") == "fail"] == ["key"]
    assert web.code == 2


def test_a_repository_of_another_version_is_told(web):
    """A12"""
    config = web.home / "repository/config"
    values = json.loads(config.read_text())
    config.chmod(0o600)
    config.write_text(json.dumps(values | {"rewind_repository": 99}))
    message, hint = web.fails(39, "points", "web")
    assert "99" in message and hint


def test_a_damaged_instance_file_is_told(web):
    (web.home / "instance.json").write_text("{")
    web.fails(3, "points", "web")


def test_a_damaged_protection_record_is_told(web):
    (web.home / f"domains/{UUID}.json").write_text("{}")
    message, hint = web.fails(3, "point", "web")
    assert UUID in message and hint


def test_a_bad_setting_is_told(web):
    (web.home / "rewind.yaml").write_text("cbw_timeout: never\n")
    message, _hint = web.fails(3, "protect", "other")
    assert "cbw_timeout" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody else")
def test_a_home_that_may_not_be_read_is_told(web):
    """A12: no permission."""
    # Others may pass through to the home, not into it.
    for folder in (web.home.parent, *web.home.parent.parents):
        if folder == Path("/tmp"):
            break
        folder.chmod(0o755)
    os.chmod(web.home, 0o700)
    # Run once before, since another user may not be allowed to import what is needed.
    words = ["--home", str(web.home), "points", "web"]
    code = f"import os, sys; from appliance.cli import main; main({words}); os.setuid(65534); sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (3, 38), done.stderr
    assert "ermission" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 37), (errno.EROFS, 38), (errno.EPERM, 38), (errno.EIO, 3), (errno.ENOTDIR, 3)]
)
def test_what_the_system_refuses_is_told_with_the_path(web, monkeypatch, number, code):
    """A12: no space, no permission, a disk that is broken: no bug of ours."""
    from appliance.timeline.catalogue import Catalogue

    def refused(*_, **__):
        raise OSError(number, os.strerror(number), "/somewhere/file")

    monkeypatch.setattr(Catalogue, "points", refused)
    message, hint = web.fails(code, "points", "web")
    assert all(word in message for word in ("/somewhere", "file")) and hint


def test_a_domain_that_somebody_works_on_is_told_with_who(web):
    """A12, and the daemon and a person do not collide: the second waits or says who is at work."""
    with Session(Home(web.home)) as session, session.hold(UUID, "web", "point web"):
        message, hint = web.fails(31, "unprotect", "web")
        assert f"process {os.getpid()}" in message and "point web" in message
        assert "--wait" in hint
        assert web.json("status")[1]["busy"]
        began = time.monotonic()
        assert web("unprotect", "web", "--wait", "1") == 31
        assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    "words",
    [("point", "web"), ("unprotect", "web"), ("forget", "web", "before-upgrade")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_while_a_revert_is_under_way_other_verbs_say_what_ends_it(web, words):
    """A12"""
    put_intent(web.home)
    message, hint = web.fails(51, *words)
    assert "0001abcd00000001" in message
    assert "rewind resume web" in hint


def test_a_command_that_is_told_leads_to_the_home_that_was_given(web, capsys):
    """A12: without it `undo` would offer the undo of another home. What the environment says holds for the next one."""
    put_intent(web.home)
    home = ("--home", str(web.home))
    for words in (("point", "web", *home), (*home, "point", "web")):
        assert main([*words]) == 51
        assert f"HINT: `rewind --home {web.home} resume web` ends it" in capsys.readouterr().err
    assert web("point", "web") == 51 and "`rewind resume web` ends it" in web.err


def test_a_command_of_another_home_is_told_as_it_is(capsys):
    output = Output(home="/my home")
    output.tell("`rewind undo web` leads back, `rewind points web` lists; `rewind help exit-codes`, `virsh start web`")
    for theirs in ("`rewind point web` (process 3)", "`rewind point web` of home /b", "`rewind --home /b undo web`"):
        output.tell(theirs)
    assert capsys.readouterr().out.splitlines() == [
        "`rewind --home '/my home' undo web` leads back, `rewind --home '/my home' points web` lists;"
        " `rewind help exit-codes`, `virsh start web`",
        "`rewind point web` (process 3)", "`rewind point web` of home /b", "`rewind --home /b undo web`",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [("revert", "web", "--to", "latest", "--yes"), ("forget", "web", "before-upgrade")])
def test_while_somebody_works_on_a_revert_nobody_is_sent_to_resume_it(web, words):
    """A12: who works on it, and to wait; or that the keeper goes on by itself."""
    from appliance.restore import intent

    put_intent(web.home)
    with Session(Home(web.home)) as session, session.hold(UUID, "web", "revert web"):
        _message, hint = web.fails(51, *words)
    assert f"process {os.getpid()}" in hint and "wait" in hint and "resume" not in hint
    with intent.drive_lock(Home(web.home), UUID):
        _message, hint = web.fails(51, *words)
        assert "by itself" in hint
        assert "by itself" in web.fails(51, "point", "web")[1]
        assert "by itself" in web.fails(51, "undo", "web", "--yes")[1]
    assert "`rewind resume web` ends it" in web.fails(51, *words)[1]


def test_an_interrupted_revert_says_what_becomes_of_it(web, cut):
    """A12"""
    from appliance.restore import intent

    words = ("revert", "web", "--to", "before-upgrade", "--yes")
    cut()
    assert web(*words) == 130
    assert "rewind: interrupted: by the keyboard; the revert is given up, and nothing has changed\n" in web.err
    cut(lambda: put_intent(web.home))
    assert web(*words) == 130
    assert "half-way, and `rewind resume web` ends it" in web.err
    put_intent(web.home, "DONE")
    held = intent.drive_lock(Home(web.home), UUID)
    cut(lambda: (put_intent(web.home), held.__enter__()))
    assert web("undo", "web", "--yes") == 130
    assert "goes on by itself, `rewind status web` shows it" in web.err
    held.__exit__(None, None, None)


def test_an_interrupted_plan_says_that_nothing_has_changed(web, cut, monkeypatch):
    """A12: also at the question, and while a domain is waited for."""
    import click

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    def leave(*_args, **_options):
        raise click.Abort

    words = ("revert", "web", "--to", "before-upgrade")
    cut()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", leave)
    assert web(*words) == 130
    assert "by the keyboard; nothing has changed" in web.err
    monkeypatch.setattr(Session, "hold", stop)
    assert web(*words, "--yes") == 130
    assert "given up, and nothing has changed" in web.err
    monkeypatch.setattr("appliance.service.recovery.plan", stop)
    assert web(*words) == 130
    assert "by the keyboard; nothing has changed" in web.err


def test_a_revert_that_is_terminated_says_so(web, cut):
    """A12: SIGTERM is no keyboard."""
    cut(lambda: signal.raise_signal(signal.SIGTERM))
    assert web("revert", "web", "--to", "before-upgrade", "--yes") == 128 + signal.SIGTERM
    assert "terminated; the revert is given up" in web.err


def test_points_that_a_revert_needs_are_never_forgotten(web):
    put_intent(web.home)
    found = web.json("forget", "web", "--keep-last", "1")
    kept = {one["point"]: one["reasons"] for one in found if one["type"] == "forget" and one["keep"]}
    assert "0001abcd00000001" in kept


def test_status_tells_of_a_revert_that_has_not_ended(web):
    put_intent(web.home)
    found = web.json("status")
    assert found[1]["revert"] == "0001abcd00000001"
    assert web.code == 1


def test_resume_without_anything_to_resume(web):
    """A12"""
    web.fails(53, "resume", "web")
    web.fails(53, "resume")


def test_undo_without_anything_to_undo(web):
    """A12"""
    web.fails(52, "undo", "web", "--yes")


def test_a_revert_is_not_done_without_consent(web, cut):
    """A12: a point that is not there is told first, and the plan is shown that would be agreed to."""
    cut()
    web.fails(41, "revert", "web", "--to", "no-such-point")
    assert web("revert", "web", "--to", "before-upgrade") == 56
    assert "--yes" in web.err and "5 MiB" in web.out and "was not confirmed" in web.err


@pytest.mark.parametrize("words", [("revert", "web", "--to", "before-upgrade"), ("forget", "web", "latest")])
def test_who_says_no_is_not_told_how_to_say_yes(web, cut, monkeypatch, words):
    cut()
    put_intent(web.home, "DONE")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: False)
    assert web(*words) == 56
    assert "was not confirmed" in web.err and "HINT" not in web.err


def test_a_revert_that_moved_less_than_differed_says_why(web, cut, monkeypatch):
    from appliance.restore.revert import Result

    cut()
    made = Result("web", UUID, "revert", NEWEST, None, None, "plain", "done", 3 << 20, 0, 0.1, 1.0)
    monkeypatch.setattr("appliance.service.recovery.revert", lambda *_args, **_options: made)
    assert web("revert", "web", "--to", "latest", "--yes") == 0
    assert "3 MiB differed, 0 B moved (zeroes and what the guest overwrote move nothing), guest paused" in web.out


def test_progress_has_no_numbers_where_nothing_is_counted():
    """`image verify` builds and boots: "0 B, 0 B/s" looked like one that hangs."""
    from appliance.cli import records
    from appliance.cli.text import progress_line

    assert progress_line(records.Progress("booting 0001abcd", 0, 0, 0.0, None)) == "booting 0001abcd"
    assert progress_line(records.Progress("disk", 0, 1 << 20, 0.0, None)) == "disk: 0 B of 1 MiB, 0 B/s"
    assert progress_line(records.Progress("disk", 1 << 20, 0, 1024.0, None)) == "disk: 1 MiB, 1 KiB/s"


def test_one_is_not_many(web):
    assert web("diff", "web", "0001abcd00000001", "latest") == 0
    assert web.out.rstrip().endswith("in 1 extent")
    assert web("status") == 1
    assert ": 4 points, encrypted" in web.out


def test_an_undo_tells_what_it_would_do(web, cut, monkeypatch):
    """P5-22, A12"""
    monkeypatch.setenv("REWIND_HOME", str(web.home))
    cut()
    put_intent(web.home, "DONE")
    assert web("undo", "web", "--dry-run") == 0
    assert web.newest in web.out and "5 MiB in 1 extent differ from the newest point" in web.out
    assert web.json("undo", "web", "--dry-run")[0]["point"] == web.newest
    assert web("undo", "web") == 56
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: asked.append(question))
    assert web("undo", "web") == 56
    assert web.newest in asked[0] and "2026-03-01" in asked[0] and "5 MiB" in asked[0]


def test_a_plan_counts_against_what_it_says(web, monkeypatch):
    """Promise 2: when the newest point was forgotten nobody knows what differs, so no number is passed off as that."""
    monkeypatch.setattr(Session, "domain", lambda *_: Off())
    assert web("revert", "web", "--to", "0002abcd00000002", "--dry-run") == 0
    assert "128 KiB in 1 extent differ from the newest point" in web.out
    assert web("forget", "web", NEWEST) == 0
    assert web("revert", "web", "--to", "latest", "--dry-run") == 0
    assert "differ from the newest point" not in web.out
    assert "at most 384 KiB in 1 extent are moved" in web.out
    assert "continues from was forgotten: the protected disks are read whole first" in web.out
    assert web.json("revert", "web", "--to", "latest", "--dry-run")[0]["compared"] is False
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question, err: asked.append(question))
    assert web("revert", "web", "--to", "latest") == 56
    assert "what differs (at most 384 KiB is moved) is rewritten" in asked[0]


def test_a_plan_tells_what_becomes_of_the_guest_that_runs(web, monkeypatch):
    """P5-22: what was not written is in no point, so no undo has it; one that is shut off loses nothing."""
    for power, said in ((DomainState.RUNNING, True), (DomainState.PAUSED, True), (DomainState.SHUTOFF, False)):
        domain = Off()
        monkeypatch.setattr(domain, "state", lambda power=power: power, raising=False)
        monkeypatch.setattr(Session, "domain", lambda *_, domain=domain: domain)
        words = "the guest is reset: what it has in memory alone is gone"
        assert web("revert", "web", "--to", "0002abcd00000002", "--dry-run") == 0
        assert (words in web.out) is said
        notes = web.json("revert", "web", "--to", "0002abcd00000002", "--dry-run")[0]["notes"]
        assert any(one.startswith(words) for one in notes) is said
        asked = []
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("click.confirm", lambda question, err, asked=asked: asked.append(question))
        assert web("revert", "web", "--to", "0002abcd00000002") == 56
        assert ("and the guest is reset" in asked[0]) is said


def test_a_label_that_is_used_already_is_told_when_the_point_is_taken(web):
    """Which point has it; the point is not refused (here it fails later, as there is no hypervisor)."""
    assert web("point", "web", "--label", "before-upgrade") != 0
    assert "the label 'before-upgrade' has point 0001abcd00000001" in web.err
    assert web("point", "web", "--label", "another") != 0
    assert "has point" not in web.err


@pytest.mark.parametrize("label", ["", " ", "a\nb", "a\tb", "\x1b[31m"])
def test_what_cannot_be_a_label_is_refused(web, label):
    message, hint = web.fails(3, "point", "web", "--label", label)
    assert repr(label) in message and hint


def test_a_name_and_a_folder_that_cannot_be_are_refused_before_anything_is_written(web, tmp_path):
    for name in ("a/b", "a\nb", ""):
        message, hint = web.fails(
            3, "--connect", DEAD, "restore", "web", "--at", "latest", "--into", tmp_path / "new", "--name", name
        )
        assert repr(name) in message and "--name" in hint
    assert not (tmp_path / "new").exists()
    message, hint = web.fails(3, "restore", "web", "--at", "latest", "--into", "/proc/nix")
    assert message == "folder '/proc/nix' cannot be made: no such file or directory" and "--into" in hint


def test_a_program_reads_the_warnings_that_a_person_is_told(web, monkeypatch):
    """Each once: of a label that is used already, of a hook that libvirt has not noticed, of a label that loses."""
    from types import SimpleNamespace

    from appliance.capture import epoch
    from appliance.restore import fence

    monkeypatch.setattr(Session, "hypervisor", lambda *_: SimpleNamespace(domain=lambda _: Off()))
    monkeypatch.setattr(Session, "claim", lambda *_args, **_options: nullcontext())
    with Session(Home(web.home)) as session:
        taken = epoch.Taken(replace(session.repository.points()[-1], notes=("healed",)), None)
    monkeypatch.setattr(epoch, "take", lambda *_args, **_options: taken)
    healed, warning = web.json("point", "web", "--label", "before-upgrade")[0]["notes"]
    assert healed == "healed" and warning.startswith("the label 'before-upgrade' has point 0001abcd00000001")
    assert web("point", "web", "--label", "before-upgrade") == 0
    assert (web.out.count("has point"), web.err.count("has point")) == (0, 1)
    monkeypatch.setattr(fence, "install", lambda *_: SimpleNamespace(remedy="libvirt has not noticed its first hook"))
    monkeypatch.setattr(Off, "uri", "qemu:///system")
    found = web.json("protect", "web")[0]
    assert found["warnings"] == ["before a revert: libvirt has not noticed its first hook"]
    assert web("protect", "web") == 0
    assert (web.out.count("noticed"), web.err.count("noticed")) == (0, 1)


@pytest.mark.parametrize(
    ("continuous", "captured", "label", "told"),
    [
        (True, False, "2026", True),
        (True, False, "2026?", True),
        (True, True, "y2026", False),
        (False, True, "2026", True),
        (False, False, "2026", False),
    ],
)
def test_a_label_that_is_a_number_is_told(web, continuous, captured, label, told):
    """A revert to it would go to a write of that number once its point is gone: whatever is captured now, the ledger
    has the writes of before."""
    if captured:
        put_capture(web.home)
    with Session(Home(web.home)) as session:
        record = session.record("web")
        protection.save(session.home, replace(record, continuous=continuous))
    assert web("point", "web", "--label", label) != 0
    assert (f"once its point is forgotten `--to {label}` means that" in web.err) is told


@pytest.mark.parametrize("label", ["latest", "10m ago", "#5", "14:02", "2026-03-01", NEWEST[:4] + "0" * 16])
def test_a_label_that_names_an_instant_is_refused(web, label):
    """Promise 1: `revert --to latest` must never go to a point that somebody has called so."""
    message, hint = web.fails(3, "point", "web", "--label", label)
    assert f"{label!r} cannot be a label" in message and f"`--label 'at {label}'`" in hint


def test_a_label_of_before_does_not_win_over_what_it_says(web, cut):
    """Promise 1: and whoever types it is told which point has it."""
    with Session(Home(web.home)) as session:
        point = session.repository.points()[1]
        session.repository.commit(replace(point, id="0000abcd0000ffff", label="latest"))
    cut()
    assert web("revert", "web", "--to", "latest", "--dry-run") == 0
    assert f"web to {NEWEST}" in web.out
    assert "the point with that label is 0000abcd0000ffff" in web.err
    assert "0000abcd0000ffff" in web.json("revert", "web", "--to", "latest", "--dry-run")[0]["notes"][0]
