"""B3: QEMU dies, everything dies, the power is cut: of what the guest was told is written nothing older than the commit
bound is lost, the domain is captured again by itself, and what was missed is told (P5-01, P5-31, P5-42).

The guest's writers stamp what they write with a number, and tell the number of the last write that they were told has
ended. It is asked for all the time; what was told before the bound must be in what is recovered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from appliance.journal import Journal
from appliance.process import wait_gone
from appliance.units import MiB
from tests.support.powercut import PowerDisk
from tests.support.tapped import Tapped
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

_COUNT = int(os.environ.get("REWIND_CUTS", "20"))
_COMMIT = 0.2
# The fsync after the bound, and on a host that does other things too, the wait for a processor.
_FSYNC = float(os.environ.get("REWIND_FSYNC_SECONDS", "0.3"))
# What the ledger claims was also seen: a look each half second, confirmed by the next one, on a host that does other
# things too. What it does not claim yet is there all the same, and held to the bound.
_LOOK = float(os.environ.get("REWIND_LOOK_SECONDS", "3.0"))


@dataclass(frozen=True)
class Heard:
    """At that time the guest said that these were the last writes of its writers that had ended."""

    time: datetime
    seq: tuple[int, ...]


class Loss:
    """A guest whose disks, whose home and whose journal are on one disk, and how they die."""

    def __init__(self, guest, tapped, disk):
        self.guest, self.tapped, self.disk = guest, tapped, disk
        self.figures: list[tuple[str, float, float]] = []

    def bound(self):
        """What is older than this must be there: the commit bound, and the fsync after it, which on this disk may take
        twice as long as the longest of this journal so far."""
        longest = self.tapped.running.control().stats()["fsync_longest_us"] / 1e6
        return _COMMIT + max(_FSYNC, 2 * longest)

    def listen(self):
        """Ask all the time; the answers. Until there are enough of them that are older than any bound."""
        heard, begun = [], time.monotonic()
        while time.monotonic() < begun + self.bound() + _LOOK + 2.5:
            seq = tuple(self.guest.ask("stats")["seq"])
            heard.append(Heard(datetime.now(UTC), seq))
            time.sleep(0.01)
        return heard

    def die(self, name):
        """The time of it. QEMU alone, all processes at once, or the power: what they do after that is in vain."""
        running, qemu = self.tapped.running, self.guest.pid
        ours = [int(key.partition(":")[0]) for key in (running.server, running.process)]
        if name == "power":
            self.disk.prepare()
        died = datetime.now(UTC)
        if name == "power":
            self.disk.cut()
        for pid in [qemu] if name == "qemu" else [qemu, *ours]:
            os.kill(pid, signal.SIGKILL)
        return died

    def suffer(self, name):
        tapped, before = self.tapped, self.tapped.spans()
        tapped.until(lambda: tapped.spans()[-1].last > before[-1].bases[-1].sequence + 100, "nothing is recorded")
        running, pid = tapped.running, self.guest.pid
        heard = self.listen()
        bound = self.bound()
        died = self.die(name)
        if name == "qemu":
            tapped.until(lambda: not (tapped.running and tapped.running.attached), "not noticed", 20)
        else:
            assert wait_gone(running.process, 10) and wait_gone(running.server, 10)
        self._wait_dead(pid)
        if name == "power":
            self.disk.restart()
        self._recovered(name, heard, died, bound)
        self._captured_again(name, before, died)

    def _wait_dead(self, pid):
        limit = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < limit
            time.sleep(0.02)
        self.guest.kill()

    def _recovered(self, name, heard, died, bound):
        """What is on the disk, before anybody of ours has looked: all of the journal, and what the ledger claims."""
        tapped = self.tapped
        with Journal(tapped.home.spool(tapped.uuid)) as journal:
            assert journal.holes() == []
            newest = journal.last
            *_, record = journal.records(max(1, newest - 3))
        span = tapped.spans()[-1]
        assert newest >= span.last, "the ledger claims what is not there"
        age = (died - _moment(record.wall_ns)).total_seconds()
        claimed = (died - span.end).total_seconds()
        self.figures.append((name, age, claimed))
        words = f"newest durable record {age * 1000:.0f} ms old, claimed until {claimed * 1000:.0f} ms"
        print(f"{name}: {words}, bound {bound * 1000:.0f} ms", flush=True)
        self._holds(tapped.at(f"#{newest}?"), heard, died, bound)
        self._holds(tapped.at(f"#{span.last}"), heard, died, bound + _LOOK)

    def _holds(self, point, heard, died, bound):
        state = self.tapped.exact(point)
        due = [one for one in heard if (died - one.time).total_seconds() >= bound]
        assert len(due) > 3
        lost = [wanted - found for wanted, found in zip(due[-1].seq, state.seq, strict=True)]
        assert max(lost) <= 0, (f"told {bound:.1f} s before", due[-1].seq, state.seq)

    def _captured_again(self, name, before, died):
        tapped = self.tapped
        if tapped.running is None:
            tapped.ensure()
        self.guest.boot()
        self.guest.ask("start 200")
        tapped.attached(after=len(before), timeout=60)
        gap = next(one for one in tapped.ledger().gaps() if one.start <= died < one.end)
        assert gap.reason, gap
        base = next(one for one in reversed(tapped.points()) if one.sequence is not None and one.reason == "baseline")
        assert not any("full" in note for note in base.notes), base.notes
        assert base.stats.moved_bytes < 16 * MiB, base.stats
        tapped.exact(base)
        print(f"    gap of {(gap.end - gap.start).total_seconds():.1f} s: {gap.reason}; {base.notes}", flush=True)


def _moment(wall_ns):
    return datetime.fromtimestamp(wall_ns / 1e9, UTC)


@contextlib.contextmanager
def scene(folder):
    disk = PowerDisk(folder / "power.img", folder / "p", 700)
    try:
        disk.folder.chmod(0o755)
        disks = [TinyDisk(make_disk(disk.folder / f"{number}.qcow2", 64 * MiB)) for number in range(2)]
        with LibvirtGuest(folder, disks, name="cut", span=1 << 20, durable=True) as guest:
            guest.boot()
            with Tapped(guest, home=disk.folder / "h", journal_segment_age=1.0) as tapped:
                guest.ask("start 200")
                tapped.protect()
                yield Loss(guest, tapped, disk)
    finally:
        disk.close()


@pytest.mark.timeout(150)
def test_nothing_older_than_the_commit_bound_is_lost(libvirt_images):
    """P5-31, P5-42, B3: QEMU alone, all processes at once, the power."""
    with scene(libvirt_images) as found:
        for name in ("power", "qemu", "everything"):
            found.suffer(name)


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_the_power_is_cut_again_and_again(libvirt_images):
    """P5-31, P5-42, B3. `REWIND_CUTS` says how often."""
    with scene(libvirt_images) as found:
        for number in range(_COUNT):
            found.suffer(("power", "everything", "power", "qemu")[number % 4])
        for name in ("power", "qemu", "everything"):
            ages = sorted(age for one, age, _ in found.figures if one == name)
            claimed = sorted(age for one, _, age in found.figures if one == name)
            print(f"{name}: newest record {ages[-1]:.3f} s, claimed {claimed[-1]:.3f} s at most, of {len(ages)}")
