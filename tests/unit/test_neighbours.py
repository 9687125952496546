"""What another home of this host has left half-way is nobody's to take or to revert, also when the guest is off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.config import Home, write_json
from appliance.errors import RevertUnderWay
from appliance.hypervisor import hostlock
from appliance.hypervisor.base import Disk, DomainState
from appliance.model import MapRef
from appliance.restore import fence, neighbours, switching
from appliance.restore import intent as intents
from appliance.restore.intent import DiskIntent, Intent, Phase
from appliance.service.session import Session
from appliance.service.underway import refuse_if_under_way

UUID = "0b1a3c52-7a3e-4a0f-9c77-1b1d3c5e7f90"


class Off:
    """A domain that is shut off."""

    name = "web"

    def __init__(self, image, uuid=UUID):
        self.uuid, self._image = uuid, image

    def state(self):
        return DomainState.SHUTOFF

    def disks(self):
        return [Disk("vda", str(self._image), "raw", 1)]


@pytest.fixture
def began(tmp_path, monkeypatch):
    """(the home with a revert half-way, its intent, another home)."""
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(hostlock, "folder", lambda: locks)
    (tmp_path / "disk.raw").touch()
    first, second = Home(tmp_path / "the first"), Home(tmp_path / "second")
    for home in (first, second):
        home.create()
        write_json(home.instance_file, {})
    (second.path / "rewind.yaml").write_text(f"hook_directory: {tmp_path / 'hooks'}\n")
    disk = DiskIntent("vda", str(tmp_path / "disk.raw"), "raw", 1, MapRef(b"\1", 1), MapRef(b"", 1), "P", "O")
    intent = Intent(
        id="r1", domain="web", uuid=UUID, uri="qemu:///system", verb="revert", point="p1", safety_point="p2",
        timeline="t2", instant=False, was="running", rate=0, started=1.5, repository="{}", disks=(disk,),
    )  # fmt: skip
    return first, intents.save(first, intent.at(Phase.SWITCHED)), second


def session(home):
    return Session(home, settings_file=Path("/nonexistent"))


@pytest.mark.parametrize("known", ["hook", "link"])
@pytest.mark.parametrize("uuid", [UUID, "another"])
def test_a_disk_that_another_home_has_half_way_is_refused(began, tmp_path, known, uuid):
    """Its content is neither state, and that home's `resume` would write over whatever is done to it."""
    first, intent, second = began
    if known == "hook":
        fence.install(first, tmp_path / "hooks")
    else:
        neighbours.announce(first)
        neighbours.announce(first)
    with session(second) as mine:
        with pytest.raises(RevertUnderWay) as caught, mine.claim(Off(tmp_path / "disk.raw", uuid), "point web"):
            pass
        assert f"`rewind --home '{first.path}' resume web`" in caught.value.hint
        if uuid == UUID:
            with pytest.raises(RevertUnderWay):
                refuse_if_under_way(mine, uuid, "web")
        # The home that began it is not in its own way, and another guest in nobody's.
        with session(first) as own, own.claim(Off(tmp_path / "disk.raw", uuid), "resume web"):
            pass
        (tmp_path / "other.raw").touch()
        with mine.claim(Off(tmp_path / "other.raw", "third"), "point db"):
            pass
        intents.save(first, intent.at(Phase.DONE))
        with mine.claim(Off(tmp_path / "disk.raw", uuid), "point web"):
            pass
        refuse_if_under_way(mine, uuid, "web")


def test_a_revert_makes_its_home_known_before_it_begins(began, monkeypatch):
    first, intent, second = began
    monkeypatch.setattr(switching, "make_overlay", lambda *_: None)
    switching.Switching._announce(SimpleNamespace(_home=first), intent)
    with session(second) as mine, pytest.raises(RevertUnderWay):
        refuse_if_under_way(mine, UUID, "web")


def test_a_home_that_is_gone_or_cannot_be_read_is_in_nobodys_way(began, tmp_path):
    first, _intent, second = began
    neighbours.announce(first)
    (first.path / "reverts" / "other").mkdir()
    (first.path / "reverts" / "other" / "intent.json").write_text("no JSON")
    names = hostlock.names_of("third", ())
    neighbours.refuse_half_way(second, tmp_path / "hooks", names, "third", "db")
    first.path.rename(tmp_path / "away")
    neighbours.refuse_half_way(second, tmp_path / "hooks", hostlock.names_of(UUID, ()), UUID, "web")
