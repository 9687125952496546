"""The server of a streamed image: its order, its process, what it tells of itself, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from appliance.config import Home, load_settings, write_json
from appliance.errors import AlreadyExists, Locked, RestoreError
from appliance.model import MapRef
from appliance.process import alone, process_key
from appliance.restore import claim, control, hydrations, serve, storagedaemon, streams
from appliance.restore.storagedaemon import Place, StorageDaemon
from appliance.service.image import starting, streaming
from appliance.store import RepositorySpec
from images.stream.tls import make_certificates

MIB = 1 << 20


@pytest.fixture
def order():
    exports = {"vda": MapRef(b"x" * 16, 64 * MIB, 3)}
    return streams.Order(
        "rack", "rewind-1", "8d0a4f0e-6f0c-4d8e-9d6e-000000000001", "p1", "rack7", "{}", exports, "127.0.0.1", 10809,
        True, "stream", "/srv/image",
    )  # fmt: skip


def test_order_survives_its_file(order):
    assert streams.Order.from_json(order.to_json()) == order


def test_secrets_of_a_session_are_the_owners_alone(order, tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    where = streams.prepare(home, order, make_certificates("rewind-1").server)
    assert where.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (where / "tls").iterdir()} == {0o600}
    # Without an order there is no session yet.
    assert streams.names(home) == [] and streams.load(home, "rack") is None
    streams.tidy(home, "rack")
    assert not where.exists()


@pytest.mark.parametrize(("phase", "key", "again"), [("pulling", "1:1", 1), ("done", "1:1", 1), ("pulling", "", 0)])
def test_resume_serves_what_nobody_serves(phase, key, again, order, tmp_path, monkeypatch):
    """P6-14: by the key as this home opens it now; the descriptor that had it is gone with whoever began. A machine
    whose disks are complete may not know it yet."""
    home, launched = Home(tmp_path / "home"), []
    home.create()
    where = streams.prepare(home, order, {})
    (where / "order.json").write_text(json.dumps(order.to_json()))
    (where / "state.json").write_text(json.dumps({"phase": phase, "key": key or process_key(os.getpid())}))
    monkeypatch.setattr(streams, "launch", lambda _home, wanted, _settings: launched.append(wanted))
    spec = RepositorySpec("/repo", tmp_path, None)
    streaming.resume(SimpleNamespace(home=home, spec=spec, settings_file=tmp_path), "rack")
    assert launched == [replace(order, repository=spec.to_json())] * again


def test_session_whose_process_is_gone_is_stopped(order, tmp_path):
    home = Home(tmp_path / "home")
    home.create()
    where = streams.prepare(home, order, {})
    assert streams.phase_of(home, "rack") == "stopped"
    (where / "state.json").write_text('{"phase": "pulling", "key": "1:1"}')
    assert streams.phase_of(home, "rack") == "stopped"
    (where / "state.json").write_text('{"phase": "done", "key": "1:1"}')
    assert streams.phase_of(home, "rack") == "done"


class Clock:
    """For `time` in the server's module."""

    def __init__(self):
        self.now = 1000.0
        self.time = time.time

    def monotonic(self):
        return self.now


class Pretended:
    """A view and a storage daemon that are there at once."""

    def __init__(self):
        self.key, self.slot, self.served, self.error = "1:1", 0, 0, ""
        self.ready = self.answers = True
        self.boots, self.stopped, self.tended = [], False, lambda: None

    def inherit(self, _slot, _served):
        pass

    def tend(self, wanted):
        self.boots.append(wanted)
        self.tended()

    def stop(self):
        self.stopped = True


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(serve, "time", found)
    return found


@pytest.fixture
def serving(order, tmp_path, clock):
    """A session that pretends to serve, in `home`."""
    home = Home(tmp_path / "home")
    home.create()
    where = streams.prepare(home, order, {})
    control.create(where / control.CONTROL, {})
    write_json(where / "order.json", order.to_json())
    found = serve.Serving(home, "rack", load_settings(home))
    found._view, found._daemon = Pretended(), Pretended()
    return found


ONE, TWO = "1" * 16, "2" * 16


def says(serving, state):
    text = f"rewind 1\nstate {state}\ndone 5\nend\n"
    with (serving._folder / control.CONTROL).open("r+b") as file:
        file.write(text.encode().ljust(4096, b"\0"))


def lives_on(serving, what):
    with (serving._folder / control.CONTROL).open("r+b") as file:
        file.seek(4096)
        file.write(str(what).encode().ljust(4096, b"\0"))


def asks(serving, boot, machine="rack.1"):
    with (serving._folder / "claim").open("r+b") as file:
        file.write(f"rewind 1\nboot {boot}\nmachine {machine}\nend\n".encode().ljust(4096, b"\0"))


def steps(serving, clock, seconds):
    """How long it goes on, at most so many seconds."""
    begun = clock.now
    while clock.now < begun + seconds:
        if serving._step():
            break
        clock.now += 0.5
    return clock.now - begun


def known(serving):
    return streams.state(serving._home, "rack")


def test_server_says_who_it_is_before_anything_takes_time(serving, monkeypatch):
    """Or whoever looks meanwhile takes it for dead: begins a second one, or forgets one that lives on."""
    seen = []

    def opened():
        seen.append(known(serving)["key"])
        raise RestoreError(reason="no repository")

    monkeypatch.setattr(serving, "_spec", lambda: SimpleNamespace(key_fd=None, open=opened))
    with pytest.raises(RestoreError):
        serving.run()
    assert seen == [process_key(os.getpid())] and known(serving)["error"] == "no repository"


def test_server_whose_folder_is_gone_leaves_no_view(serving, monkeypatch):
    repo = MagicMock()
    monkeypatch.setattr(serving, "_spec", lambda: SimpleNamespace(key_fd=None, open=lambda: repo))
    repo.__enter__().session().__exit__.return_value = repo.__exit__.return_value = False
    serving._view.tended = lambda: shutil.rmtree(serving._folder)
    with pytest.raises(FileNotFoundError):
        serving.run()
    assert serving._view.stopped and serving._daemon.stopped


def test_forgetting_ends_a_server_that_could_not_say_who_it_is(serving):
    """Its disk was full, or it has just begun."""
    with opens(serving._folder / "serve.lock", "fcntl.flock(file, 2)") as process:
        streams.tidy(serving._home, "rack")
        assert process.wait(5) == -signal.SIGKILL
    assert not serving._folder.exists()


def test_forgetting_ends_nobody_who_only_reads_the_lock_file(serving):
    """A backup of the home, or `grep -r`."""
    with opens(serving._folder / "serve.lock", "pass") as process:
        streams.tidy(serving._home, "rack")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)


@contextmanager
def opens(path, then):
    """A process that has that file open."""
    script = f"import fcntl, sys; file = open(sys.argv[1], 'w'); {then}; print('open', flush=True); input()"
    command = [sys.executable, "-c", script, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"open\n"
            yield process
        finally:
            process.kill()


def test_machine_keeps_its_root_while_the_server_is_deaf(serving, clock):
    """P6-14: another machine has asked, and the storage daemon hangs, or the view is away, for two minutes."""
    serving._begin()
    asks(serving, ONE)
    steps(serving, clock, 1)
    asks(serving, TWO, "rack.2")
    steps(serving, clock, 1)
    for part, word, away in ((serving._daemon, "answers", False), (serving._view, "key", "")):
        before = getattr(part, word)
        setattr(part, word, away)
        steps(serving, clock, 120)
        assert serving._claims.answer == claim.Answer(ONE, "rack.1")
        setattr(part, word, before)
        steps(serving, clock, 20)
        assert serving._claims.answer == claim.Answer(ONE, "rack.1")
    lives_on(serving, 1)
    steps(serving, clock, 1)
    assert serving._claims.answer.refused == TWO


def test_machine_keeps_its_root_when_the_server_stood_still(serving, clock):
    """P6-14: a control group that was frozen, a disk that hung: no sign was seen for minutes, and another machine has
    asked. It is granted when none comes now."""
    serving._begin()
    asks(serving, ONE)
    steps(serving, clock, 1)
    asks(serving, TWO, "rack.2")
    steps(serving, clock, 1)
    for _ in range(3):
        clock.now += 600
        steps(serving, clock, 20)
        assert serving._claims.answer == claim.Answer(ONE, "rack.1")
    steps(serving, clock, 30)
    assert serving._claims.answer == claim.Answer(TWO, "rack.2")


def test_session_ends_when_its_machine_has_let_go(serving, clock):
    """It hears an answer to its last word."""
    serving._begin()
    asks(serving, ONE)
    says(serving, "filling")
    assert steps(serving, clock, 100) == 100
    says(serving, "detached")
    assert 10 <= steps(serving, clock, 100) <= 11


def test_session_that_was_over_waits_for_a_machine_that_boots_again(serving, clock):
    """P6-14: its disks are complete, and it does not know that: it has to boot, to ask and to be told."""
    says(serving, "detached")
    asks(serving, ONE)
    serving._claims.tend()
    serving._begin()
    assert steps(serving, clock, 200) == 200
    asks(serving, TWO)
    assert steps(serving, clock, 9) == 9
    assert serving._claims.answer == claim.Answer(TWO, "rack.1") and serving._daemon.boots[-1] == TWO
    assert steps(serving, clock, 200) == 200
    lives_on(serving, 1)
    assert 300 <= steps(serving, clock, 1000) <= 301


def test_session_that_was_over_does_not_wait_for_a_machine_that_never_ends(serving, clock):
    """P6-14: a wrong one that boots again and again would keep gc away for ever."""
    says(serving, "detached")
    serving._begin()
    begun = clock.now
    while clock.now < begun + 3600 and steps(serving, clock, 100) == 100:
        asks(serving, f"{int(clock.now):016x}", "rack.2")
    assert 1800 <= clock.now - begun <= 1801


def test_server_that_cannot_begin_tells_one_reason_however_often_it_is_started(serving, clock):
    """P6-14: the daemon starts it again and again, and whoever looks meanwhile would see another reason, or none."""
    for _ in range(2):
        serving._begin()
        serving._fail(RestoreError(reason="no repository at /r"))
        again = serve.Serving(serving._home, "rack", serving._settings)
        again._begin()
        assert known(serving)["error"] == "no repository at /r"
    steps(serving, clock, 1)
    assert known(serving)["error"] == ""


def test_machine_that_was_sent_away_is_no_error_of_a_session_that_is_done(serving, clock):
    serving._begin()
    for boot, machine in ((ONE, "rack.1"), (TWO, "rack.2")):
        asks(serving, boot, machine)
        steps(serving, clock, 1)
    says(serving, "filling")
    steps(serving, clock, 1)
    assert known(serving)["error"] == f"boot {TWO} was refused: another machine, rack.1, runs from this session"
    says(serving, "alone")
    steps(serving, clock, 1)
    assert known(serving)["phase"] == "done" and known(serving)["error"] == ""


@pytest.mark.parametrize(("last", "told"), [("echo no certificate", "no certificate"), ("exit 3", "exit status 3")])
def test_storage_daemon_that_does_not_live(last, told, tmp_path, monkeypatch):
    """It is told why in words, and started anew; also one that is not installed just now."""
    found = StorageDaemon("rack", Place("127.0.0.1", 1, False), (), tmp_path, tmp_path / "view", tmp_path / "log")
    monkeypatch.setattr(found, "_command", lambda _boot: ["/no/such/program"])
    found.tend("")
    assert "/no/such/program" in found.error
    monkeypatch.setattr(found, "_command", lambda _boot: ["sh", "-c", last])
    found._next_start = 0.0
    found.tend("")
    found._child.wait(5)
    found.tend("")
    assert found.error == f"the storage daemon has ended: {told}"
    found.stop()


def test_storage_daemon_without_room_for_its_log_is_started_later(tmp_path, monkeypatch):
    found = StorageDaemon("rack", Place("127.0.0.1", 1, False), (), tmp_path, tmp_path / "view", tmp_path / "log")
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "log"))
    monkeypatch.setattr(storagedaemon, "Child", MagicMock(side_effect=full))
    found.tend("")
    assert "No space left on device" in found.error
    monkeypatch.undo()
    monkeypatch.setattr(found, "_command", lambda _boot: ["sleep", "60"])
    found._next_start = 0.0
    found.tend("")
    assert found._child is not None
    found.stop()


def test_last_words_of_a_storage_daemon_are_its_own(serving, monkeypatch):
    """In a log of all sessions another's may come last."""
    made = MagicMock()
    monkeypatch.setattr(serve, "StorageDaemon", made)
    serve.Serving(serving._home, "rack", load_settings(serving._home))
    assert made.call_args.args[-1] == serving._home.log / "serve-daemon-rack.log"


def test_forgetting_leaves_no_log_of_that_name_alone(serving):
    """Each name that was ever served would leave one."""
    logs = serving._home.log
    logs.mkdir(exist_ok=True)
    for name in ("serve-daemon-rack", "serve-daemon-rack2", "serve"):
        (logs / f"{name}.log").touch()
    for _ in range(2):
        streams.tidy(serving._home, "rack")
        assert sorted(one.name for one in logs.iterdir()) == ["serve-daemon-rack2.log", "serve.log"]


def session_of(serving):
    return SimpleNamespace(home=serving._home, spec=RepositorySpec("/r", serving._home.path, None), settings_file=None)


def test_name_that_is_taken_is_told_before_its_port(serving, monkeypatch):
    """The same command typed twice: the port is taken by the session itself."""
    session, refuse = MagicMock(home=serving._home), MagicMock(side_effect=AssertionError("asked"))
    monkeypatch.setattr(streaming, "resolve", MagicMock())
    monkeypatch.setattr(streaming, "choose", lambda *_: ())
    monkeypatch.setattr(streaming, "_need_free", refuse)
    choices = streaming.Choices("127.0.0.1:1", insecure=True)
    with pytest.raises(AlreadyExists):
        streaming.serve(session, "web", "last", "rack7", "rack", serving._home.path, [], choices)


@pytest.mark.parametrize("verb", [streaming.resume, streaming.forget])
def test_name_is_resumed_or_forgotten_by_one_at_a_time(verb, serving, monkeypatch):
    """Or what one forgets is made again by the other, without what it has to do."""
    monkeypatch.setattr(streams, "launch", MagicMock(side_effect=AssertionError("launched")))
    with alone(serving._folder.parent / ".rack.lock"), pytest.raises(Locked):
        verb(session_of(serving), "rack")
    assert serving._folder.exists()


def test_session_that_was_forgotten_is_not_made_again(serving, order):
    streams.tidy(serving._home, "rack")
    with pytest.raises(FileNotFoundError):
        streams.launch(serving._home, order)
    assert not serving._folder.exists()


@pytest.mark.parametrize(("kind", "listing"), [(streams, streaming.listing), (hydrations, starting.listing)])
def test_list_leaves_out_what_was_forgotten_meanwhile(kind, listing, serving, monkeypatch):
    monkeypatch.setattr(kind, "names", lambda _home: ["gone"])
    assert listing(session_of(serving)) == []
