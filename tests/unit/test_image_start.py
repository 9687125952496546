"""`rewind image start`, up to the image that it builds. With libvirt: tests/integration/test_image_settle.py."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from types import SimpleNamespace

import pytest

from appliance import hypervisor
from appliance.cli.running import emit_running
from appliance.config import Home, write_json
from appliance.errors import ConfigError, ConnectError, DomainNotFound, Locked
from appliance.restore import hydrations, outliving
from appliance.service.image import making, starting
from appliance.service.session import Session
from images.settle.choice import After
from tests.support.imagekit import FolderTree
from tests.support.settling import plan


class Enough(Exception):
    """The image that was to be built is known."""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The kernel's command line of the image for a domain of that name."""
    found = []

    def build_image(plan, *_args, **_rest):
        found.append(plan.command_line)
        raise Enough

    planned = making.Planned(plan(), "web", "p", None, "t", "fast")
    ready = making.Ready(planned, SimpleNamespace(tree=FolderTree(tmp_path), volumes=()), None, None)
    target = SimpleNamespace(definition="<domain><devices/></domain>", inventory=plan().inventory)
    monkeypatch.setattr(making, "prepared", lambda *_: contextlib.nullcontext(ready))
    monkeypatch.setattr(making, "build_image", build_image)
    monkeypatch.setattr(making.drivers, "reader", lambda *_: None)
    monkeypatch.setattr(starting.targets, "find", lambda *_: target)
    monkeypatch.setattr(starting, "resolve", lambda *_: SimpleNamespace(id="p"))
    monkeypatch.setattr(starting, "choose", lambda *_: [])
    monkeypatch.setattr(starting, "wanted_disks", lambda *_: [])
    nobody = SimpleNamespace(domains=list)
    session = SimpleNamespace(
        home=Home(tmp_path / "home"), uri="test:///", hypervisor=lambda: nobody,
        repository=SimpleNamespace(session=lambda _: contextlib.nullcontext()),
    )  # fmt: skip

    def start(name, warned=lambda _: None, **after):
        with pytest.raises(Enough):
            starting.start(
                session, "web", "latest", "rack", name, tmp_path / "files", after=After(**after), warned=warned
            )  # fmt: skip
        return found[-1] if found else ""

    return start


@pytest.mark.parametrize("keep", [(), ("host-name",)])
def test_each_domain_gets_an_identity_of_its_own(made, keep):
    """P6-24: clones of one point on one target, also where its host name is kept, or cannot be that of the domain."""
    lines = {made(name, identity="new", keep=keep) for name in ("one", "two_clones", "three_clones")}
    assert len(lines) == 3 and all("systemd.machine_id=" in line for line in lines)


def test_what_the_guest_lacks_is_told_before_it_is_started(made, tmp_path, monkeypatch):
    """P6-19: and by `plan`, with the same options."""

    def define(*_args):
        raise Enough

    heard = []
    built = SimpleNamespace(files={"iso": tmp_path / "x.iso"})
    monkeypatch.setattr(making, "build_image", lambda *_args, **_rest: built)
    monkeypatch.setattr(starting, "_define", define)
    made("twin", settle=True, warned=heard.extend)
    lacks = [one for one in heard if "update-initramfs" in one]
    assert lacks
    planned = making.plan(None, "web", "latest", "rack", after=After(settle=True))
    assert set(lacks) < set(planned.plan.warnings)
    assert not any("update-initramfs" in one for one in making.plan(None, "web", "latest", "rack").plan.warnings)


def test_what_a_killed_forget_left_is_not_taken_for_the_new_domain(tmp_path, monkeypatch):
    """P6-24: its state says done, for which nobody needs a view, and the new domain would start without one."""

    def launch(home, order, _settings):
        found.append((hydrations.state(home, order.domain), hydrations.folder(home, order.domain).is_dir()))
        raise Enough

    found, home = [], Home(tmp_path)
    hydrations.folder(home, "twin").mkdir(parents=True)
    outliving.write_state(hydrations.folder(home, "twin"), {"phase": "done"})
    monkeypatch.setattr(hydrations, "launch", launch)
    monkeypatch.setattr(starting, "qemu_user", lambda _: (0, 0))
    session = SimpleNamespace(
        home=home, uri="test:///", spec=SimpleNamespace(to_json=lambda: "{}"), settings_file=tmp_path
    )  # fmt: skip
    with pytest.raises(Enough), contextlib.ExitStack() as undo:
        starting._define(
            session, undo, SimpleNamespace(id="p"), SimpleNamespace(disks=[]), [], "twin", "u", tmp_path,
            starting.Way((), tmp_path), None, [], 0,
        )  # fmt: skip
    assert found == [({}, True)] and not hydrations.folder(home, "twin").exists()


def test_a_change_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Of a Windows: the domain is not even defined."""

    def change(disks):
        assert list(disks) == ["hda"] and disks["hda"].exists()
        raise Enough

    home = Home(tmp_path)
    monkeypatch.setattr(hydrations, "launch", lambda *_: None)
    monkeypatch.setattr(starting, "qemu_user", lambda _: (os.getuid(), os.getgid()))
    monkeypatch.setattr(starting, "_overlay", lambda disk, *_: disk.path.touch())
    session = SimpleNamespace(
        home=home, uri="test:///", spec=SimpleNamespace(to_json=lambda: "{}"), settings_file=tmp_path
    )  # fmt: skip
    with pytest.raises(Enough), contextlib.ExitStack() as undo:
        one = SimpleNamespace(disk="hda", map="m")
        starting._define(
            session, undo, SimpleNamespace(id="p"), SimpleNamespace(disks=[one]), ["sda"], "twin", "u", tmp_path,
            starting.Way((), None, change=change), None, [], 0,
        )  # fmt: skip
    assert not hydrations.folder(home, "twin").exists()


# --- what became of it ----------------------------------------------------------------------------------------------


def raiser(error):
    def fail(*_):
        raise error

    return fail


@pytest.fixture
def brought_up(tmp_path, monkeypatch):
    """`running` of a domain in this phase, of which the hypervisor says this."""
    order = hydrations.Order("twin", "u", "test:///", "p", "{}", {}, {"sda": "vda"}, None, 0, str(tmp_path), "")
    monkeypatch.setattr(starting, "lives", lambda _: True)
    folder = hydrations.folder(Home(tmp_path), "twin")
    folder.mkdir(parents=True)
    write_json(folder / "order.json", order.to_json())

    def made(phase, domain=lambda _: None):
        monkeypatch.setattr(hydrations, "state", lambda *_: {"phase": phase, "error": "no domain"})
        session = SimpleNamespace(home=Home(tmp_path), hypervisor_at=lambda _: SimpleNamespace(domain=domain))
        return session, starting.running(session, "twin")

    return made


@pytest.mark.parametrize("phase", ["done", "off", "pulling"])
def test_a_domain_that_was_undefined_is_gone(brought_up, phase):
    """P6-24: "done" was said of a domain that there is not, and "off" for ever of one that was being filled."""
    missing = DomainNotFound(domain="u", uri="test:///")
    session, found = brought_up(phase, raiser(missing))
    assert found.phase == "gone" and starting.follow(session, "twin") == found
    said = []
    output = SimpleNamespace(emit=lambda record, text: said.append((record.phase, text)))
    emit_running(SimpleNamespace(output=output), found)
    ((told, text),) = said
    assert told == "gone" and "no such domain" in text and "`rewind image forget twin`" in text
    with pytest.raises(ConfigError, match="domain 'twin' is gone"):
        starting.resume(session, "twin")


def test_a_domain_that_is_being_started_is_not_gone(brought_up):
    """It is defined when its view answers: who forgot it before that took the view away below it."""
    session, found = brought_up("off", raiser(DomainNotFound(domain="u", uri="test:///")))
    with starting._alone(session, "twin"):
        assert starting.running(session, "twin").phase == "off"
        with pytest.raises(Locked):
            starting.forget(session, "twin")
    assert found.phase == starting.running(session, "twin").phase == "gone"
    starting.forget(session, "twin")
    assert hydrations.names(session.home) == []


def test_a_domain_is_where_it_was_brought_up(brought_up, tmp_path, monkeypatch):
    """P6-24: whatever --connect says: another hypervisor has no such domain, and what is told then would take the view
    away below the guest."""
    brought_up("pulling")
    missing = SimpleNamespace(domain=raiser(DomainNotFound(domain="u", uri="test:///b")), close=lambda: None)
    there = SimpleNamespace(domain=lambda _: None, close=lambda: None)
    monkeypatch.setattr(hypervisor, "connect", {"test:///": there, "test:///b": missing}.get)
    with Session(Home(tmp_path), "test:///b") as session:
        assert starting.running(session, "twin").phase == "pulling"
        with pytest.raises(ConfigError, match="still reads") as told:
            starting.forget(session, "twin")
        assert "`virsh -c test:/// undefine --nvram twin`" in told.value.hint
        starting.resume(session, "twin")


def test_who_looks_is_in_nobodys_way(brought_up):
    """`image list` and `status` hold the lock of the name for an instant."""
    session, _ = brought_up("off", raiser(DomainNotFound(domain="u", uri="test:///")))
    another = os.open(starting._lock(session, "twin"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(another, fcntl.LOCK_SH)
    assert starting.running(session, "twin").phase == "gone"
    threading.Timer(0.1, os.close, [another]).start()
    starting.forget(session, "twin")
    assert not hydrations.folder(session.home, "twin").exists()


@pytest.mark.parametrize("phase", ["done", "off", "pulling"])
def test_a_hypervisor_that_does_not_answer_says_nothing_of_it(brought_up, phase):
    away = ConnectError(uri="test:///", reason="nobody answers")
    assert brought_up(phase, raiser(away))[1].phase == brought_up(phase)[1].phase == phase
