"""The command line from words to exit codes, on a repository with points and no hypervisor at all.

A12: bad input of every verb gives one sentence, a hint and its exit code.

Long on purpose: all of it works on copies of one home with points, which is made once for the file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pytest

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.cli import main
from appliance.cli.output import Output
from appliance.config import Home, write_json
from appliance.hypervisor.base import Disk, DomainState
from appliance.model import Consistency, DiskPoint, MapRef, Point, PointStats, Timeline
from appliance.process import process_key
from appliance.restore import outliving, streams
from appliance.service import Session
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK
from tests.support.journal import Scribe

ROOT = Path(__file__).resolve().parents[2]
UUID = "11111111-2222-3333-4444-555555555555"
SIZE = 16 * CHUNK + 4096
START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
# Nobody ever answers here.
NEWEST = "0003abcd00000003"
DEAD = f"qmp:///nonexistent/rewind/monitor.sock?name=web&uuid={UUID}"


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("REWIND_HOME", raising=False)
    monkeypatch.delenv("REWIND_CONNECT", raising=False)
    monkeypatch.delenv("REWIND_PASSPHRASE", raising=False)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115  closed with the process


class Rewind:
    """The program, in this process."""

    def __init__(self, home, capsys):
        self.home, self._capsys = home, capsys

    def __call__(self, *words, home=True):
        with patch.dict(os.environ, {"REWIND_HOME": str(self.home)} if home else {}):
            self.code = main([*map(str, words)])
        self.out, self.err = self._capsys.readouterr()
        return self.code

    def json(self, *words):
        self("--json", *words)
        return [json.loads(line) for line in self.out.splitlines()]

    def fails(self, code, *words):
        """One sentence, perhaps a hint, the code; in both forms. Returns the sentence and the hint."""
        assert self(*words) == code, (self.out, self.err)
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("rewind: ")]
        assert len(errors) == 1, self.err
        sentence = errors[0].removeprefix("rewind: ")
        assert (
            sentence
            and not sentence.endswith(".")
            and (sentence[0] == sentence[0].lower() or sentence.startswith("QEMU"))
        )
        found = self.json(*words)
        assert self.code == code
        last = found[-1]
        assert (last["type"], last["exit_code"]) == ("error", code)
        return last["message"], last["hint"]


@pytest.fixture
def rewind(capsys):
    # Short, because sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        yield Rewind(Path(folder) / "home", capsys)


@pytest.fixture(scope="module")
def templates():
    """Homes made once: `made` with an empty repository, `web` with points. Tests work on copies."""
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        for name in ("made", "web"):
            assert main(["--home", f"{folder}/{name}", "--quiet", "init"]) == 0
        put_points(Path(folder) / "web")
        yield Path(folder)


def copied(template, home):
    """A home somewhere else: what names its old place is changed."""
    shutil.copytree(template, home)
    instance = home / "instance.json"
    instance.write_text(instance.read_text().replace(str(template), str(home)))


@pytest.fixture
def made(rewind, templates):
    """A home with a repository."""
    copied(templates / "made", rewind.home)
    return rewind


def put_points(home, count=4):
    """A protected domain `web` with points one minute apart, each with two chunks more than the one before."""
    with Session(Home(home)) as session:
        repository = session.repository
        repository.put_timeline(Timeline("aaaa000011112222", UUID, START))
        parent, base = None, None
        for number in range(count):
            with repository.writer() as writer:
                ids = [(2 * number + i, writer.put(bytes([number + 1, i]) * (CHUNK // 2))) for i in range(2)]
                ref = repository.write_map(base, SIZE, ids, writer)
                writer.flush()
            disk = DiskPoint("vda", SIZE, ref, changed_bytes=2 * CHUNK, changed=tuple(i for i, _ in ids))
            point = Point(
                id=f"{number:04x}abcd{number:08x}", domain="web", domain_uuid=UUID, uri=DEAD, parent=parent,
                time=START + timedelta(minutes=number), timeline="aaaa000011112222", disks=(disk,),
                label="before-upgrade" if number == 1 else "", consistency=Consistency.FILESYSTEM,
                stats=PointStats(moved_bytes=2 * CHUNK, stored_bytes=500, pause_seconds=0.012, seconds=0.3),
            )  # fmt: skip
            repository.commit(point)
            parent, base = point.id, ref
        record = Protection("web", UUID, DEAD, ("vda",), "0a0b0c0d", "aaaa000011112222", every=60, last_point=parent)
        protection.save(Home(home), record)
        assert parent == NEWEST


@pytest.fixture
def web(rewind, templates):
    """The home with a domain that has four points; its hypervisor does not answer."""
    copied(templates / "web", rewind.home)
    rewind.newest = NEWEST
    return rewind


# --- init and key ---------------------------------------------------------------------------------------------------


def test_init_makes_a_home_a_key_and_a_repository(rewind):
    found = rewind.json("init")
    assert found[0]["type"] == "initialised"
    assert (found[0]["encrypted"], found[0]["created"]) == (True, True)
    assert stat.S_IMODE((rewind.home / "key").stat().st_mode) == 0o600
    assert Path(found[0]["repository"]).is_dir()


def test_a_home_with_too_long_a_path_is_refused(rewind):
    """A socket's path has 107 bytes at most, which would be found out by the first point only."""
    rewind.home = rewind.home / ("x" * 60)
    message, hint = rewind.fails(3, "init")
    assert "longer than" in message and "107" in hint


def test_init_twice_is_refused(made):
    message, hint = made.fails(35, "init")
    assert "already" in message
    assert "--home" in hint


def test_a_second_home_joins_the_repository_with_its_key(made, tmp_path, capsys):
    other = Rewind(made.home.parent / "other", capsys)
    url = made.home / "repository"
    message, hint = other.fails(33, "init", "--repository", url)
    assert "key" in message
    assert f"rewind init --repository {url} --key-file" in hint
    found = other.json("init", "--repository", url, "--key-file", made.home / "key")
    assert found[0]["created"] is False
    assert other("points", "web") == 22


def test_a_repository_path_does_not_depend_on_where_one_stands(rewind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = rewind.json("init", "--repository", "here")
    assert found[0]["repository"] == str(tmp_path / "here")


def test_without_encryption_there_is_no_key(rewind):
    found = rewind.json("init", "--no-encryption")
    assert (found[0]["encrypted"], found[0]["key_file"]) == (False, None)
    assert not (rewind.home / "key").exists()
    rewind.fails(3, "key", "show")


def test_a_passphrase_locks_the_key(rewind, monkeypatch):
    """P0-04: encryption; here with a passphrase that a program gives."""
    rewind.fails(3, "init", "--passphrase")
    monkeypatch.setenv("REWIND_PASSPHRASE", "correct horse")
    assert rewind("init", "--passphrase") == 0, rewind.err
    assert rewind("status") == 0
    monkeypatch.setenv("REWIND_PASSPHRASE", "wrong")
    message, _hint = rewind.fails(33, "status")
    assert "passphrase" in message
    monkeypatch.delenv("REWIND_PASSPHRASE")
    _message, hint = rewind.fails(33, "status")
    assert "REWIND_PASSPHRASE" in hint


def test_a_passphrase_can_be_changed_and_removed(web, monkeypatch):
    before = web.json("key", "show")[0]
    monkeypatch.setenv("REWIND_PASSPHRASE", "one")
    assert web.json("key", "passphrase")[0]["passphrase"] is True
    assert web.json("points", "web")[-1]["points"] == 4
    assert web("key", "passphrase", "--remove") == 0
    monkeypatch.delenv("REWIND_PASSPHRASE")
    assert web.json("key", "show")[0] | {"action": "show"} == before
    assert web("points", "web") == 0


def test_a_key_is_exported_once_and_never_over_a_file(made, tmp_path):
    target = tmp_path / "copy"
    assert made("key", "export", target) == 0
    assert target.read_text() == (made.home / "key").read_text()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    message, hint = made.fails(55, "key", "export", target)
    assert str(target) in message and hint


def test_a_key_can_be_printed(made):
    assert made("key", "export", "-") == 0
    assert json.loads(made.out)["secret"]


def test_a_lost_key_is_told(web):
    (web.home / "key").unlink()
    message, hint = web.fails(33, "points", "web")
    assert str(web.home / "key") in message
    assert f"copy of the key as {web.home / 'key'}" in hint


def test_a_foreign_key_is_told(web, tmp_path, capsys):
    other = Rewind(web.home.parent / "other", capsys)
    assert other("init") == 0
    (web.home / "key").write_text((other.home / "key").read_text())
    message, hint = web.fails(33, "points", "web")
    assert "not this repository's" in message
    assert str(web.home / "key") in message and str(web.home / "key") in hint
    assert web.json("key", "show")[0]["id"] in message, "so that copies can be told apart"
    found = [one for one in web.json("--connect", DEAD, "doctor") if "key" in one.get("finding", "")]
    assert [one["name"] for one in found if one["status"] == "fail"] == ["key"]
    assert [one["name"] for one in found if one["status"] == "ok" and one["name"] in ("key", "repository")] == []


# --- A12: bad input -------------------------------------------------------------------------------------------------

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


def put_intent(home, phase="SWITCHED"):
    from appliance.restore import intent

    made = intent.Intent(
        id="i", domain="web", uuid=UUID, uri=DEAD, verb="revert", point="0001abcd00000001",
        safety_point="0003abcd00000003", timeline="t2", instant=True, was="running",
        rate=0, started=time.time(), repository="", phase=intent.Phase[phase],
    )  # fmt: skip
    intent.save(Home(home), made)


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


class Cut:
    """A reverter that is interrupted, after it did `first`."""

    def __init__(self, first):
        self.domain = type("Domain", (), {"uuid": UUID, "name": "web", "uri": DEAD})()
        self._first = first

    def plan(self, point, *_args, **_options):
        from appliance.restore.plan import Plan

        values = {"domain": "web", "uuid": UUID, "point": point.id, "time": point.time, "mode": "plain",
                  "disks": (), "changed_bytes": 5 << 20, "chunks": 80, "extents": 1, "expected_seconds": None,
                  "files": (), "notes": ()}  # fmt: skip
        return Plan(**values)

    def revert(self, *_args, **_options):
        self._first()
        raise KeyboardInterrupt

    undo = revert

    def plan_undo(self, **_options):
        with Session(Home(Path(os.environ["REWIND_HOME"]))) as session:
            return self.plan(session.repository.point(NEWEST))


@pytest.fixture
def cut(monkeypatch):
    """Revert and undo reach no hypervisor; they do what is given and are interrupted."""
    def set_up(first=lambda: None):
        monkeypatch.setattr("appliance.service.recovery._reverter", lambda *_args, **_options: Cut(first))
        monkeypatch.setattr(Session, "claim", lambda *_args, **_options: nullcontext())

    return set_up


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


class Off:
    """A domain that is shut off, with the one disk of the points."""

    name, uuid, uri = "web", UUID, DEAD

    def state(self):
        return DomainState.SHUTOFF

    def disks(self):
        return [Disk("vda", "/images/web.qcow2", "qcow2", SIZE)]

    def managed_save(self):
        return False


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


# --- history --------------------------------------------------------------------------------------------------------


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


TAPPED = "ab" * 16


def put_capture(home, continuous=True):
    """Every write of `web` from its second point on, with a gap of a minute, a revert and a fallback; and a journal."""
    ledger = Ledger(Home(home).ledger(UUID))

    def at(seconds):
        return START + timedelta(seconds=seconds)

    ledger.began(TAPPED, 0, at(58))
    ledger.based(TAPPED, 5, at(60), "0001abcd00000001")
    ledger.confirmed(TAPPED, 90, at(90))
    ledger.ended(TAPPED, None, None, "the journal did not answer for 250 ms")
    ledger.began(TAPPED, 120, at(148))
    ledger.based(TAPPED, 121, at(150), "0002abcd00000002")
    ledger.branch(TAPPED, 200, at(200), "0001abcd00000001", "bbbb000011112222")
    ledger.event("latency", at(210), "12 ms added, 5 ms are allowed")
    ledger.confirmed(TAPPED, 300, at(240))
    record = protection.load(Home(home), UUID)
    protection.save(Home(home), replace(record, every=None, continuous=continuous))
    spool = Home(home).spool(UUID)
    spool.mkdir()
    scribe = Scribe(spool, {"vda": SIZE}, bytes.fromhex(TAPPED), wall=int(at(58).timestamp()) * 10**9)
    for step, count in ((700, 199), (1000, 0), (100, 90)):
        scribe.step = step * 10**6
        for _ in range(count):
            scribe.zero("vda", 0, 4096)
        if not count:
            for number in range(10):
                scribe.write("vda", number * 4096, b"x" * 4096)
            scribe.mark("before the migration")
    scribe.seal()


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


# --- upkeep ---------------------------------------------------------------------------------------------------------


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


# --- status, doctor, output -----------------------------------------------------------------------------------------


def test_status_does_not_load_what_makes_images(web):
    """A8: it took longer than all the rest, of which there mostly is nothing to tell."""
    command = [sys.executable, "-X", "importtime", "-m", "appliance.cli", "--home", str(web.home), "--json", "status"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert '"type": "status"' in done.stdout
    assert "appliance.service.status" in done.stderr
    assert "appliance.service.image" not in done.stderr


def test_status_works_while_the_hypervisor_is_down(web):
    found = web.json("status")
    assert found[0]["points"] == 4
    assert (found[1]["domain"], found[1]["last_point"], found[1]["late"]) == ("web", web.newest, True)
    assert found[1]["state"] in ("unknown", "shutoff")
    assert web.code == 1


def test_status_tells_of_a_repository_that_is_nearly_full(web, monkeypatch):
    protection.save(Home(web.home), replace(protection.load(Home(web.home), UUID), every=None))
    monkeypatch.setattr("appliance.service.status._state", lambda *_: ("shutoff", (), ()))
    for free, code in ((1 << 40, 0), (1 << 20, 1), (None, 0)):
        monkeypatch.setattr("appliance.service.status.free_bytes", lambda _url, free=free: free)
        assert web("status", "web") == code
        assert ("has only 1.00 MiB left" in web.out or "has only 1 MiB left" in web.out) is (code == 1), web.out
    assert web.json("status")[0]["free_bytes"] is None


def test_status_of_a_domain_that_is_gone_deserves_a_look(web, monkeypatch):
    protection.save(Home(web.home), replace(protection.load(Home(web.home), UUID), every=None))
    state = DomainState.SHUTOFF
    monkeypatch.setattr("appliance.service.status._state", lambda *_: (state.value, (), ()))
    web("status", "web")
    assert web.code == 0, "nothing else deserves one"
    monkeypatch.setattr("appliance.service.status._state", lambda *_: ("gone", (), ()))
    assert web("status", "web") == 1


def test_status_warns_of_a_silent_hypervisor_and_of_a_missing_daemon(web):
    """A12: exit code 1 is done with warnings."""
    from appliance.service import locks

    home = Home(web.home)
    record = protection.load(home, UUID)
    protection.save(home, replace(record, every=10**9))
    assert web("status") == 1
    assert "no `rewind daemon` runs" in web.out and "of web by the clock" in web.out
    assert web.json("status")[0]["daemon"] is False
    protection.save(home, replace(record, every=None, uri="qemu+unix:///system?socket=/nonexistent/socket"))
    assert web("status") == 1
    assert "cannot connect to" in web.out and "daemon" not in web.out
    with locks.daemon_lock(home).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert web.json("status")[0]["daemon"] is True


def streams_to_a_machine(web, **state):
    """A session that is 64 MiB large, with a process that lives."""
    exports = {"vda": MapRef(b"x" * 16, 64 << 20, 3)}
    order = streams.Order(
        "rack", "rewind-1", UUID, NEWEST, "rack7", "{}", exports, "127.0.0.1", 10809, True, "stream", "/i"
    )  # fmt: skip
    home = Home(web.home)
    if streams.load(home, "rack") is None:
        streams.prepare(home, order, {})
        write_json(streams.folder(home, "rack") / "order.json", order.to_json())
    key = process_key(os.getpid())
    outliving.write_state(streams.folder(home, "rack"), {"key": key, "total": 64 << 20, **state})


def test_status_shows_how_far_a_machine_is_that_boots_from_here(web):
    """P6-14: phase, how far, what is left, how fast, whether it would be answered now, and when it was last heard."""
    now = {"phase": "pulling", "done": 16 << 20, "rate": 2 << 20, "answers": True, "heard": time.time() - 100}
    streams_to_a_machine(web, **now)
    found = web.json("status")
    assert found[0]["images"] == 1
    (one,) = [line for line in found if line["type"] == "image-streamed"]
    assert (one["name"], one["phase"], one["rate"], one["answers"]) == ("rack", "pulling", 2 << 20, True)
    assert (one["done_bytes"], one["left_bytes"], one["left"]) == (16 << 20, 48 << 20, ["vda"])
    assert 100 <= one["silent_seconds"] < 130
    web("status")
    assert "filling vda: 16 MiB of 64 MiB, 48 MiB left at 2 MiB/s" in web.out
    assert "nothing was heard of its machine for" in web.out and "answered" not in web.out
    streams_to_a_machine(web, phase="booting", answers=False)
    (one,) = [line for line in web.json("status") if line["type"] == "image-streamed"]
    assert one["silent_seconds"] is None and not one["answers"]
    assert web("status", "web") in (0, 1) and "rack" not in web.out
    web("status")
    assert "no machine is answered now" in web.out


def test_status_shows_a_machine_that_nobody_serves_any_more(web):
    streams_to_a_machine(web, phase="pulling", done=16 << 20, rate=5, answers=True, key="1:0")
    assert web("status") == 1
    assert "`rewind image resume` goes on" in web.out
    (one,) = [line for line in web.json("status") if line["type"] == "image-streamed"]
    assert (one["phase"], one["rate"], one["answers"], one["left_bytes"]) == ("stopped", 0, False, 48 << 20)
    streams_to_a_machine(web, phase="done", key="1:0")
    assert web.json("status")[0]["images"] == 0


def test_doctor_never_fails_but_says_what_is_wrong(web):
    found = web.json("--connect", DEAD, "doctor")
    assert {one["type"] for one in found[:-1]} == {"doctor-check"}
    assert all(one["remedy"] for one in found[:-1] if one["status"] == "warn")
    by_name = {one["name"]: one for one in found[:-1]}
    assert "copy of the key" in by_name["key"]["finding"]
    assert [one["status"] for one in found[:-1] if "is on this host" in one["finding"]] == ["warn"]
    assert web.code in (1, 2)
    web("key", "export", web.home.parent / "copy")
    found = web.json("--connect", DEAD, "doctor")
    assert next(one for one in found if one.get("name") == "key")["status"] == "ok"


def test_doctor_without_a_home(rewind):
    found = rewind.json("--connect", DEAD, "doctor")
    assert rewind.code == 2
    assert found[0]["status"] == "fail" and "init" in found[0]["remedy"]
    assert len([one for one in found if "is not a home" in one.get("finding", "")]) == 1


def test_common_options_may_stand_after_the_verb(web, capsys):
    assert main(["points", "web", "--json", "--home", str(web.home)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["type"] == "point"


@pytest.mark.parametrize("before", [True, False])
def test_an_option_wins_over_the_environment_wherever_it_stands(web, monkeypatch, tmp_path, before):
    monkeypatch.setenv("REWIND_HOME", str(tmp_path / "elsewhere"))
    assert main(["status"]) == 3
    home = ["--home", str(web.home)]
    assert main([*home, "points", "web"] if before else ["points", "web", *home]) == 0
    monkeypatch.setenv("REWIND_HOME", str(web.home))
    assert main(["points", "web"]) == 0


def test_quiet_leaves_errors_only(web):
    assert web("--quiet", "points", "web") == 0
    assert web.out == ""
    assert web("--quiet", "points", "nobody") == 22
    assert web.err.startswith("rewind: ")


def test_a_bug_is_reported_as_one(web, monkeypatch):
    from appliance.timeline.catalogue import Catalogue

    def broken(*_, **__):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(Catalogue, "points", broken)
    message, hint = web.fails(2, "points", "web")
    assert "ZeroDivisionError: surprise" in message and "bug" in message
    where = hint.split()[-1]
    assert where.startswith(str(web.home / "log"))
    assert "ZeroDivisionError" in Path(where).read_text()


def test_a_reader_that_leaves_is_no_error(web):
    command = f"{sys.executable} -m appliance.cli --home {web.home} --json points web | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_exit_codes_are_listed(rewind):
    found = rewind.json("help", "exit-codes")
    assert {one["code"] for one in found} >= {0, 1, 2, 3, 11, 22, 33, 41, 51, 130, 143}


# --- export and restore ---------------------------------------------------------------------------------------------


def exported(home, *words):
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance.cli", "--home", str(home), "--json", "export", "web", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return process, json.loads(line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_a_point_is_served_until_it_is_interrupted(web, number, code):
    """P0-06, A10: what nbdinfo reads is what was stored."""
    process, line = exported(web.home, "--at", "before-upgrade")
    try:
        assert (line["disk"], line["size_bytes"], line["writable"]) == ("vda", SIZE, False)
        information = json.loads(subprocess.check_output(["nbdinfo", "--json", line["uri"]], text=True))
        assert information["exports"][0]["export-size"] == SIZE
        mapped = subprocess.check_output(["nbdinfo", "--map", "--totals", line["uri"]], text=True)
        assert mapped.split()[0] == str(4 * CHUNK), mapped
    finally:
        process.send_signal(number)
    assert process.wait(10) == code, process.stderr.read()
    assert not list((web.home / "run").iterdir())


def test_a_locked_key_reaches_every_server_of_an_export(web, monkeypatch):
    """The key goes to our children through a descriptor, never through a file or an argument."""
    monkeypatch.setenv("REWIND_PASSPHRASE", "one")
    assert web("key", "passphrase") == 0
    process, line = exported(web.home, "--at", "latest", "--writable")
    try:
        assert subprocess.run(["nbdinfo", "--size", line["uri"]], capture_output=True, text=True).stdout.strip() == str(
            SIZE
        )
        for path in web.home.rglob("*"):
            if path.is_file() and path.stat().st_size < 1 << 20:
                assert b'"secret"' not in path.read_bytes(), path
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_an_export_cannot_be_on_a_socket_that_exists(web, tmp_path):
    (tmp_path / "s").touch()
    web.fails(55, "export", "web", "--at", "latest", "--socket", tmp_path / "s")


def test_an_export_cannot_be_on_a_socket_in_a_folder_that_is_not_there(web, tmp_path):
    """A12"""
    message, _hint = web.fails(3, "export", "web", "--at", "latest", "--socket", tmp_path / "none" / "s")
    assert "there is no folder" in message


def test_restore_writes_whole_new_disks(web, tmp_path):
    """P0-06: out of place, with nothing of the old domain needed."""
    found = web.json("restore", "web", "--at", "latest", "--into", tmp_path / "new", "--format", "raw")
    assert web.code == 0, found
    data = Path(found[-1]["files"][0]).read_bytes()
    assert data[: 2 * CHUNK] == bytes([1, 0]) * (CHUNK // 2) + bytes([1, 1]) * (CHUNK // 2)
    assert not any(data[8 * CHUNK :])
    assert (found[-1]["defined"], len(data)) == (False, -(-SIZE // 512) * 512)
    message, _hint = web.fails(55, "restore", "web", "--at", "latest", "--into", tmp_path / "new", "--format", "raw")
    assert "web-vda.raw" in message


@pytest.mark.parametrize("below", ["", "new"])
def test_a_restore_into_a_file_is_refused(web, tmp_path, below):
    """A12: it is a folder that is wanted."""
    (tmp_path / "file").touch()
    message, _hint = web.fails(3, "restore", "web", "--at", "latest", "--into", tmp_path / "file" / below)
    assert str(tmp_path / "file") in message


def test_a_restore_that_cannot_define_a_domain_writes_nothing(web, tmp_path):
    """The point says nothing that libvirt could read, so --name is refused before a disk is written."""
    web.fails(15, "restore", "web", "--at", "latest", "--into", tmp_path / "new", "--name", "web2")
    assert not (tmp_path / "new").exists()


def test_a_restore_that_fails_leaves_no_file(web, tmp_path, monkeypatch):
    from appliance.errors import NoSpace
    from appliance.restore import image

    def full(*_, **__):
        raise NoSpace(url="here", name="disk")

    monkeypatch.setattr(image, "write_image", full)
    web.fails(37, "restore", "web", "--at", "latest", "--into", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
