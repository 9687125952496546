"""Folders for what is being made: of whom, for how long, and what becomes of those of processes that were killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.config import Home
from appliance.scratch import scratch_folder
from appliance.service.image import templates

ROOT = Path(__file__).resolve().parents[2]


def another(parent, then):
    """A process that has a folder there when this returns."""
    code = f"""
import pathlib
from appliance.scratch import scratch_folder
with scratch_folder(pathlib.Path({str(parent)!r}), ".made-") as folder:
    (folder / "half").write_text("of it")
    print(folder, flush=True)
    {then}
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )  # fmt: skip
    return child, parent / child.stdout.readline().strip()


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_has_stays(tmp_path):
    living, its = another(tmp_path, "input()")
    killed, left = another(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=10)
    others = tmp_path / ".other-x"
    others.mkdir()
    assert left.exists()
    with scratch_folder(tmp_path, ".made-") as ours:
        assert not left.exists() and (its / "half").exists() and others.exists()
        with scratch_folder(tmp_path, ".made-") as second:
            assert ours.exists() and second != ours
    living.communicate("\n", timeout=10)
    assert sorted(tmp_path.iterdir()) == [others]


def test_one_that_was_renamed_stays(tmp_path):
    with scratch_folder(tmp_path / "new", ".made-") as folder:
        folder.rename(tmp_path / "new/whole")
    assert [one.name for one in (tmp_path / "new").iterdir()] == ["whole"]


def test_folder_may_be_a_link_and_what_lies_behind_others_stays(tmp_path):
    """A cache on a larger disk. Nobody of ours makes a link in there."""
    (tmp_path / "large/theirs").mkdir(parents=True)
    (tmp_path / "cache").symlink_to("large")
    (tmp_path / "large/.made-link").symlink_to("theirs")
    with scratch_folder(tmp_path / "cache", ".made-") as folder:
        assert folder.is_dir()
    assert (tmp_path / "large/theirs").is_dir() and (tmp_path / "large/.made-link").is_symlink()


def test_what_a_template_that_was_killed_has_left_goes(tmp_path, monkeypatch):
    """150 MB of packages and a kernel, each time."""
    left = tmp_path / "cache/templates/.make-killed/.template-x"
    left.mkdir(parents=True)

    def refused(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(templates.build, "build_template", refused)
    with pytest.raises(ZeroDivisionError):
        templates.make(SimpleNamespace(home=Home(tmp_path)))
    assert not list((tmp_path / "cache/templates").iterdir())
