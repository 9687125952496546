"""The daemon's loop, with points that are only pretended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.config import Home
from appliance.daemon import Daemon, resuming
from appliance.daemon import loop as module
from appliance.daemon.shared import Tried
from appliance.errors import ConfigError, DomainNotFound, Locked, NoSuchTemplate, NotRecoverable
from appliance.model import Consistency, Point
from appliance.process import process_key
from appliance.restore import hydrations, streams
from appliance.service import Session, locks
from appliance.service.image import evidence, scheduled, starting, streaming, verifying
from appliance.service.setup import init
from appliance.service.underway import Pending
from images.verify.judge import Verdict
from tests.support.limits import limit


@pytest.fixture
def session():
    with tempfile.TemporaryDirectory(prefix="rw") as folder, Session(Home(Path(folder) / "home")) as found:
        init(found)
        yield found


def protect(session, name, every=60):
    record = Protection(name, f"uuid-{name}", "test:///", ("vda",), "id", "t", every=every)
    protection.save(session.home, record)


def test_a_newest_point_that_was_forgotten_is_told_once(session, caplog):
    protect(session, "web")
    [record] = protection.all_records(session.home)
    protection.save(session.home, replace(record, last_point="0123abcd"))
    daemon = Daemon(session, lambda _event: None)
    for _ in range(3):
        [task] = daemon._tasks()
        assert task.last is None
    [line] = caplog.messages
    assert line.startswith("web: point 0123abcd was forgotten")


class Points:
    """Pretends to take them; domains in `broken` fail."""

    def __init__(self, monkeypatch):
        self.taken, self.broken = [], {}
        self.lock = threading.Lock()
        monkeypatch.setattr(module, "point", self)

    def __call__(self, session, uuid, *, reason, wait):
        name = uuid.removeprefix("uuid-")
        with self.lock:
            self.taken.append(name)
        if name in self.broken:
            raise self.broken[name]
        told = {"consistency": Consistency.CRASH, "time": datetime.now(UTC), "notes": ("vdb is not in this point",)}
        return type("P", (), {"id": "p", "disks": (), **told})()


def run_for(daemon, seconds):
    with module.ThreadPoolExecutor(4) as pool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            daemon._start_due(pool)
            time.sleep(0.05)


def test_one_domain_that_fails_does_not_stop_the_others(session, monkeypatch):
    points, events = Points(monkeypatch), []
    for name in ("web", "db"):
        protect(session, name, every=3600)
    points.broken["web"] = DomainNotFound(domain="web", uri="test:///")
    Daemon(session, events.append).round()
    assert sorted(points.taken) == ["db", "web"]
    assert {(one.kind, one.domain) for one in events} == {("failed", "web"), ("point", "db")}
    assert "no domain 'web'" in next(one.detail for one in events if one.kind == "failed")
    assert "vdb is not in this point" in next(one.detail for one in events if one.kind == "point")


def test_a_bug_in_one_epoch_is_told_and_survived(session, monkeypatch):
    points, events = Points(monkeypatch), []
    protect(session, "web")
    points.broken["web"] = ZeroDivisionError("surprise")
    daemon = Daemon(session, events.append)
    daemon.round()
    assert [one.kind for one in events] == ["failed"] and "ZeroDivisionError" in events[0].detail


def test_what_the_system_refuses_is_told_with_the_path(session, monkeypatch):
    points, events = Points(monkeypatch), []
    protect(session, "web")
    points.broken["web"] = OSError(errno.EROFS, "Read-only file system", "/var/lib/rewind/run")
    Daemon(session, events.append).round()
    (told,) = [one.detail for one in events]
    assert told.startswith("no permission at /var/lib/rewind for 'run': read-only file system ("), told


def test_a_failure_is_not_repeated_at_once(session, monkeypatch):
    """A broken domain is tried again after half an interval (a minute at most), not in a loop."""
    points = Points(monkeypatch)
    protect(session, "web", every=60)
    points.broken["web"] = DomainNotFound(domain="web", uri="test:///")
    run_for(Daemon(session, lambda _event: None), 0.6)
    assert points.taken == ["web"]


def test_domains_without_a_schedule_are_left_alone(session, monkeypatch):
    points = Points(monkeypatch)
    protect(session, "web", every=None)
    Daemon(session, lambda _event: None).round()
    assert points.taken == []


def test_one_daemon_serves_a_home(session, monkeypatch):
    Points(monkeypatch)
    first, second = Daemon(session, lambda _event: None), Daemon(session, lambda _event: None)
    with first._alone():
        assert session.daemon_runs()
        with pytest.raises(Locked, match="daemon"):
            second.round()
    assert not session.daemon_runs()


def test_a_daemon_starts_while_somebody_looks_whether_one_runs(session, monkeypatch):
    """`status` holds its lock for an instant."""
    points = Points(monkeypatch)
    protect(session, "web")
    look = os.open(locks.daemon_lock(session.home), os.O_RDWR | os.O_CREAT)
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [look]).start()
    Daemon(session, lambda _event: None).round()
    assert points.taken == ["web"]


class Reverts:
    """Pretends that reverts were interrupted and resumes them."""

    def __init__(self, monkeypatch, *names):
        self.names, self.left, self.broken, self.calls = set(names), set(names), None, []
        monkeypatch.setattr(resuming, "under_way", lambda _session: self.of(self.names))
        monkeypatch.setattr(resuming, "abandoned", lambda _session: self.of(self.left))
        monkeypatch.setattr(resuming, "resume", self)

    @staticmethod
    def of(names):
        return [Pending(name, f"uuid-{name}", "target", ()) for name in sorted(names)]

    def __call__(self, session, uuid):
        name = uuid.removeprefix("uuid-")
        self.calls.append(name)
        if self.broken:
            raise self.broken
        self.names.discard(name), self.left.discard(name)
        return [type("R", (), {"domain": name, "verb": "revert", "point": "target", "state": "done"})()]


def test_an_interrupted_revert_goes_on_and_no_point_is_tried_meanwhile(session, monkeypatch):
    """P5-07: the host was started anew: the keeper is gone, and the fence keeps the domain from starting."""
    points, reverts, events = Points(monkeypatch), Reverts(monkeypatch, "web"), []
    protect(session, "web"), protect(session, "db")
    daemon = Daemon(session, events.append)
    daemon.round()
    assert reverts.calls == ["web"] and points.taken == ["db"]
    assert [one.detail for one in events if one.kind == "resumed"] == ["the interrupted revert to target: done"]
    daemon.round()
    assert reverts.calls == ["web"] and sorted(points.taken) == ["db", "db", "web"]


def test_a_revert_that_is_driven_is_left_alone(session, monkeypatch):
    points, reverts = Points(monkeypatch), Reverts(monkeypatch, "web")
    reverts.left.clear()
    protect(session, "web")
    Daemon(session, lambda _event: None).round()
    assert reverts.calls == [] and points.taken == []


def test_a_revert_that_cannot_be_ended_is_told_and_tried_later(session, monkeypatch):
    Points(monkeypatch)
    reverts, events = Reverts(monkeypatch, "web"), []
    reverts.broken = NotRecoverable(point="target", reason="no repository")
    daemon = Daemon(session, events.append)
    run_for(daemon, 0.3)
    assert reverts.calls == ["web"] and [one.kind for one in events] == ["failed"]
    daemon._reverts._tries["uuid-web"] = Tried(time.time() - 61, 1)
    run_for(daemon, 0.3)
    assert reverts.calls == ["web", "web"]
    daemon._reverts._tries["uuid-web"] = Tried(time.time() - 61, 2)
    run_for(daemon, 0.3)
    assert reverts.calls == ["web", "web"]


def test_a_revert_of_a_domain_that_somebody_holds_is_tried_a_little_later(session, monkeypatch):
    Points(monkeypatch)
    reverts, events = Reverts(monkeypatch, "web"), []
    reverts.broken = Locked(url="domain 'web'", holder="rewind resume")
    daemon = Daemon(session, events.append)
    run_for(daemon, 0.3)
    assert reverts.calls == ["web"] and events == []
    daemon._reverts._tries["uuid-web"] = Tried(time.time() - 6, 0)
    reverts.broken = None
    run_for(daemon, 0.2)
    assert reverts.calls == ["web"] * 2 and [one.kind for one in events] == ["resumed"]


class Images:
    """Pretends that machines and domains were brought up from this home, and that nobody works for them any more."""

    def __init__(self, monkeypatch, home):
        self.home, self.calls, self.broken = home, [], None
        monkeypatch.setattr(streaming, "resume", lambda _session, name: self.again("served", name))
        monkeypatch.setattr(starting, "resume", lambda _session, name: self.again("filled", name))

    def add(self, kind, name, **state):
        where = kind.folder(self.home, name)
        where.mkdir(parents=True)
        # Two of one point: each of them is needed.
        (where / "order.json").write_text("{}")
        (where / "state.json").write_text(json.dumps(state))

    def again(self, how, name):
        self.calls.append((how, name))
        if self.broken:
            raise self.broken


def test_what_was_brought_up_goes_on_after_the_host_was_restarted(session, monkeypatch):
    """P6-14: machines that boot from here are served again, domains' disks filled, each of them; what is done or has a
    process is left alone."""
    images, events = Images(monkeypatch, session.home), []
    for name in ("rack1", "rack2"):
        images.add(streams, name, phase="pulling", key="1:0")
        images.add(hydrations, f"twin-{name}", phase="pulling", key="1:0")
    images.add(streams, "new")  # it was killed before it could say anything
    images.add(streams, "alone", phase="done", key="1:0")
    images.add(streams, "well", phase="booting", key=process_key(os.getpid()))
    daemon = Daemon(session, events.append)
    daemon.round()
    expected = [("served", "new"), ("served", "rack1"), ("served", "rack2")]
    assert sorted(images.calls) == [("filled", "twin-rack1"), ("filled", "twin-rack2"), *expected]
    assert {one.kind for one in events} == {"resumed"} and len(events) == 5


def test_points_are_taken_while_machines_do_not_come_back(session, monkeypatch):
    """Each waits for a minute for a repository that is away: that must not take all workers."""
    points, images, waits = Points(monkeypatch), Images(monkeypatch, session.home), threading.Event()
    again = images.again
    monkeypatch.setattr(images, "again", lambda how, name: (waits.wait(limit(60)), again(how, name)))
    for number in range(6):
        images.add(streams, f"rack{number}", phase="pulling", key="1:0")
    protect(session, "web")
    daemon = Daemon(session, lambda _event: None)
    thread = threading.Thread(target=daemon.round)
    thread.start()
    deadline = time.monotonic() + limit(5)
    while not points.taken and time.monotonic() < deadline:
        time.sleep(0.02)
    taken = list(points.taken)
    waits.set()
    thread.join()
    assert taken == ["web"] and len(images.calls) == 6


class Slow:
    """Has what is resumed wait, as for a repository that is away, while `with` lasts."""

    def __init__(self, monkeypatch, images, daemon):
        self.images, self.waits, self.begun = images, threading.Event(), []
        self.thread = threading.Thread(target=daemon.round)
        again = images.again
        monkeypatch.setattr(images, "again", lambda how, name: (self.begin(name), again(how, name)))

    def begin(self, name):
        self.begun.append(name)
        self.waits.wait(limit(60))

    def __enter__(self):
        self.thread.start()
        deadline = time.monotonic() + limit(5)
        while len(self.begun) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.waits.set()
        self.thread.join()


@pytest.mark.parametrize("kind", ["revert", "image"])
def test_what_somebody_holds_is_tried_soon_however_often_it_has_failed(kind, session, monkeypatch):
    """And the next failure counts with those before."""
    Points(monkeypatch)
    reverts, images = Reverts(monkeypatch, *["web"][: kind == "revert"]), Images(monkeypatch, session.home)
    if kind == "image":
        images.add(streams, "web", phase="pulling", key="1:0")
    daemon = Daemon(session, lambda _event: None)
    part, made, key = (
        (daemon._reverts, reverts, "uuid-web") if kind == "revert" else (daemon._brought_up, images, "web")
    )  # fmt: skip
    part._tries[key] = Tried(time.time() - 3601, 7)
    made.broken = Locked(url="domain 'web'", holder="rewind resume")
    daemon.round(), daemon.round()
    assert len(made.calls) == 1
    part._tries[key] = part._tries[key]._replace(when=time.time() - 6)
    made.broken = NotRecoverable(point="target", reason="no repository")
    daemon.round()
    assert len(made.calls) == 2
    part._tries[key] = part._tries[key]._replace(when=time.time() - 61)
    daemon.round()
    assert len(made.calls) == 2 and part._tries[key].failures == 8


def test_what_has_ended_leaves_its_failures_to_nobody(session, monkeypatch):
    """Another revert of the domain, another session of that name: each is tried at once when nobody works for it."""
    Points(monkeypatch)
    reverts, images = Reverts(monkeypatch, "web"), Images(monkeypatch, session.home)
    images.add(streams, "rack", phase="pulling", key="1:0")
    reverts.broken = images.broken = NotRecoverable(point="target", reason="no repository")
    daemon = Daemon(session, lambda _event: None)
    daemon.round(), daemon.round()
    assert reverts.calls == ["web"] and images.calls == [("served", "rack")]
    shutil.rmtree(streams.folder(session.home, "rack")), reverts.names.clear(), reverts.left.clear()
    daemon.round()
    images.add(streams, "rack", phase="pulling", key="1:0")
    reverts.names.add("web"), reverts.left.add("web")
    daemon.round()
    assert reverts.calls == ["web"] * 2 and images.calls == [("served", "rack")] * 2


def test_machine_that_lives_does_not_wait_for_those_that_do_not_come_back(session, monkeypatch):
    """P6-14: its server has died, while a minute is spent on each of many that failed before."""
    images, daemon = Images(monkeypatch, session.home), Daemon(session, lambda _event: None)
    all_racks = [f"rack{number}" for number in range(6)]
    for name in all_racks:
        images.add(streams, name, phase="pulling", key="1:0")
        daemon._brought_up._tries[name] = Tried(time.time() - 100, 1)
    with Slow(monkeypatch, images, daemon) as slow:
        assert sorted(slow.begun) == ["rack0", "rack1"]
        images.add(hydrations, "twin", phase="pulling", key="1:0")
        images.add(streams, "well", phase="pulling", key="1:0")
        assert [name for *_, name in daemon._brought_up._waiting(time.time())] == ["well", "twin", *all_racks[2:]]
    assert sorted(slow.begun) == [*all_racks, "twin", "well"]


def test_what_is_forgotten_or_ends_while_others_are_resumed_is_left_alone(session, monkeypatch):
    images, events = Images(monkeypatch, session.home), []
    for number in range(4):
        images.add(streams, f"rack{number}", phase="pulling", key="1:0")
    images.broken = ConfigError(reason="nothing is served as 'rack0' from here")
    with Slow(monkeypatch, images, Daemon(session, events.append)) as slow:
        shutil.rmtree(streams.folder(session.home, "rack0"))
        shutil.rmtree(streams.folder(session.home, "rack2"))
        (streams.folder(session.home, "rack3") / "state.json").write_text('{"phase": "done", "key": "1:0"}')
    assert sorted(slow.begun) == ["rack0", "rack1"]
    assert [one.domain for one in events if one.kind == "failed"] == ["rack1"]  # which is still there


def test_a_machine_that_somebody_else_begins_or_forgets_is_no_failure(session, monkeypatch):
    images, events = Images(monkeypatch, session.home), []
    images.add(streams, "rack1", phase="pulling", key="1:0")
    images.broken = Locked(url="the name 'rack1'", holder="another `rewind image`")
    daemon = Daemon(session, events.append)
    run_for(daemon, 0.4)
    assert images.calls == [("served", "rack1")] and events == []  # and not in a loop
    daemon._brought_up._tries["rack1"] = Tried(time.time() - 6, 0)
    images.broken = None
    run_for(daemon, 0.2)
    assert images.calls == [("served", "rack1")] * 2 and [one.kind for one in events] == ["resumed"]


@pytest.mark.parametrize("broken", [NotRecoverable(point="p", reason="no repository"), ZeroDivisionError("surprise")])
def test_a_machine_that_cannot_be_served_again_is_told_and_tried_later(broken, session, monkeypatch):
    images, events = Images(monkeypatch, session.home), []
    images.add(streams, "rack1", phase="pulling", key="1:0")
    images.broken = broken
    daemon = Daemon(session, events.append)
    run_for(daemon, 0.4)
    assert images.calls == [("served", "rack1")] and [one.kind for one in events] == ["failed"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(1)])
def test_a_machine_is_served_again_also_when_nobody_could_be_told_the_last_time(error, session, monkeypatch, caplog):
    """P6-14: standard output may lead to a disk that is full, or to nobody. Then the log knows."""

    def tell(_event):
        raise error

    images = Images(monkeypatch, session.home)
    images.add(streams, "rack1", phase="pulling", key="1:0")
    daemon = Daemon(session, tell)
    daemon.round()
    assert images.calls == [("served", "rack1")] and daemon._shared.wake.is_set()
    assert [one.exc_info[1] for one in caplog.records if "a worker has ended" in one.message] == [error]
    daemon._brought_up._tries["rack1"] = Tried(time.time() - 6, 0)
    daemon.round()
    assert images.calls == [("served", "rack1")] * 2


def test_a_protection_that_comes_later_is_noticed(session, monkeypatch):
    points = Points(monkeypatch)
    daemon = Daemon(session, lambda _event: None)
    daemon.round()
    protect(session, "web")
    daemon.round()
    assert points.taken == ["web"]


def test_systemd_is_told(monkeypatch, tmp_path):
    import socket

    with (
        tempfile.TemporaryDirectory(prefix="rw") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
    ):
        channel.bind(f"{folder}/notify")
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/notify")
        module._notify("READY=1")
        assert channel.recv(100) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    module._notify("READY=1")


def test_a_tap_process_that_is_gone_is_started_again(session, monkeypatch):
    """P5-23: also after a failure, but not at once."""
    started, events = [], []

    def ensure(_session, record):
        started.append(record.domain)
        if record.domain == "db":
            raise NotRecoverable(point="p", reason="no nbdkit")

    monkeypatch.setattr(module, "ensure", ensure)
    for name in ("web", "db", "epochs"):
        protect(session, name, every=None)
        if name != "epochs":
            record = protection.load(session.home, f"uuid-{name}")
            protection.save(session.home, replace(record, continuous=True))
    run_for(Daemon(session, events.append), 0.4)
    assert started.count("db") == 1
    assert started.count("web") == 1, "one that starts and dies again and again"
    assert "epochs" not in started
    assert ("failed", "db") in {(one.kind, one.domain) for one in events}
    assert ("tap", "web") in {(one.kind, one.domain) for one in events}


def test_a_domain_that_is_paused_gets_no_points(session, monkeypatch):
    """P5-23: until the pause is over."""
    points = Points(monkeypatch)
    protect(session, "web", every=1)
    session.home.run("uuid-web").mkdir(parents=True)
    pause = session.home.run("uuid-web") / "pause.json"
    pause.write_text(json.dumps({"until": time.time() + 60}))
    daemon = Daemon(session, lambda _event: None)
    run_for(daemon, 0.3)
    assert points.taken == []
    pause.write_text(json.dumps({"until": time.time() - 1}))
    run_for(daemon, 0.3)
    assert set(points.taken) == {"web"}


class Rehearsals:
    """Pretends to boot points as tests; `say` is what comes of each, an error or a verdict."""

    def __init__(self, monkeypatch, *say):
        self.asked, self._say = [], list(say)
        self.due = scheduled.Due("p1", time.time() + 3600)
        monkeypatch.setattr(scheduled, "due", lambda _session, _record, _now: self.due)
        monkeypatch.setattr(verifying, "verify", self)

    def __call__(self, _session, uuid, point, *, stopped):
        self.asked.append((uuid, point, stopped()))
        said = self._say.pop(0)
        if isinstance(said, Exception):
            raise said
        return SimpleNamespace(verdict=said, target="own-hardware", seconds=42.0)


def rehearsed(session, events, **changes):
    protect(session, "web", every=None)
    [record] = protection.all_records(session.home)
    protection.save(session.home, replace(record, verify_every=86400, **changes))
    daemon = Daemon(session, events.append)
    run_for(daemon, 0.3)
    return daemon


def test_the_newest_point_is_booted_as_a_test(session, monkeypatch):
    """P6-28: by a schedule, once; what came of it is told."""
    events, pretended = [], Rehearsals(monkeypatch, Verdict(True, (), ("6.1",), (), ()))
    rehearsed(session, events)
    assert pretended.asked == [("uuid-web", "p1", False)]
    assert [(one.kind, one.detail) for one in events] == [("verified", "p1 boots on own-hardware, in 42 s")]


def test_a_point_that_does_not_boot_is_told(session, monkeypatch):
    events = []
    Rehearsals(monkeypatch, Verdict(False, ("no kernel was seen to start",), (), (), ()))
    rehearsed(session, events)
    assert [(one.kind, one.detail) for one in events] == [("failed", "p1 did not boot: no kernel was seen to start")]


@pytest.mark.parametrize("error", [NoSuchTemplate(template_name="ff", called="'ff'"), ZeroDivisionError("bug")])
def test_a_test_that_cannot_be_made_is_tried_later(session, monkeypatch, error):
    events, pretended = [], Rehearsals(monkeypatch, error)
    daemon = rehearsed(session, events)
    assert len(pretended.asked) == 1 and events[0].kind == "failed"
    assert events[0].detail.startswith("its newest point could not be tested: ")
    when, failures = daemon._verifying._tested["uuid-web"]
    assert failures == 1 and 30 < when - time.time() <= 60


def test_no_test_without_a_schedule(session, monkeypatch):
    pretended = Rehearsals(monkeypatch)
    protect(session, "db", every=None)
    run_for(Daemon(session, lambda _event: None), 0.2)
    assert pretended.asked == []


def test_what_was_tested_is_known_by_its_evidence(session):
    """Not by the daemon's memory: another one goes on from there."""
    record = Protection("web", "u", "test:///", ("vda",), "id", "t", verify_every=3600)
    assert scheduled.due(session, record, 1000.0) == scheduled.Due("", 1600.0)
    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    for number in (1, 2):
        session.repository.commit(Point(f"0a0{number}", "web", "u", "test:///", now, "t", None, ()))
    assert scheduled.due(session, record, now.timestamp()).point == "0a02"
    evidence.put(session, "0a01", now, True, {}, {})
    assert scheduled.due(session, record, now.timestamp() + 10) == scheduled.Due("", now.timestamp() + 3600)
    assert scheduled.due(session, record, now.timestamp() + 3600).point == "0a02"
    evidence.put(session, "0a02", now, False, {}, {})
    later = now.timestamp() + 7200
    assert scheduled.due(session, record, later) == scheduled.Due("", later + 600)
