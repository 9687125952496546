"""The homes that tests of the command line work on: copies of some that are made once for a file."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from appliance.cli import main
from appliance.service import Session
from tests.support.clihome import NEWEST, Cut, Rewind, copied, put_points


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("REWIND_HOME", raising=False)
    monkeypatch.delenv("REWIND_CONNECT", raising=False)
    monkeypatch.delenv("REWIND_PASSPHRASE", raising=False)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115  closed with the process


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


@pytest.fixture
def made(rewind, templates):
    """A home with a repository."""
    copied(templates / "made", rewind.home)
    return rewind


@pytest.fixture
def web(rewind, templates):
    """The home with a domain that has four points; its hypervisor does not answer."""
    copied(templates / "web", rewind.home)
    rewind.newest = NEWEST
    return rewind


@pytest.fixture
def cut(monkeypatch):
    """Revert and undo reach no hypervisor; they do what is given and are interrupted."""

    def set_up(first=lambda: None):
        monkeypatch.setattr("appliance.service.recovery._reverter", lambda *_args, **_options: Cut(first))
        monkeypatch.setattr(Session, "claim", lambda *_args, **_options: nullcontext())

    return set_up
