"""status, doctor, and how it is told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.capture import protection
from appliance.cli import main
from appliance.config import Home, write_json
from appliance.hypervisor.base import DomainState
from appliance.model import MapRef
from appliance.process import process_key
from appliance.restore import outliving, streams
from tests.support.clihome import (
    DEAD,
    NEWEST,
    ROOT,
    UUID,
)


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
