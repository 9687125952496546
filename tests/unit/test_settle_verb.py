"""`rewind image settle`: what a guest's report says, and when the boot medium goes. With a guest that boots:
tests/integration/test_image_settle.py."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from appliance.cli import main
from appliance.cli.settling import sizes_of
from appliance.cli.verbs.image.settled import settle_command
from appliance.config import Home, Settings
from appliance.errors import ConfigError, DomainNotFound, ImageError, NoSpace, NotSupported
from appliance.hypervisor.base import DomainState
from appliance.restore import hydrations
from appliance.service.image import settling, sizes
from appliance.service.image.sizes import Sizes
from appliance.service.image.starting import Running
from appliance.store import Repository
from appliance.store.backend.memory import MemoryBackend
from appliance.units import CHUNK
from images.room import free_in, refuse_without
from images.settle.choice import After, report_of, with_steps
from tests.support.guestdisk import debian
from tests.support.settling import plan
from tests.support.store import point, take

REPORT = """initramfs: the disk needs ahci
initramfs: done
loader: /dev/sda has GRUB in its first sector: it starts by itself
loader: nothing to do
settle: done
"""
XML = """<domain><name>twin</name><devices><disk type="file" device="disk"><source file="{folder}/twin-sda.qcow2"/>
<target dev="sda"/><boot order="2"/></disk><disk type="file" device="disk"><source file="{folder}/twin-sdb.qcow2"/>
<target dev="sdb"/></disk><disk type="file" device="cdrom"><source file="{folder}/rewind.iso"/>
<target dev="sdz"/><boot order="1"/></disk></devices></domain>"""


def test_a_report_is_told_step_by_step():
    found = settling.outcomes(REPORT)
    assert [(one.name, one.outcome) for one in found] == [("initramfs", "done"), ("loader", "nothing")]
    assert found[0].said == ("the disk needs ahci",)


def test_a_report_is_the_guests_and_may_say_anything():
    found = settling.outcomes("loader: \x1b[2Jdone\nloader: failed (1)\nno colon\n: \nx: left as it was\n")
    assert [(one.name, one.outcome) for one in found][:1] == [("loader", "failed")]
    assert "\x1b" not in repr([one.said for one in found]).encode().decode("unicode_escape")


def test_the_name_of_the_report_is_known_beforehand():
    _, settings = with_steps(plan(), After(settle=True), "seed")
    assert report_of(settings).startswith("settle-") and report_of(with_steps(plan(), After(), "seed")[1]) == ""
    assert report_of(with_steps(plan(), After(identity="new"), "seed")[1]) == ""
    # Of a phase that has steps, but nothing to make a disk start by itself.
    assert report_of(with_steps(plan(), After(grow=True), "seed")[1]) == ""


# --- the verb -------------------------------------------------------------------------------------------------------


class Host:
    """A libvirt of one domain."""

    def __init__(self, folder):
        self.xml, self.power = XML.format(folder=folder), DomainState.SHUTOFF

    def domain(self, _name):
        return self

    def state(self):
        return self.power

    def definition(self):
        return self.xml

    def change(self, edit):
        self.xml = edit(self.xml)


@pytest.fixture
def brought_up(tmp_path, monkeypatch, session):
    """A domain whose disk is a small Debian with this report; `state` is what is known of it."""

    def made(report, settles="settle-1", phase="done", suffix="", system="sda"):
        folder = tmp_path / "files"
        changes = {} if report is None else {f"/var/lib/rewind/settle-1{suffix}": report}
        debian(folder, changes)
        for disk in ("sda", "sdb"):
            (folder / f"twin-{disk}.qcow2").write_bytes(bytes(1 << 20))
        (folder / "disk.raw").rename(folder / f"twin-{system}.qcow2")
        # The name says what it is in the product; here a raw image is enough.
        monkeypatch.setattr(settling, "_FORMAT", "raw")
        disks = {"sda": "vda", "sdb": "vdb"}
        order = hydrations.Order("twin", "u", "test:///", "p", "{}", {}, disks, None, 0, str(folder), settles)
        left = () if phase == "done" else ("sda",)
        monkeypatch.setattr(settling, "running", lambda *_: Running("twin", "p", phase, 0, 0, left, ""))
        monkeypatch.setattr(settling.hydrations, "load", lambda *_: order)
        host = Host(folder)
        monkeypatch.setattr(session, "hypervisor_at", lambda *_: host, raising=False)
        return host

    return made


class FakeSession:
    def __init__(self, home):
        self.home, self.settings = home, Settings()


@pytest.fixture
def session(tmp_path):
    (tmp_path / "home/run").mkdir(parents=True)
    return FakeSession(Home(tmp_path / "home"))


def test_the_medium_is_taken_when_the_disk_starts_by_itself(brought_up, session):
    """P6-19."""
    host = brought_up(REPORT)
    found = settling.settle(session, "twin")
    assert found.alone and found.medium.name == "rewind.iso" and "rewind.iso" not in host.xml
    again = settling.settle(session, "twin")
    assert again.alone and again.steps == found.steps and again.medium is None


def test_a_medium_that_somebody_ejected_is_not_started_from(brought_up, session):
    """P6-19: the disk with the loader may have no place in the order."""
    host = brought_up(REPORT, system="sdb")
    host.xml = re.sub('<source file="[^"]*rewind.iso"/>', "", host.xml)
    found = settling.settle(session, "twin")
    assert found.alone and found.medium is None and "cdrom" not in host.xml
    first = ET.fromstring(host.xml).find("devices/disk/boot[@order='1']/..")
    assert first.find("target").get("dev") == "sdb"


@pytest.mark.parametrize("system", ["sda", "sdb"])
def test_it_starts_from_the_disk_with_the_loader(brought_up, session, system):
    """P6-19: a data disk may come before the one that holds /boot."""
    host = brought_up(REPORT, system=system)
    assert settling.settle(session, "twin").alone
    first = ET.fromstring(host.xml).find("devices/disk/boot[@order='1']/..")
    assert first.find("target").get("dev") == system


def test_a_definition_that_has_lost_the_disk_is_an_exit_code_of_the_verb(brought_up, session):
    host = brought_up(REPORT)
    host.xml = host.xml.replace('dev="sda"', 'dev="sdx"')
    with pytest.raises(NotSupported, match="has no disk 'sda' to start from"):
        settling.settle(session, "twin")
    assert NotSupported in settle_command.exit_classes


def test_a_system_on_several_disks_keeps_its_medium(brought_up, session, monkeypatch):
    host = brought_up(REPORT)
    before = host.xml
    monkeypatch.setattr(settling, "_read", lambda *_: (REPORT, True, ("sda", "sdb")))
    found = settling.settle(session, "twin")
    assert not found.alone and "its /boot lies on sda, sdb" in found.reason and not found.again
    assert [one.name for one in found.steps] == ["initramfs", "loader"] and host.xml == before


@pytest.mark.parametrize("line", ["left as it was", "failed (1)"])
def test_the_medium_stays_when_it_does_not(brought_up, session, line):
    """P6-19: and it is named."""
    host = brought_up(f"loader: the boot volume has to stay attached: no room\nloader: {line}\nsettle: done\n")
    before = host.xml
    found = settling.settle(session, "twin")
    assert not found.alone and found.medium.name == "rewind.iso" and host.xml == before


@pytest.mark.parametrize(("suffix", "last"), [("", "/var/lib/rewind/settle-1"), (".failed", "")])
def test_an_image_that_tries_nothing_again_is_known_by_its_report(brought_up, session, suffix, last):
    """P6-19: that of an older release took a start that had to leave something for the last one."""
    brought_up("loader: the boot volume has to stay attached: no GRUB\nloader: left as it was\n", suffix=suffix)
    found = settling.settle(session, "twin")
    assert not found.alone and (found.again, found.last) == (not last, last)


def test_a_step_that_failed_is_told_and_the_medium_stays(brought_up, session):
    """P6-19: also when the loader is there: the next start from the medium tries the other one again."""
    host = brought_up("grow: out of luck\ngrow: failed (1)\n" + REPORT, suffix=".failed")
    before = host.xml
    found = settling.settle(session, "twin")
    assert not found.alone and host.xml == before
    assert [(one.name, one.outcome) for one in found.steps] == [
        ("grow", "failed"), ("initramfs", "done"), ("loader", "nothing"),
    ]  # fmt: skip


def test_what_has_not_settled_is_refused(brought_up, session):
    brought_up(None)
    with pytest.raises(ImageError, match="has not settled yet"):
        settling.settle(session, "twin")


@pytest.mark.parametrize(
    ("options", "power", "words"),
    [
        ({"settles": ""}, DomainState.SHUTOFF, "was not started with --settle"),
        ({"phase": "pulling"}, DomainState.SHUTOFF, "still reads sda from the repository"),
        ({}, DomainState.RUNNING, "runs, so its disk cannot be read"),
    ],
)
def test_when_it_cannot_be_known(brought_up, session, options, power, words):
    host = brought_up(REPORT, **options)
    host.power, before = power, host.xml
    with pytest.raises(ConfigError, match=words) as told:
        settling.settle(session, "twin")
    assert host.xml == before and (power is DomainState.SHUTOFF or "virsh -c " in told.value.hint)


def test_a_domain_that_is_gone_has_nothing_to_settle(brought_up, session):
    brought_up(REPORT, phase="gone")
    with pytest.raises(DomainNotFound, match="no domain 'twin'") as told:
        settling.settle(session, "twin")
    assert "`rewind image forget twin`" in told.value.hint


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_are_told_by_disk():
    from click import BadParameter

    assert sizes_of(None, None, ("vda=2G", "vdb=512k")) == {"vda": 2 << 30, "vdb": 512 << 10}
    for wrong in ("vda", "vda=", "=2G", "vda=much"):
        with pytest.raises(BadParameter, match="is not DISK=BYTES"):
            sizes_of(None, None, (wrong,))
    with pytest.raises(ConfigError, match="the point has no disk 'vdb'"):
        Sizes([], {"vdb": 1 << 20})


def test_disks_that_could_not_be_filled_are_refused(tmp_path, monkeypatch):
    """What the point holds counts, not how large a disk seems; where all is sure to fit nothing is counted."""
    repo = Repository.create(MemoryBackend(tmp_path.name), cache=tmp_path / "cache", key=None)
    fit = Sizes(point("p", take(repo, "p", {0: 1, 3: 2, 9: 3})).disks, {})
    def begin(free, looked_at=repo):
        monkeypatch.setattr(sizes, "free_in", lambda _: free)
        monkeypatch.setattr("images.room.free_in", lambda _: free)
        fit.refuse_without_room(looked_at, tmp_path / "new", "twin")

    begin(3 * CHUNK)
    begin(100 * CHUNK, looked_at=None)
    with pytest.raises(NoSpace, match=r"\(128 KiB are free\) for 'the disks of twin, which take at least 192 KiB"):
        begin(2 * CHUNK)
    fit = Sizes(fit.disks, {"vda": 2 * CHUNK})
    begin(2 * CHUNK)


def test_room_is_that_of_the_folder_that_is_there(tmp_path):
    assert free_in(tmp_path / "not/yet") == free_in(tmp_path) > 0
    refuse_without(1, tmp_path / "not/yet", "a byte")
    assert free_in(Path("/proc/not/yet")) is None  # it counts no blocks, so it says nothing of room
    with pytest.raises(NoSpace):
        refuse_without(1 << 80, tmp_path / "not/yet", "more than there is")


DONE, FAILED = settling.StepDone("loader", "done", ()), settling.StepDone("grow", "failed", ("out of luck",))
TRIES = "each start from its boot medium tries again"


@pytest.mark.parametrize(
    ("reason", "medium", "again", "last", "words", "hint"),
    [
        ("", "rewind.iso", True, "", "rewind.iso is not needed any more", ""),
        ("", None, True, "", "no boot medium is attached", ""),
        ("grow failed in it", "rewind.iso", True, "", "rewind.iso stays attached", TRIES),
        ("grow failed in it", None, True, "", "twin has no boot medium", "attach the medium that"),
        ("its /boot lies on a, b", "rewind.iso", False, "", "rewind.iso stays attached", "`virsh edit twin`"),
        ("no loader", "rewind.iso", False, "/var/lib/x", "rewind.iso stays attached", "remove /var/lib/x in the guest"),
    ],
)
def test_it_says_whether_the_medium_is_needed(tmp_path, monkeypatch, capsys, reason, medium, again, last, words, hint):
    """P6-19: never that something else may go; a domain that still needs its medium is an exit code."""
    found = settling.Settled("twin", reason, (FAILED, DONE), medium and tmp_path / medium, again, last)
    monkeypatch.setattr(settling, "settle", lambda *_: found)
    assert main(["--home", str(tmp_path / "home"), "image", "settle", "twin"]) == (68 if reason else 0)
    out, err = capsys.readouterr()
    assert ("domain 'twin' has not settled: " + reason in err) is bool(reason)
    assert words in out.splitlines()[-1] and hint in err and "out of luck" in out
