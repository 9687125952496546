"""A monitor that does not answer: every wait has an end, and the QEMU behind it is never taken for shut off."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from appliance.errors import ConnectError, DomainBusy, DomainLost
from appliance.hypervisor import connect, qmp

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr(qmp, "_CONNECT", 0.5)
    monkeypatch.setattr(qmp, "_REPLY", 0.5)
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        yield Path(folder) / "monitor.sock"


class Server:
    """A monitor that does only what `answers` says: for each connection the number of commands that it answers, or
    None for one that is not even greeted."""

    def __init__(self, path, *answers, backlog=5):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen(backlog)
        self.open = []
        threading.Thread(target=self._run, args=(answers,), daemon=True).start()

    def _run(self, answers):
        with contextlib.suppress(OSError, ValueError):  # closed at the end of the test
            self._serve(answers)

    def _serve(self, answers):
        for count in answers:
            client = self.socket.accept()[0]
            self.open.append(client)
            if count is None:
                continue
            client.sendall(json.dumps(GREETING).encode() + b"\n")
            for _ in range(count + 1):  # the first one negotiates, and has no id
                command = json.loads(client.recv(4096))
                known = {"id": command["id"]} if "id" in command else {}
                client.sendall(json.dumps({"return": {"running": True}, **known}).encode() + b"\n")

    def close(self):
        for one in (self.socket, *self.open):
            one.close()


@pytest.fixture
def server(place):
    made = []

    def start(*answers, **options):
        made.append(Server(place, *answers, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_one_that_accepts_and_says_nothing(place, server):
    server(None)
    began = time.monotonic()
    with pytest.raises(DomainBusy, match="holds its monitor"):
        qmp.Connection(place, "web")
    assert time.monotonic() - began < 10


def test_one_that_does_not_accept(place, server):
    """Its backlog is full: the kernel would keep us waiting without end."""
    server(backlog=0)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(place))
    began = time.monotonic()
    with pytest.raises(DomainBusy, match="holds its monitor"):
        qmp.Connection(place, "web")
    assert 0.4 < time.monotonic() - began < 10
    waiting.close()


def test_nobody_there(place):
    with pytest.raises(ConnectError):
        qmp.Connection(place, "web")


def test_a_command_that_is_not_answered_is_named(place, server, monkeypatch):
    """P5-03: busy, not lost; who was lost would be taken for shut off, with its images still open."""
    monkeypatch.setattr(qmp, "_CONNECT", 10.0)
    monkeypatch.setattr(qmp, "_REPLY", 2.0)
    server(1, None, None)
    connection = qmp.Connection(place, "web")
    assert connection.execute("query-status")["running"]
    began = time.monotonic()
    with pytest.raises(DomainBusy, match="not answered system_reset"):
        connection.execute("system_reset")
    assert time.monotonic() - began < 15
    with pytest.raises(DomainLost):
        connection.execute("query-status")


def test_a_domain_whose_qemu_is_stuck_is_not_shut_off(place, server, monkeypatch):
    # It is for the first connection too, which has to succeed.
    monkeypatch.setattr(qmp, "_CONNECT", 3.0)
    server(0, None, None)
    hypervisor = connect(f"qmp://{place}?name=web")
    domain = hypervisor.domain("web")
    for _ in range(2):
        with pytest.raises(DomainBusy):
            domain.state()
    hypervisor.close()
