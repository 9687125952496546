"""More writes than can be made into points: the spool stays within its limit, and it gets coarser as it was announced.

    1  the spool forgets what was shipped     2  a point for each 5 minutes, for each hour     3  epochs, and a gap

The guest writes as fast as it can to random places, the worst there is: each write costs a chunk. Shipping, points and
the guest share the processors.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field

import pytest

from appliance.errors import JournalError
from appliance.units import MiB
from tests.support.tapped import Tapped
from tests.support.tiny import LibvirtGuest, TinyDisk, make_disk

_SECONDS = float(os.environ.get("REWIND_SECONDS", "240"))
_LIMIT = int(os.environ.get("REWIND_SPOOL_MIB", "192")) * MiB


@dataclass
class Watch:
    """Looks at the spool, at what the tap process says and at how coarse it is, until it is ended."""

    tapped: Tapped
    largest: int = 0
    states: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self):
        spool = self.tapped.home.spool(self.tapped.uuid)
        while not self.over.wait(0.5):
            used = 0
            for path in [*spool.glob("*.rwj"), *spool.glob("*.open")]:
                try:
                    used += path.stat().st_size
                except FileNotFoundError:
                    continue  # forgotten meanwhile
            self.largest = max(self.largest, used)
            self.shares.append(used / _LIMIT)
            running = self.tapped.running
            state = running.state if running else "dead"
            if self.states[-1:] != [state]:
                self.states.append(state)

    def __enter__(self):
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self._thread.join(10)


def level(tapped):
    """[seconds between two points, whether the spool forgets what is young]"""
    return json.loads((tapped.home.run(tapped.uuid) / "tiers.json").read_text()).get("level", [60, False])


def recorded(tapped):
    try:
        return tapped.running.control().status().last
    except JournalError:
        return 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_writes_without_end_do_not_fill_the_host(libvirt_images):
    """P5-28, P5-29: bounded, in the announced order, told in the ledger, and over when the guest is."""
    disks = [TinyDisk(make_disk(libvirt_images / f"{i}.qcow2", 128 * MiB)) for i in range(2)]
    with LibvirtGuest(libvirt_images, disks, name="storm", span=32 * MiB) as guest:
        guest.boot()
        with Tapped(guest, journal_spool_limit=_LIMIT) as tapped:
            tapped.protect()
            first, begun = recorded(tapped), time.monotonic()
            with Watch(tapped) as watch:
                guest.ask("start 0", timeout=120)
                time.sleep(_SECONDS)
                told = guest.ask("stats", timeout=120)
                written, took = recorded(tapped) - first, time.monotonic() - begun
                busiest, during = max(watch.shares), tapped.ledger().events()
                guest.ask("stop", timeout=120)
                tapped.until(lambda: level(tapped) == [60, False], "it stays coarse", 300)
                tapped.until(lambda: tapped.running.attached, "it does not record", 120)
                calm = time.monotonic()
                tapped.until(lambda: any(one.reason == "journal" for one in tapped.points()), "no point is made", 600)
                calm = time.monotonic() - calm
            events = tapped.ledger().events()
            gaps = [gap for gap in tapped.ledger().gaps() if gap.start >= tapped.spans()[0].since]
            print(
                f"{written} writes in {took:.0f} s ({written / took:.0f} a second); the spool at most {busiest:.0%} of "
                f"{_LIMIT >> 20} MiB; {watch.states}; {len(tapped.points())} points, the first of a "
                f"minute {calm:.0f} s after the storm\n"
                + "\n".join(f"  {one.time:%H:%M:%S} {one.kind}: {one.detail}" for one in events)
                + "".join(f"\n  gap {gap.start:%H:%M:%S} to {gap.end:%H:%M:%S}: {gap.reason}" for gap in gaps)
            )
            print("\n".join(line for line in tapped.log.splitlines() if "WARNING" in line or "ERROR" in line))
            assert not told["errors"], told
            # Room that is promised to the segment under way is counted in steps.
            assert watch.largest <= _LIMIT + MiB, watch.largest
            tiers = [one for one in during if one.kind == "tiers"]
            if busiest > 0.75:
                assert tiers and "of the journal only" in tiers[0].detail
            if gaps:
                assert tiers and tiers[0].time < gaps[0].start
                assert all(gap.reason for gap in gaps)
            assert tapped.spans()[-1].open
            tapped.exact(tapped.at(f"#{tapped.spans()[-1].last}"))
