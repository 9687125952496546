"""What a name means after its domain was lost: an admin in the worst hour goes on by it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.capture import protection as records
from appliance.config import Home
from appliance.errors import ConfigError, DomainNotFound, NoSuchPoint, NotProtected, NotSupported, RevertUnderWay
from appliance.hypervisor.base import Disk, DomainState
from appliance.model import Timeline
from appliance.restore import intent
from appliance.service import Session, history, instant, protection, returning, setup
from appliance.service.naming import uuid_of
from appliance.service.status import status
from appliance.service.upkeep import forget
from appliance.units import CHUNK
from tests.support.store import START, point

OLD, NEW = "0ld00000-0000-4000-8000-000000000001", "0ew00000-0000-4000-8000-000000000002"
XML = "<domain type='qemu'><name>web</name><uuid>{}</uuid><devices/></domain>"


class Domain:
    uri = "test:///"

    def __init__(self, uuid, name="web"):
        self.uuid, self.name = uuid, name

    def state(self):
        return DomainState.SHUTOFF

    def disks(self):
        return [Disk("vda", "/images/a.qcow2", "qcow2", CHUNK, persistent=True)]

    def managed_save(self):
        return False


class Hypervisor:
    uri = "test:///"

    def __init__(self):
        self.there = []

    def domains(self):
        return [one.name for one in self.there]

    def domain(self, name):
        for one in self.there:
            if name in (one.name, one.uuid):
                return one
        raise DomainNotFound(domain=name, uri=self.uri)

    def define(self, xml):
        self.there.append(Domain(OLD))
        return self.there[-1]


@pytest.fixture
def session():
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        said: list[str] = []
        with Session(Home(Path(folder) / "home"), "test:///", say=said.append) as found:
            setup.init(found)
            hypervisor = Hypervisor()
            found.hypervisor = lambda _uri=None: hypervisor
            found.said, found.there = said, hypervisor.there
            yield found


def take(session, uuid, name, parent=None, second=0, timeline="t"):
    with session.repository.writer() as writer:
        ref = session.repository.write_map(None, CHUNK, [(0, writer.put(name.encode() * (CHUNK // len(name))))], writer)
    made = replace(
        point(name, ref, parent=parent, second=second), domain="web", domain_uuid=uuid, timeline=timeline, uri="test:///"
    )  # fmt: skip
    session.repository.put_timeline(Timeline(timeline, uuid, START))
    session.repository.commit(made)
    session.catalogue.refresh()
    return made


def test_a_name_that_nobody_has_is_not_to_be_protected(session):
    """The hint of a domain that there is leads on; of one that there is not it was refused as well."""
    session.there.append(Domain(OLD, "other"))
    for name, hint in (("nosuch", "there is no domain 'nosuch': `rewind status --all` lists those that there are"),
                       ("other", "`rewind protect other` begins")):  # fmt: skip
        with pytest.raises(NotProtected) as told:
            uuid_of(session, name)
        assert told.value.hint == hint


@pytest.fixture
def lost(session):
    """`web` was protected, has two points, and is gone."""
    session.there.append(Domain(OLD))
    protection.protect(session, "web")
    for number, name in enumerate(("0001aaaa", "0002aaaa")):
        take(session, OLD, name, second=number)
    records.save(session.home, replace(records.load(session.home, OLD), last_point="0002aaaa", timeline="t"))
    session.there.clear()
    session.said.clear()
    return session


def test_a_lost_domain_is_named_by_its_name_with_the_way_back(lost):
    for verb in (protection.point, protection.protect):
        with pytest.raises(DomainNotFound) as caught:
            verb(lost, "web")
        assert "'web'" in caught.value.message and OLD not in caught.value.message
        assert "rewind restore web --at latest" in caught.value.hint


def test_a_slip_in_a_name_is_told_what_was_meant(lost):
    lost.there.append(Domain(OLD))
    work = (protection.protect, protection.unprotect, protection.point, lambda session, name: status(session, name))
    for verb in work:
        with pytest.raises((DomainNotFound, NotProtected)) as caught:
            verb(lost, "wbe")
        assert caught.value.hint == "did you mean 'web'?"


def test_status_tells_how_a_lost_domain_comes_back(lost):
    (state,) = status(lost)[1]
    assert state.state == "gone"
    assert "`rewind restore web --at latest" in state.notes[0] and "`rewind unprotect web`" in state.notes[0]


def test_its_points_are_reached_and_another_of_the_name_is_told(lost):
    lost.there.append(Domain(NEW))
    assert len(history.history(lost, "web").points) == 2
    with pytest.raises(DomainNotFound) as caught:
        protection.point(lost, "web")
    assert NEW in caught.value.hint and "`rewind protect web`" in caught.value.hint and OLD in caught.value.hint
    state = status(lost, everything=True)[1]
    assert [(one.uuid, one.state) for one in state] == [(OLD, "gone"), (NEW, "shutoff")]
    assert "rewind protect web" in state[0].notes[0]


def test_protecting_the_new_one_says_where_the_old_points_are(lost):
    lost.there.append(Domain(NEW))
    made = protection.protect(lost, "web")
    assert made.record.uuid == NEW
    assert [one.uuid for one in records.all_records(lost.home)] == [NEW]
    assert any(f"rewind points {OLD}" in text for text in lost.said)
    # Nothing was lost: as long as the new one has no points, the name leads to those that there are.
    lost.said.clear()
    assert len(history.history(lost, "web").points) == 2
    assert instant.resolve(lost, "web", "latest").id == "0002aaaa"
    assert len(lost.said) == 1 and OLD in lost.said[0]
    assert len(history.history(lost, OLD).points) == 2
    take(lost, NEW, "0003bbbb", second=9, timeline="u")
    assert [one.id for one in history.history(lost, "web").points] == ["0003bbbb"]
    assert any(f"rewind points {OLD}" in text for text in lost.said)


def test_what_deletes_or_writes_never_means_the_old_one(lost):
    lost.there.append(Domain(NEW))
    protection.protect(lost, "web")
    assert uuid_of(lost, "web")[0] == NEW
    with pytest.raises(NoSuchPoint):
        forget(lost, "web", None, ["latest"])
    assert len(lost.repository.points()) == 2


def test_where_nothing_decides_the_uuids_are_listed(lost):
    take(lost, NEW, "0003bbbb", second=9, timeline="u")
    protection.unprotect(lost, "web")
    for reading in (True, False):
        with pytest.raises(ConfigError) as caught:
            uuid_of(lost, "web", reading=reading)
        assert OLD in caught.value.message and NEW in caught.value.message
        assert caught.value.hint.endswith(f"`rewind points {NEW}`")
    assert uuid_of(lost, OLD) == (OLD, "web")
    lost.there.append(Domain("another"))
    with pytest.raises(NotProtected):
        protection.point(lost, "web")


def test_a_new_one_that_is_refused_changes_nothing(lost):
    lost.there.append(new := Domain(NEW))
    new.disks = list
    with pytest.raises(NotSupported, match="no disk"):
        protection.protect(lost, "web")
    assert [one.uuid for one in records.all_records(lost.home)] == [OLD]


def half_way(home):
    intent.save(home, intent.Intent(
        id="i", domain="web", uuid=OLD, uri="test:///", verb="revert", point="p", safety_point="s", timeline="t2",
        instant=True, was="running", rate=0, started=0.0, repository="", phase=intent.Phase.SWITCHED,
    ))  # fmt: skip


def test_a_revert_of_the_lost_one_has_to_end_first(lost):
    half_way(lost.home)
    old = lost.repository.point("0002aaaa")
    assert not returning.may(lost, old)
    lost.there.append(Domain(NEW))
    with pytest.raises(RevertUnderWay):
        protection.protect(lost, "web")


def test_a_lost_domain_comes_back_as_itself(lost):
    """Of its newest point it goes straight on; of an older one history branches there, as after a revert."""
    newest, older = lost.repository.point("0002aaaa"), lost.repository.point("0001aaaa")
    assert returning.may(lost, newest)
    returning.define(lost, newest, XML.format(OLD))
    assert not returning.may(lost, newest)
    record = records.load(lost.home, OLD)
    assert (record.timeline, record.parent) == ("t", None)
    lost.there.clear()
    returning.define(lost, older, XML.format(OLD))
    record = records.load(lost.home, OLD)
    assert record.parent == older.id and record.timeline != "t"
    born = {one.id: one for one in lost.repository.timelines(OLD)}[record.timeline]
    assert (born.parent, born.origin) == ("t", older.id)
    assert lost.domain("web").uuid == OLD


def test_where_it_was_not_protected_it_is_another_domain(lost):
    """It may live on elsewhere, and two of one UUID would mix their points."""
    protection.unprotect(lost, "web")
    assert not returning.may(lost, lost.repository.point("0002aaaa"))
