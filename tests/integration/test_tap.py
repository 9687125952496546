"""Continuous capture by its verbs, on a live guest: what is promised of `protect --continuous` and `pause`."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest

from appliance.capture.quiesce import Level
from appliance.errors import DomainBusy, InGap
from appliance.hypervisor.base import DomainState
from appliance.model import Consistency
from appliance.service.instant import materialise
from appliance.service.protection import protect, unprotect
from appliance.service.tap import pause, paused_until, unpause
from appliance.timeline.instant import Start
from appliance.units import MiB
from tests.support import libvirt
from tests.support.tapped import Tapped
from tests.support.tiny import BareGuest, LibvirtGuest, TinyDisk, make_disk


@pytest.fixture(params=["qmp", "libvirt"])
def guest(request, tmp_path):
    """Two disks, one with an iothread, written to at 60 operations a second."""
    if request.param == "libvirt":
        request.getfixturevalue("libvirt_uri")
    folder = request.getfixturevalue("libvirt_images") if request.param == "libvirt" else tmp_path
    disks = [TinyDisk(make_disk(folder / f"{n}.qcow2", 64 * MiB), iothread=n == 0) for n in range(2)]
    kind = LibvirtGuest if request.param == "libvirt" else BareGuest
    with kind(folder, disks, name="tap", span=1 << 20) as found:
        found.boot()
        found.ask("start 60")
        yield found


def settled(tapped, more=20):
    """So many records more than now are confirmed; the number of one in the middle."""
    before = tapped.spans()[-1].last
    tapped.until(lambda: tapped.spans()[-1].last >= before + more, "nothing is recorded")
    return before + more // 2


@pytest.mark.timeout(60)
def test_every_write_can_be_reached_and_nothing_stays(guest):
    """P5-01, P5-02, P5-39: each instant is one over both disks; the guest sees no error; `unprotect` ends all of it."""
    with Tapped(guest) as tapped:
        tapped.protect()
        base = tapped.points()[-1]
        assert (base.reason, base.journal) == ("baseline", tapped.running.journal)
        tapped.exact(base)
        reached = [tapped.exact(tapped.at(f"#{base.sequence + step}")).seq for step in (1, 2, 7)]
        assert reached == sorted(reached)
        number = settled(tapped)
        tapped.exact(tapped.at(f"#{number}"))
        manual = tapped.point(label="by hand")
        assert manual.sequence > number
        tapped.exact(manual)
        stats = guest.ask("stats")
        assert stats["errors"] == 0
        with tapped.session() as session:
            unprotect(session, "tap", wait=20)
        assert tapped.running is None
        tapped.nothing_left()
        last = tapped.spans()[-1]
        assert last.reason_ended == "continuous capture was ended"
        assert [gap for gap in tapped.ledger().gaps() if gap.start >= last.end] == []
        assert guest.ask("stats")["errors"] == 0


@contextmanager
def stands_still(*_):
    """As if an agent had frozen the file systems: the state is of the freeze, whatever is written afterwards."""
    yield Level(Consistency.FILESYSTEM, ("frozen",))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("guest", ["qmp"], indirect=True)
def test_a_point_is_of_the_freeze(guest, monkeypatch):
    """P5-02, P5-05: with its place in the journal and as consistent as it says, while the guest writes on during the
    push; what the journal has up to that place is the same."""
    with Tapped(guest) as tapped:
        tapped.protect()
        guest.ask("start 0")
        settled(tapped)
        plain = tapped.point()
        monkeypatch.setattr("appliance.capture.work.frozen", stands_still)
        frozen = tapped.point()
        assert (plain.consistency, frozen.consistency) == (Consistency.CRASH, Consistency.FILESYSTEM)
        assert plain.sequence < frozen.sequence < tapped.running.control().status().last
        seen = [tapped.exact(one).seq for one in (plain, frozen)]
        assert seen[0] < seen[1]
        start = Start(plain.id, plain.journal, plain.sequence, plain.time, plain.timeline)
        with tapped.session() as session:
            again = materialise(session, tapped.uuid, start, frozen.sequence)
        assert again.id != frozen.id
        assert [disk.map.root for disk in again.disks] == [disk.map.root for disk in frozen.disks], "chunk by chunk"


@pytest.mark.timeout(60)
def test_a_pause_leaves_the_disks_alone_and_ends_by_itself(guest):
    """P5-31: nothing of ours is in the graph; what was written meanwhile is a gap with its reason."""
    with Tapped(guest) as tapped:
        tapped.protect()
        settled(tapped)
        spans = len(tapped.spans())
        with tapped.session() as session:
            # Counted from before it steps aside, which takes its time.
            made = pause(session, "tap", 8.0, wait=20)
            assert made.continuous and made.until > time.time()
            assert paused_until(tapped.home, tapped.uuid) is not None
        assert tapped.running.state == "paused"
        tapped.nothing_left()
        time.sleep(1)
        instant = time.time()
        tapped.attached(after=spans)
        assert paused_until(tapped.home, tapped.uuid) is None
        with pytest.raises(InGap, match="stepped aside"):
            tapped.at(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(instant)))
        tapped.exact(tapped.at(f"#{settled(tapped)}"))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("guest", ["qmp"], indirect=True)
def test_two_homes_do_not_take_each_others_tap(guest):
    """P5-31: the second one says for whom it waits, harms nothing when it is paused or ended, and begins after the
    first."""
    with Tapped(guest) as first, Tapped(guest) as second:
        first.protect()
        with second.session() as session:
            protect(session, "tap", continuous=True)
        second.until(lambda: second.running and "another home" in second.running.reason, "it does not wait")
        with second.session() as session, pytest.raises(DomainBusy, match="another home"):
            pause(session, "tap", 60)
        with second.session() as session:
            protect(session, "tap", continuous=False)
        settled(first)
        assert len(first.spans()) == 1 and first.spans()[-1].open
        with second.session() as session:
            protect(session, "tap", continuous=True)
        with first.session() as session:
            unprotect(session, "tap", wait=20)
        second.attached()
        second.exact(second.at(f"#{settled(second)}"))
        assert guest.ask("stats")["errors"] == 0


@pytest.mark.timeout(60)
def test_a_latency_budget_that_is_not_kept_ends_in_epochs(guest):
    """P5-42: the whole domain goes over, it is on record, and another budget brings it back at once."""
    with Tapped(guest) as tapped:
        tapped.protect()
        with tapped.session() as session:  # not from the start: it may be over before anything is confirmed
            protect(session, "tap", continuous=True, max_added_latency=1e-6)
        guest.ask("start 300")
        tapped.until(lambda: tapped.running.state == "epochs", "still attached")
        tapped.nothing_left()
        assert "are allowed" in tapped.running.reason
        events = [one for one in tapped.ledger().events() if one.kind == "latency"]
        assert len(events) == 1 and "dirty bitmaps" in events[0].detail
        assert "are allowed" in tapped.spans()[-1].reason_ended
        spans = len(tapped.spans())
        tapped.latency = 0
        tapped.protect()
        tapped.attached(after=spans)
        tapped.exact(tapped.at(f"#{settled(tapped)}"))


@pytest.mark.timeout(110)
def test_it_goes_on_after_whatever_its_admin_does(libvirt_images):
    """P5-23, P5-31: resize, commit, hotplug, save and restore, a restart: each a gap with its reason and a new
    baseline that is exact; what needs no gap makes none."""
    disks = [TinyDisk(make_disk(libvirt_images / f"{n}.qcow2", 64 * MiB)) for n in range(2)]
    with LibvirtGuest(libvirt_images, disks, name="tap", span=1 << 20, durable=True) as guest:
        guest.boot()
        guest.ask("start 60")
        with Tapped(guest) as tapped:
            tapped.protect()

            def new_span(before, reason=None):
                tapped.attached(after=before)
                ended = tapped.spans()[-2]
                assert reason is None or reason in ended.reason_ended, ended
                tapped.exact(tapped.at(f"#{settled(tapped)}"))
                return len(tapped.spans())

            # The admin wants the graph for himself.
            with tapped.session() as session:
                pause(session, "tap", wait=20)
            libvirt.virsh("blockresize", "tap", "vda", "80M")
            copy = libvirt_images / "copy.qcow2"
            libvirt.virsh(
                "blockcopy", "tap", "vdb", str(copy), "--transient-job", "--wait", "--pivot", "--format", "qcow2"
            )
            with tapped.session() as session:
                unpause(session, "tap")
            spans = new_span(1, "stepped aside")
            assert tapped.points()[-1].disk("vda").size == 80 * MiB

            # The domain is saved and restored.
            file = libvirt_images / "saved"
            libvirt.virsh("save", "tap", str(file))
            tapped.until(lambda: tapped.running.state == "waiting", "not noticed")
            libvirt.virsh("restore", str(file))
            spans = new_span(spans, "shut off")

            # A disk comes, and goes.
            made = make_disk(libvirt_images / "new.qcow2", 8 * MiB)
            libvirt.virsh("attach-disk", "tap", str(made), "vdc", "--subdriver", "qcow2", "--targetbus", "virtio")
            spans = new_span(spans, "vdc was attached")
            assert {disk.disk for disk in tapped.points()[-1].disks} >= {"vda", "vdb", "vdc"}
            libvirt.virsh("detach-disk", "tap", "vdc")
            spans = new_span(spans, "vdc was detached")

            # Neither a restart of libvirt nor a reboot is a reason to lose anything.
            libvirt.stop()
            libvirt.start()
            settled(tapped)
            assert len(tapped.spans()) == spans
            with tapped.session() as session:
                assert session.hypervisor().domain("tap").state() is DomainState.RUNNING
