"""Homes for tests of the command line: one with a repository, and one with points of a domain of which no hypervisor
knows."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.cli import main
from appliance.config import Home
from appliance.hypervisor.base import Disk, DomainState
from appliance.model import Consistency, DiskPoint, Point, PointStats, Timeline
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
TAPPED = "ab" * 16


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


def copied(template, home):
    """A home somewhere else: what names its old place is changed."""
    shutil.copytree(template, home)
    instance = home / "instance.json"
    instance.write_text(instance.read_text().replace(str(template), str(home)))


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


def put_intent(home, phase="SWITCHED"):
    from appliance.restore import intent

    made = intent.Intent(
        id="i", domain="web", uuid=UUID, uri=DEAD, verb="revert", point="0001abcd00000001",
        safety_point="0003abcd00000003", timeline="t2", instant=True, was="running",
        rate=0, started=time.time(), repository="", phase=intent.Phase[phase],
    )  # fmt: skip
    intent.save(Home(home), made)


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


class Off:
    """A domain that is shut off, with the one disk of the points."""

    name, uuid, uri = "web", UUID, DEAD

    def state(self):
        return DomainState.SHUTOFF

    def disks(self):
        return [Disk("vda", "/images/web.qcow2", "qcow2", SIZE)]

    def managed_save(self):
        return False


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
