"""The host of a guest under continuous capture is lost: a new home gets back what was shipped, exact, seconds old."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from appliance.config import Home
from appliance.errors import InGap
from appliance.process import wait_gone
from appliance.service.setup import init
from appliance.store.check import check
from appliance.units import MiB
from tests.support.tapped import Tapped
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

# A seal each second, a look each second, a pass each second; the rest is a busy test machine.
_FAR_SECONDS = 20.0


def lose(tapped, folder):
    """The tap process dies, and of the home nothing is left but a copy of repository and key; the time of the loss."""
    process = tapped.running.process
    os.kill(int(process.partition(":")[0]), signal.SIGKILL)
    lost = datetime.now(UTC)
    assert wait_gone(process, 10)  # or it would go on in the folder that is copied
    shutil.copytree(tapped.home.path / "repository", folder / "repository")
    shutil.copy(tapped.home.key_file, folder / "key")
    tapped.home = Home(Path(tempfile.mkdtemp(prefix="rw-")) / "h")
    with tapped.session() as session:
        assert not init(session, str(folder / "repository"), key_file=folder / "key").created
    return lost


def shipped(tapped, number):
    """Whether the repository has more than three segments, and records beyond that one."""
    with tapped.session() as session:
        found = [ref.last for ref in session.repository.segments()]
    return len(found) > 3 and max(found) > number


@pytest.mark.timeout(150)
def test_a_lost_host_costs_seconds(libvirt_images):
    """P5-30, P5-31, P5-33: two disks; any shipped write and the newest one are exact over both."""
    disks = [TinyDisk(make_disk(libvirt_images / f"{i}.qcow2", 64 * MiB)) for i in range(2)]
    with LibvirtGuest(libvirt_images, disks, name="losing", span=1 << 20) as guest:
        guest.boot()
        with Tapped(guest, journal_segment_age=1.0) as tapped:
            guest.ask("start 60")
            tapped.protect()
            base = tapped.spans()[-1].bases[-1]
            tapped.until(lambda: tapped.spans()[-1].last > base.sequence + 200, "nothing is recorded")
            tapped.until(lambda: shipped(tapped, base.sequence + 100), "nothing is shipped")
            far = tapped.spans()[-1].last
            lost = lose(tapped, libvirt_images)
            (span,) = tapped.spans()
            assert base.sequence + 100 < span.last
            with tapped.session() as session:
                report = check(session.repository, read_data=True)
                assert report.ok, report
                assert report.segments > 3
            newest = tapped.at(f"#{span.last}")
            assert newest.sequence == span.last
            tapped.exact(newest)
            tapped.exact(tapped.at(f"#{(base.sequence + span.last) // 2}"))
            with pytest.raises(InGap):
                tapped.at(f"#{span.last + 1}")
            behind = (lost - newest.time).total_seconds()
            print(f"{behind:.2f} s and {far - span.last} of {far} writes were lost with the host")
            assert behind < _FAR_SECONDS
            # Before the first point; the time since the loss is none, because nobody captures here.
            assert [gap.end for gap in tapped.ledger().gaps()] == [span.since]
