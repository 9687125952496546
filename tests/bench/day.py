"""A day of continuous capture in minutes, by a clock of its own; every part but QEMU and nbdkit is the real one.

    trace ─► segments in the spool ─► shipped ─► points of the minutes ─► what they stand for is forgotten, also there
                                                          └─► any instant: from a new session to its first bytes by NBD

The trace is that of a small busy server: commits of a database to a hot range, its log, metadata of a file system, and
a large file each hour; more by day than by night. Each 4 KiB of it names the write that it belongs to, so what is read
at an instant is held against the trace.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from appliance import nbd
from appliance.capture.ship import Shipper, retire
from appliance.config import Home
from appliance.journal import Journal
from appliance.model import DiskPoint, MapRef, Point
from appliance.service import Session, setup, tiers
from appliance.service.elsewhere import export
from appliance.store.mapbuild import build
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK, GiB, KiB, MiB
from tests.support.journal import SECOND, Scribe

__all__ = ["tap_day"]

UUID = "8d0a4f0e-6f0c-4d8e-9d6e-0000000da100"
SIZE = 8 * GiB
_BLOCK = 4096
_STAMP = struct.Struct("<QQ")
_HOT, _LOG, _META, _FILES = 0, 2 * GiB, 3 * GiB, 4 * GiB
_SEAL = 5
_FILE = 32 * MiB


@dataclass(frozen=True, slots=True)
class Write:
    """A write of the trace; `second` within its minute."""

    second: float
    offset: int
    length: int


def minute_of(number: int) -> list[Write]:
    """The writes of that minute, in order. The same whenever it is asked for."""
    dice = random.Random(number)
    busy = 1.0 if 8 <= number // 60 % 24 < 18 else 0.3
    found = []
    for _ in range(int(90 * busy)):
        # A few pages get most of the writes.
        page = int((SIZE // 8 // 8192) * dice.random() ** 4)
        found.append(Write(dice.uniform(0, 60), _HOT + page * 8192, 8192))
    log = _LOG + number * 60 * 16 * KiB % (512 * MiB)
    for second in range(0, 60, 1 if busy == 1 else 3):
        found.append(Write(second + dice.random() * 0.5, log + second * 16 * KiB, 16 * KiB))
    for second in range(0, 60, 5):
        found += [Write(second + 0.7 + n / 100, _META + dice.randrange(4096) * _BLOCK, _BLOCK) for n in range(4)]
    if number % 60 == 17:
        begin = _FILES + number // 60 * _FILE
        found += [Write(20 + n / 10, begin + n * MiB, MiB) for n in range(_FILE // MiB)]
    return sorted(found, key=lambda write: write.second)


class Filler:
    """Content that packs to about a half, and says in each block which write it is of."""

    def __init__(self) -> None:
        dice = random.Random(0)
        self._pool = b"".join(dice.randbytes(32) + bytes(32) for _ in range(2 * MiB // 64))

    def __call__(self, sequence: int, write: Write) -> bytes:
        begin = sequence * 4160 % MiB
        data = bytearray(self._pool[begin : begin + write.length])
        for at in range(0, write.length, _BLOCK):
            _STAMP.pack_into(data, at, sequence, write.offset + at)
        return bytes(data)


class Spool:
    """What the journal's process answers to tiers: it deletes what it is told to."""

    def __init__(self, folder: Path, journal: str, limit: int) -> None:
        self.folder, self.limit, self.fields = folder, limit, {"journal": journal}
        self.largest = 0

    def status(self) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in self.folder.iterdir())
        self.largest = max(self.largest, used)
        return SimpleNamespace(bytes=used, limit=self.limit, fields=self.fields)

    def forget(self, upto: int) -> int:
        freed = 0
        with Journal(self.folder) as journal:
            for part in journal.parts:
                if part.sealed and part.last <= upto:
                    freed += part.path.stat().st_size
                    part.path.unlink()
        return freed


class Day:
    """The process that captures and tends, from `begin` on; a minute at a time."""

    def __init__(self, folder: Path, begin: datetime) -> None:
        self.home = Home(folder / "home")
        self.begin = begin
        self.session = Session(self.home, "test:///", settings_file=folder / "none.yaml")
        setup.init(self.session, None)
        spool = self.home.spool(UUID)
        spool.mkdir(parents=True)
        self.scribe = Scribe(spool, {"vda": SIZE}, wall=_ns(begin))
        self.journal = self.scribe.journal.hex()
        self.ledger = Ledger(self.home.ledger(UUID))
        self.control = Spool(spool, self.journal, self.session.settings.journal_spool_limit)
        self.shipper = Shipper(self.session.repository, UUID, spool, ledger=self.ledger)
        self.fill = Filler()
        self.after = 0
        self.payload = self.written = self.shipped = self.tending = 0.0
        self.ledger.began(self.journal, 0, begin)
        self.ledger.based(self.journal, 0, begin, self._base())

    def _base(self) -> str:
        """A disk whose first four GiB hold something: a write of less than a chunk needs what was there."""
        repo, dice = self.session.repository, random.Random(1)
        with repo.writer() as writer:
            held = [writer.put(dice.randbytes(CHUNK // 2) + bytes(CHUNK // 2)) for _ in range(64)]
            chunks = ((index, dice.choice(held)) for index in range(_FILES // CHUNK))
            ref = build(repo.blocks, repo.codec, writer, None, SIZE, chunks, lambda _chunk: None)
        disk = DiskPoint("vda", SIZE, ref or MapRef(b"", SIZE))
        name = f"{int(self.begin.timestamp() * 1000):012x}00000000"
        point = Point(
            name, "day", UUID, "test:///", self.begin, "t" * 16, None, (disk,), reason="baseline",
            journal=self.journal, sequence=0,
        )  # fmt: skip
        repo.commit(point)
        return point.id

    def minute(self, number: int) -> tiers.Outcome:
        """Write a minute of the trace, ship it, tend."""
        start = self.begin + timedelta(minutes=number)
        due = _SEAL
        for write in minute_of(number):
            while write.second >= due:
                self._seal(start + timedelta(seconds=due))
                due += _SEAL
            self.scribe.step = max(_ns(start) + int(write.second * SECOND) - self.scribe.wall, 1000)
            sequence = self.scribe.write("vda", write.offset, self.fill(self.scribe.sequence + 1, write))
            assert sequence == self.scribe.sequence
            self.payload += write.length
        end = start + timedelta(minutes=1)
        self._seal(end)
        return self._tend(end)

    def _seal(self, now: datetime) -> None:
        if self.scribe.waiting:
            self.written += self.scribe.seal().stat().st_size
        self.ledger.confirmed(self.journal, self.scribe.sequence, now)

    def _tend(self, now: datetime) -> tiers.Outcome:
        """As the tap process does it, by this clock."""
        used = time.process_time()
        self.shipped += self.shipper.once(self.after).stored
        self.session.__dict__.pop("catalogue", None)
        record: Any = SimpleNamespace(uuid=UUID, domain="day")
        control: Any = self.control
        outcome = tiers.run(self.session, record, 60, control=control, shipped=self.shipper.shipped(), now=now)
        for journal, upto in outcome.expired.items():
            self.after = max(self.after, upto)
            retire(self.session.repository, UUID, journal, upto)
        self.tending += time.process_time() - used
        return outcome


def live(folder: Path, minutes: int, begin: datetime, say: Callable[[str], None]) -> dict[str, Any]:
    """The day itself: what it weighs, and what it took."""
    day = Day(folder, begin)
    left = 0
    with day.session as session:
        for number in range(minutes):
            left = max(left, day.minute(number).left)
            if number % 60 == 59:
                say(f"tap_day: hour {number // 60 + 1}, {_bytes(day.control.folder) >> 20} MiB in the spool")
        repository = day.home.path / "repository"
        points = session.repository.points(UUID)
        segments = [ref.stored for ref in session.repository.segments(UUID)]
    return {
        "writes": day.scribe.sequence, "payload_bytes": int(day.payload), "journal_bytes": int(day.written),
        "shipped_bytes": int(day.shipped), "largest_spool_bytes": day.control.largest,
        "spool_bytes": _bytes(day.control.folder), "repository_bytes": _bytes(repository),
        "segments": len(segments), "segments_bytes": sum(segments), "points": len(points), "left_undone": left,
        "tending_cpu_seconds": round(day.tending, 1),
    }  # fmt: skip


def reach(folder: Path, minutes: int, begin: datetime, keep: float, count: int) -> dict[str, Any]:
    """Random instants, each in a session of its own; half where every write is kept. Raises RuntimeError for one that
    does not hold what the trace wrote."""
    dice = random.Random(minutes)
    exact, coarse = [], []
    recent = max(minutes - int(keep // 60) + 2, 0)
    for number in range(count):
        fine = number % 2 == 0 or recent == 0
        minute = dice.randrange(recent, minutes) if fine else dice.randrange(1, recent)
        (exact if fine else coarse).append(_reach(folder, begin, minute, fine, dice))
    return {
        "every_write": _spread(exact), "by_minutes": _spread(coarse), "all": _spread(exact + coarse)
    }  # fmt: skip


def _reach(folder: Path, begin: datetime, minute: int, fine: bool, dice: random.Random) -> float:
    writes = minute_of(minute)
    chosen = dice.randrange(len(writes))
    instant = begin + timedelta(minutes=minute, seconds=writes[chosen].second + 0.000_01)
    place = writes[dice.randrange(chosen + 1)].offset
    started = time.monotonic()
    with (
        Session(Home(folder / "home"), "test:///", settings_file=folder / "none.yaml") as session,
        export(session, "day", instant.isoformat()) as served,
        nbd.connect(served.servers[0].socket, "vda") as disk,
    ):
        data = bytes(disk.pread(_BLOCK, place))
        took = time.monotonic() - started
    if fine:
        newest = max(n for n in range(chosen + 1) if writes[n].offset <= place < writes[n].offset + writes[n].length)
        before = sum(len(minute_of(one)) for one in range(minute))
        found, wanted = _STAMP.unpack_from(data), (before + newest + 1, place)
        if found != wanted:
            raise RuntimeError(f"{instant.isoformat()}: it holds (write, place) {found}, not {wanted}")
    return took


# --- the row ---


def tap_day(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """24 h with the settings as they are; with `quick` 3 h of which every write of the last one is kept."""
    hours, keep = (3, 3600.0) if quick else (24, 4 * 3600.0)
    return {"hours": hours, "journal_keep_seconds": keep} | day(hours * 60, keep, 60 if quick else 200, say) | {
        "reduced": quick
    }  # fmt: skip


def day(minutes: int, keep: float, instants: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Two processes, for each has its own peak of memory."""
    with tempfile.TemporaryDirectory(prefix="rewind-day-", dir="/var/tmp") as name:
        (Path(name) / "home").mkdir()
        (Path(name) / "home" / "rewind.yaml").write_text(f"journal_keep: {keep}\n")
        begin = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=minutes)
        started = time.monotonic()
        lived = _child("live", name, minutes, begin.isoformat())
        say(f"tap_day: {minutes} minutes in {time.monotonic() - started:.0f} s")
        reached = _child("reach", name, minutes, begin.isoformat(), keep, instants)
    lived["tending_peak_rss_bytes"] = lived.pop("peak_rss_bytes")
    return lived | {
        "to_first_byte_seconds": {key: reached[key] for key in ("every_write", "by_minutes", "all")},
        "first_byte_p99_seconds": reached["all"]["p99"], "reach_peak_rss_bytes": reached["peak_rss_bytes"],
    }  # fmt: skip


def _child(*words: Any) -> dict[str, Any]:
    argv = [sys.executable, "-m", "tests.bench.day", *map(str, words)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout as stream:
        out = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit status {process.returncode}")
    return json.loads(out) | {"peak_rss_bytes": usage.ru_maxrss * 1024}


def _spread(seconds: list[float]) -> dict[str, Any]:
    if not seconds:
        return {"instants": 0}
    found = sorted(seconds)
    at = {f"p{share}": round(found[min(len(found) - 1, len(found) * share // 100)], 3) for share in (50, 90, 99)}
    return {"instants": len(found), **at, "longest": round(found[-1], 3)}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ns(moment: datetime) -> int:
    return int(moment.timestamp()) * SECOND + moment.microsecond * 1000


def main(argv: list[str]) -> None:
    verb, folder, minutes, begin, *rest = argv
    where = Path(folder), int(minutes), datetime.fromisoformat(begin)
    if verb == "live":
        found = live(*where, lambda text: print(f"bench: {text}", file=sys.stderr, flush=True))
    else:
        found = reach(*where, float(rest[0]), int(rest[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
