"""`History` under continuous capture by the real verbs and the real tap process, and what is known of every record.

A guest does not write while it stands still, and `qemu-io` would: whoever writes here holds the domain's lock, so that
nobody pauses the guest for a point or a tap meanwhile. Everything else is as in `history`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from appliance.capture import tap
from appliance.errors import JournalError
from appliance.hypervisor.graph import base
from appliance.process import lives, wait_gone
from appliance.restore import intent, keeper
from appliance.service import locks, protection
from appliance.service import tap as verbs
from appliance.service.instant import resolve
from appliance.timeline.view import DiskView
from tests.support.history import History, difference, same
from tests.support.limits import limit
from tests.support.taptale import Packed, Tale

__all__ = ["TappedHistory"]

_TICK = timedelta(microseconds=1)


class TappedHistory(History):
    """`made` are points of the journal, which may go again; `asked` is what each `--to` of a revert must lead to."""

    def __init__(self, folder: Path, seed: int, sizes: dict[str, int], *, iothread: bool = False):
        self.tale = Tale()
        self.made: set[str] = set()
        self.asked: dict[str, Packed] = {}
        self.child: int | None = None  # the revert that has the lock while the guest writes
        self.looked = self.unseen = 0
        self.tails: set[str] = set()  # spans before which this was looked for
        super().__init__(folder, seed, sizes, iothread=iothread)
        # A disk of the host that stands still for a moment shall not end a span; one that hangs is found all the same.
        (self.home.path / "rewind.yaml").write_text("journal_stall: 2.0\n")
        self.tale.became(self.model)
        self.protect()

    def protect(self) -> None:
        with self.session() as session:
            protection.protect(session, self.name, continuous=True, wait=30)
        self.await_attached()

    def end(self) -> None:
        """Nothing of this history runs afterwards."""
        running, known = tap.current(self.home, self.uuid), keeper.state(self.home, self.uuid)
        for key in [running.process if running else "", known.get("key", ""), known.get("view", "")]:
            if key and lives(key):
                os.kill(int(key.partition(":")[0]), signal.SIGKILL)
        self.kill()

    # --- the tap ---

    def running(self) -> tap.Running | None:
        return tap.current(self.home, self.uuid)

    def ledger(self):
        return tap.ledger_of(self.home, self.uuid)

    def ensure(self) -> None:
        """What the daemon does."""
        with self.session() as session:
            verbs.ensure(session, session.protected(self.name))

    def await_attached(self, timeout: float = 60.0) -> None:
        """Until writes are recorded and there is a point to count from. Impatient: a lost tap is not waited for longer
        and longer."""
        limit, asked = time.monotonic() + timeout, 0.0
        while True:
            if self.running() is None:
                self.ensure()
            running, spans = self.running(), self.ledger().spans()
            if running and running.attached and spans and spans[-1].open and spans[-1].since:
                break
            if running and running.state == "waiting" and time.monotonic() > asked + 0.5:
                asked = time.monotonic()
                os.kill(int(running.process.partition(":")[0]), signal.SIGUSR1)
            assert time.monotonic() < limit, f"{self.words()}\nno tap: {running} {spans[-2:]}"
            time.sleep(0.05)
        self.adopt_all()

    def last(self) -> int | None:
        """The newest number; None when nothing is recorded."""
        running = self.running()
        if running is None or not running.attached:
            return None
        with contextlib.suppress(JournalError):
            return running.control().status().last
        return None

    def strike(self, victim: str) -> None:
        """SIGKILL the tap process or the journal, or stop the journal: the watchdog has to find that."""
        running = self.running()
        if running is None:
            return
        key = running.process if victim == "tap" else running.server
        if key and lives(key):
            os.kill(int(key.partition(":")[0]), signal.SIGSTOP if victim == "hang" else signal.SIGKILL)
            if victim != "hang":
                wait_gone(key, 10)

    def start(self) -> None:
        """Also tells why QEMU does not."""
        try:
            super().start()
        except OSError as error:
            raise AssertionError(f"{self.words()}\nQEMU does not start: {error}") from error

    def words(self) -> str:
        """Also the last that the tap process said."""
        log = self.home.log / f"tap-{self.uuid}.log"
        return super().words() + "\nTAP: " + (log.read_text()[-4000:] if log.exists() else "nothing")

    # --- what a guest does ---

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """The guest runs, and nobody stops it in the block."""
        limit = time.monotonic() + 60
        while True:
            with locks.hold(self.home, self.uuid, self.name, "let the guest write", 60, lambda _: None):
                if self.machine.monitor.execute("query-status")["running"]:
                    yield
                    return
            assert time.monotonic() < limit, f"{self.words()}\nthe guest stands still"
            time.sleep(0.02)

    def burst(self, steps: int) -> None:
        """Writes of every kind, some of them in a gap."""
        while steps > 0:
            some = min(steps, self.random.randrange(1, 12))
            with self.quiet():
                for _ in range(some):
                    self.random.choices([self.write, self.zero, self.discard], [16, 3, 1])[0]()
            steps -= some
            time.sleep(0.03)

    def write(self) -> None:
        target = self.random.choice(list(self.model))
        self._put(target, *self.place(target, 96 << 10), self.random.randrange(1, 256))

    def zero_range(self, target: str, offset: int, length: int) -> None:
        self._put(target, offset, length, 0)

    def zero(self) -> None:
        target = self.random.choice(list(self.model))
        self._put(target, *self.place(target, 256 << 10), 0)

    def _put(self, target: str, offset: int, length: int, byte: int) -> None:
        before = self.last()
        if byte or self.iothread:
            # qemu-io writes zeroes without data from the main thread only, or QEMU ends by an assertion.
            self.machine.write(target, self.model[target], offset, length, byte)
        else:
            self.machine.zero(target, self.model[target], offset, length)
        self.tale.wrote(target, offset, length, byte)
        after = self.last()
        if before is not None and after is not None and after > before:
            self.tale.number(after)

    def _write_quietly(self) -> bool:
        """Only as long as the revert has the domain: whoever has it next may stop the guest for a point."""
        try:
            holder = json.loads((self.home.domains / f"{self.uuid}.lock").read_text() or "{}").get("pid")
        except ValueError:
            return True
        return holder != self.child or super()._write_quietly()

    def grow(self) -> None:
        """With the graph to himself; until the tap is back nobody takes a point."""
        self.paused(self._grown)

    def _grown(self) -> None:
        super().grow()
        self.tale.became(self.model)

    # --- what an admin does ---

    def paused(self, work=None) -> None:
        """`rewind pause`, for as long as `work` takes."""
        with self.session() as session:
            verbs.pause(session, self.name, wait=30)
        assert not base.leftovers(self.machine.monitor), base.leftovers(self.machine.monitor)
        try:
            (work or (lambda: self.burst(5)))()
        finally:
            with self.session() as session:
                verbs.unpause(session, self.name)
        self.await_attached()

    def begun_anew(self) -> None:
        """Continuous capture is given up and asked for again."""
        with self.session() as session:
            protection.unprotect(session, self.name, wait=30)
            assert not base.leftovers(self.machine.monitor), base.leftovers(self.machine.monitor)
        self.burst(5)
        self.protect()

    def _disturbed(self) -> bool:
        nodes = self.machine.monitor.execute("query-named-block-nodes", flat=True)
        ours = any(node["node-name"].startswith("rw-") and not node["node-name"].startswith("rw-tp") for node in nodes)
        return ours or not self.machine.monitor.execute("query-status")["running"]

    # --- what is known ---

    def now(self) -> Mapping[str, bytes]:
        return Packed(self.model)

    def _become(self, content: Mapping[str, bytes]) -> None:
        """A revert has switched, after its safety point and before everything else."""
        super()._become(content)
        last, switched = intent.load(self.home, self.uuid), self.tale.steps[-1].time
        if last is not None and last.safety_point:
            with self.session() as session:
                switched = max(switched, session.repository.point(last.safety_point).time + _TICK)
        self.tale.became(self.model, switched)

    def wanted(self, point_id: str) -> dict[str, bytes]:
        then = self.asked.get(point_id) or self.points[point_id]
        return {target: then[target].ljust(len(content), b"\0") for target, content in self.model.items()}

    def adopt(self, content: Mapping[str, bytes]) -> None:
        self.adopt_all()

    def adopt_all(self) -> None:
        """Points that others made: what they hold follows from their time, or from their number in the journal."""
        with self.session() as session:
            listed = session.catalogue.points(self.uuid, measure=False)
        for one in listed:
            if one.id in self.points or one.id in self.made:
                continue
            if one.reason in ("journal", "unseen"):
                self.made.add(one.id)
                continue
            length = self.tale.at(one.time)
            self.note(f"found {one.id} {one.reason} of {one.time} #{one.sequence}, after {length} steps")
            self.points[one.id] = Packed(self.tale.state(length))

    def reachable(self) -> list[int]:
        """Known numbers of which the ledger says that they can be reached, of all branches."""
        listed, spans, found = set(self.listed()), self.ledger().spans(), []
        for number in self.tale.numbers:
            for span in spans:
                if any(one.point in listed for one in span.usable(number)):
                    # The first one of a span may be the last one of the span before, in another state.
                    found += [number] if span.first < number else []
                    break
        return found

    def target(self) -> str:
        """A point, a record or a time of any branch."""
        numbers = self.reachable()
        how = self.random.choices(["point", "number", "time"], [4, 4, 2])[0]
        if how == "point" or not numbers:
            return super().target()
        number = self.random.choice(numbers)
        length = self.tale.numbers[number]
        text = f"#{number}"
        if how == "time" and (found := self._time(length)):
            text = found
        self.asked[text] = Packed(self.tale.state(length))
        self.note(f"{text} is #{number} after {length} steps")
        return text

    def _time(self, length: int) -> str:
        """A time at which just these steps were done; empty when the ledger has none."""
        moment: datetime = self.tale.steps[length - 1].time
        if self.tale.at(moment) != length:
            return ""
        span = next((one for one in self.ledger().spans() if one.since and one.since <= moment <= one.end), None)
        return moment.isoformat() if span else ""

    def look_at_unseen(self) -> None:
        """What was recorded behind the end of the last span is no part of it, and right all the same: here nothing but
        death ends a mirror."""
        spans = self.ledger().spans()
        if len(spans) < 2 or spans[-1].branched or spans[-1].id in self.tails:
            return
        self.tails.add(spans[-1].id)
        if any(one.sequence == spans[-2].last for one in self.ledger().branches()):
            return  # refused: it may have been reverted before what was recorded there, or after
        tail = [one for one in self.tale.numbers if spans[-2].last < one <= spans[-1].first]
        if tail and set(spans[-2].base_points) & set(self.listed()):
            self.check_number(max(tail), "?")
            self.unseen += 1

    def check_number(self, number: int, mark: str = "") -> None:
        """Whatever was recorded reads back, also of a branch that was left."""
        state = self.tale.state(self.tale.numbers[number])
        with self.session() as session:
            point = resolve(session, self.name, f"#{number}{mark}")
            for target, content in state.items():
                got = whole(session, point.disk(target))
                wrong = difference(got, content)
                assert same(got, content), f"{self.words()}\n#{number} ({point.id}): {target} differs in {wrong}"
        self.looked += 1

    def look(self) -> None:
        numbers = self.reachable()
        for number in self.random.sample(numbers, min(3, len(numbers))):
            self.check_number(number)

    def check_confirmed(self) -> None:
        """What was recorded for a while can be reached: the last number, while the tap runs."""
        newest = max(self.tale.numbers)
        end = time.monotonic() + limit(10)
        while newest not in self.reachable():
            assert time.monotonic() < end, f"{self.words()}\n#{newest} is not confirmed: {self.ledger().spans()[-2:]}"
            time.sleep(0.2)

    def check_all_points(self) -> None:
        self.adopt_all()
        super().check_all_points()

    # --- reverts ---

    def command(self, *words: str):
        made = super().command(*words)
        self.child = made.pid
        return made

    def revert(self, *, undo: bool = False, kill: str = "") -> str:
        found = super().revert(undo=undo, kill=kill)
        self.adopt_all()
        return found

    def _kill(self, child, kill: str) -> None:
        for victim in ("tap", "journal", "hang"):
            if victim in kill or (kill == "all" and victim == "tap"):
                self.strike(victim)
        super()._kill(child, kill)
        if kill in ("tap", "journal", "hang"):
            # A revert needs none of them.
            assert self.exit == 0, f"revert failed with {self.exit}: {self.words()}"

    def _resumed(self, before: Mapping[str, bytes], point_id: str) -> str:
        """As there, but told before anybody may take a point of the new life."""
        found = self._ended(before, point_id)
        self.start()
        return found


def whole(session, disk) -> bytes:
    """All bytes of a disk of a point."""
    view = DiskView(session.repository, disk.map, 8 << 20)
    return b"".join(view.pread(at, min(1 << 20, disk.size - at)) for at in range(0, disk.size, 1 << 20))
