"""init and key, from words to exit codes."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from tests.support.clihome import (
    DEAD,
    Rewind,
)


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
