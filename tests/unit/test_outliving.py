"""What processes that outlive their verb keep in the home: folders by name, orders, states, who needs which point."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.config import Home
from appliance.errors import ConfigError, RestoreError
from appliance.model import MapRef
from appliance.process import process_key
from appliance.restore import hydrate, hydrations, outliving, serve, streams
from appliance.service.image import starting, streaming
from tests.support.limits import limit

MAP = MapRef(bytes(16), 1 << 20)
SPEC = json.dumps({"url": "/repo", "cache": "/cache", "key_file": None, "key_fd": None})
PLACES = {"sda": "vda"}
BROUGHT_UP = hydrations.Order("twin", "uuid", "qemu:///system", "point-1", SPEC, {"vda": MAP}, PLACES, (1, 2), 0, "/i")
SERVED = streams.Order("rack", "s", "uuid", "point-2", "t", SPEC, {"vda": MAP}, "0.0.0.0", 10809, True, "stream", "/i")


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.mark.parametrize("kind", [hydrations, streams])
@pytest.mark.parametrize("name", ["..", "../domains", "", ".hidden", "a/b", "a b", "x" * 64])
def test_a_name_leads_nowhere_else(home, kind, name):
    """The folder of a name is removed when it is forgotten, and when a start fails."""
    for call in (kind.tidy, kind.load, kind.state, kind.folder):
        with pytest.raises(ConfigError, match="nothing can be called"):
            call(home, name)
    assert home.path.exists()


@pytest.mark.parametrize(("kind", "order"), [(hydrations, BROUGHT_UP), (streams, SERVED)])
def test_a_point_is_needed_until_it_is_done(home, kind, order):
    """P6-23: whatever is forgotten, what still is read stays; also when the host has just been started."""
    name = "twin" if kind is hydrations else "rack"
    where = kind.folder(home, name)
    where.mkdir(parents=True)
    (where / "order.json").write_text(json.dumps(order.to_json()))
    assert kind.load(home, name) == order
    assert kind.names(home) == [name]
    assert kind.needed(home) == {order.point: name}
    outliving.write_state(where, {"phase": "pulling"})
    assert kind.needed(home) == {order.point: name} and kind.unfinished(home) == [name]
    outliving.write_state(where, {"phase": "done"})
    assert kind.needed(home) == {} and kind.unfinished(home) == []
    kind.tidy(home, name)
    assert kind.names(home) == [] and kind.load(home, name) is None


@pytest.mark.parametrize(("kind", "order"), [(hydrations, BROUGHT_UP), (streams, SERVED)])
def test_what_cannot_be_forgotten_is_not_said_to_be(home, kind, order, monkeypatch):
    where = kind.folder(home, "rack")
    where.mkdir(parents=True)
    (where / "order.json").write_text(json.dumps(order.to_json()))

    def refused(self, *_, **__):
        if self.parent == where:
            raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(OSError, match=r"Read-only file system: .*order\.json"):
        kind.tidy(home, "rack")


@pytest.mark.parametrize("kind", [hydrations, streams])
def test_folder_that_stays_is_not_said_to_be_gone(home, kind, monkeypatch):
    """The next one of that name could not make it."""
    kind.folder(home, "rack").mkdir(parents=True)

    def refused(where, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(where))

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(OSError, match="busy"):
        kind.tidy(home, "rack")


@pytest.mark.parametrize(("kind", "forget"), [(hydrations, starting.forget), (streams, streaming.forget)])
def test_forgetting_that_was_broken_off_can_be_repeated(home, kind, forget):
    """Killed behind the order: keys and what a machine has written stay, and no list shows them."""
    where = kind.folder(home, "rack")
    where.mkdir(parents=True)
    (where / "server-key.pem").touch()
    session = SimpleNamespace(home=home)
    assert streaming.known(session, "rack") is (kind is streams), "by this the verb chooses"
    forget(session, "rack")
    assert not where.exists()
    with pytest.raises(ConfigError, match="rack"):
        forget(session, "rack")


def test_a_state_of_before_is_no_answer(home):
    """Nobody listens yet where the process that said so has died."""
    streams.folder(home, "rack").mkdir(parents=True)
    old = {"ready": True, "phase": "waiting", "key": "1:0", "error": "no repository"}
    outliving.write_state(streams.folder(home, "rack"), old)
    us = process_key(os.getpid())
    with pytest.raises(RestoreError, match="the server of 'rack' does not start: no repository"):
        streams._KIND.await_state(home, "rack", us, streams._is_ready, 0.1, "the server")
    assert streams._is_ready({**old, "key": us})


def test_a_session_that_is_done_is_served_again_only_when_somebody_answers(home):
    assert not streams._is_ready({"ready": True, "phase": "done", "key": "1:0"})
    assert hydrations._is_ready({"phase": "done", "key": "1:0", "view": ""})


@pytest.mark.parametrize(("kind", "order"), [(hydrations, BROUGHT_UP), (streams, SERVED)])
def test_what_was_forgotten_is_not_made_again(kind, order, home):
    with pytest.raises(FileNotFoundError):
        kind.launch(home, order)
    assert kind.names(home) == []


@pytest.mark.parametrize(("kind", "process", "order"), [(hydrations, hydrate, BROUGHT_UP), (streams, serve, SERVED)])
def test_a_process_that_ends_at_once_is_not_waited_for(kind, process, order, home, monkeypatch):
    """P6-14: it would be a minute, in which nobody else can have the name, and without a reason."""
    home.create()
    kind.folder(home, order.name if kind is streams else order.domain).mkdir(parents=True)
    monkeypatch.setattr(outliving.sys, "executable", "/bin/false")
    began = time.monotonic()
    with pytest.raises(RestoreError, match="does not start: its process has ended") as error:
        kind.launch(home, order)
    assert time.monotonic() - began < limit(5)
    assert error.value.hint == f"`tail {home.log}/{process.__name__.rpartition('.')[2]}.log` shows its last words"
