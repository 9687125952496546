"""kill -9 of a process that ships, fetches and retires, at every system call that changes a disk."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from appliance.capture import ship
from appliance.journal import Journal
from appliance.store import Key, Repository, open_backend, parted
from appliance.store.check import check
from tests.support.deathcalls import die_at
from tests.support.journal import Scribe
from tests.support.store import DOMAIN

KEY = Key(bytes(range(32)))
JOURNAL = bytes(range(16)).hex()
CALLS = ("fsync", "link", "mkdir", "unlink", "write", "open", "rename")


def open_repo(folder: Path) -> Repository:
    return Repository.open(open_backend(str(folder / "r")), cache=folder / "cache", key=KEY)


def work(folder: Path, spool: Path) -> None:
    with open_repo(folder) as repo:
        ship.Shipper(repo, DOMAIN, spool).once()
        ship.fetch(repo, DOMAIN, JOURNAL, folder / "back", 0, 5)
        ship.retire(repo, DOMAIN, JOURNAL, 3)


def killed(folder: Path, spool: Path, number: int) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            die_at(number, CALLS)
            work(folder, spool)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """Two segments, of three parts and of one."""
    monkeypatch.setattr(parted, "PART", parted.FRAME)
    (tmp_path / "spool").mkdir()
    scribe, dice = Scribe(tmp_path / "spool", {"vda": 64 << 20}), random.Random(8)
    for turn in range(3):
        scribe.write("vda", turn << 20, dice.randbytes(900_000))
    scribe.seal()
    scribe.write("vda", 5, b"more")
    scribe.write("vda", 6, b"and more")
    scribe.seal()
    return scribe.folder


@pytest.mark.timeout(180)
def test_killed_at_every_call(tmp_path, spool):
    """P5-31: what is listed and what is in the folder is whole at any instant; the spool is never touched; and the next
    process ends the work."""
    contents = {path.name: path.read_bytes() for path in spool.iterdir()}
    number = 1
    while True:
        number += 1
        folder = tmp_path / str(number)
        Repository.create(open_backend(str(folder / "r")), cache=folder / "cache", key=KEY).close()
        died = killed(folder, spool, number)
        assert {path.name: path.read_bytes() for path in spool.iterdir()} == contents
        with open_repo(folder) as repo:
            report = check(repo, read_data=True)
            assert report.ok, report
            for ref in repo.segments():
                assert repo.read_segment(ref) == contents[f"{ref.first:020}-{ref.last:020}.rwj"]
        back = folder / "back"
        for part in Journal(back).parts if back.exists() else ():
            assert part.path.read_bytes() == contents[part.path.name]
        work(folder, spool)
        with open_repo(folder) as repo:
            assert [(ref.first, ref.last) for ref in repo.segments(whole=False)] == [(4, 5)]
        assert {path.name: path.read_bytes() for path in back.iterdir()} == contents
        if not died:
            break
    assert number > 60
