"""A real journal is shipped while it is written; then the host is lost, and what had left it is given back."""

from __future__ import annotations

import random
import shutil
import threading
import time
from datetime import UTC, datetime

import pytest

from appliance.capture import salvage, ship
from appliance.capture.consolidate import consolidate
from appliance.errors import SequenceMissing
from appliance.journal import Segment
from appliance.model import DiskPoint, MapRef, Point
from appliance.store import Key, Repository, open_backend
from appliance.store.check import check
from appliance.timeline.ledger import Ledger
from appliance.units import CHUNK
from tests.filter.journald import Journald, MiB, replay, scribble
from tests.support.store import DOMAIN

SIZES = {"vda": 8 * MiB, "vdb": MiB + 512}
KEY = Key(bytes(range(32)))


def empty_point(repo, journal):
    """The disks before the first record."""
    disks = tuple(DiskPoint(name, size, MapRef(b"", size)) for name, size in SIZES.items())
    point = Point(
        "0001", "web", DOMAIN, "test:///", datetime.now(UTC), "t", None, disks, journal=journal, sequence=0
    )  # fmt: skip
    repo.commit(point)
    return point


def content(repo, point):
    found = {}
    for disk in point.disks:
        chunks = dict(repo.map(disk.map).items())
        whole = b"".join(repo.read_chunk(chunks.get(n, b"")) for n in range(-(-disk.size // CHUNK)))
        found[disk.disk] = bytearray(whole[: disk.size])
    return found


@pytest.mark.timeout(60)
def test_after_the_loss_of_the_host_the_last_shipped_record_is_there(tmp_path):
    """P5-30, P5-31, P5-33: with nothing but the repository and its key. What is missing is what was not sealed yet."""
    host = tmp_path / "host"
    host.mkdir()
    Repository.create(open_backend(str(tmp_path / "r")), cache=host / "cache", key=KEY).close()
    images = {name: bytearray(size) for name, size in SIZES.items()}
    with (
        Journald(host, SIZES, segment_size="1M", segment_age="300ms", commit="20ms") as tap,
        Repository.open(open_backend(str(tmp_path / "r")), cache=host / "cache", key=KEY) as repo,
    ):
        journal_id = str(tap.control.status().fields["journal"])
        ledger = Ledger(host / "ledger.jsonl")
        ledger.began(journal_id, 0, datetime.now(UTC))
        ledger.based(journal_id, 0, empty_point(repo, journal_id).time, "0001")

        def write(name):
            disk, dice = tap.disk(name), random.Random(name)
            for step in range(12):
                scribble(disk, images[name], dice, 8)
                time.sleep(0.1)
                if step % 3 == 2:
                    tap.control.seal()  # by size and age alone there may be too few where syncing is slow
            disk.shutdown()

        writers = [threading.Thread(target=write, args=(name,)) for name in SIZES]
        for writer in writers:
            writer.start()
        furthest = 0.0
        while any(writer.is_alive() for writer in writers):
            # A process that dies and comes back each time: the listing is all it knows.
            ledger.confirmed(journal_id, tap.control.status().durable, datetime.now(UTC))
            done = ship.Shipper(repo, DOMAIN, tap.spool, ledger=ledger).once()
            assert not done.refused
            furthest = max(furthest, done.behind.seconds)
            time.sleep(0.05)
        tap.control.mark("end")
        tap.kill()
        with tap.journal() as journal:
            last = max(part.last for part in journal.parts)
            expected = {n: replay(journal, SIZES, n) for n in (ship.held(repo, DOMAIN, journal_of(repo))[-1][1],)}
            assert len(journal.parts) > 3
            originals = {part.path.name: part.path.read_bytes() for part in journal.parts if part.sealed}
        assert 0.1 < furthest < 20
    shutil.rmtree(host)

    home = tmp_path / "new"
    with Repository.open(open_backend(str(tmp_path / "r")), cache=home / "cache", key=KEY) as repo:
        found = salvage.newest(repo, DOMAIN, home)
        assert ([found.upto], found.upto <= last) == (list(expected), True)
        assert found.reason in {"", "what follows was not shipped"}
        made = consolidate(repo, found.base, found.journal, found.upto)
        assert content(repo, made) == expected[found.upto]
        assert found.journal.verify() == []
        for part in found.journal.parts:
            assert part.path.read_bytes() == originals[part.path.name]
            with Segment(part.path) as segment:
                segment.verify()
        with pytest.raises(SequenceMissing, match=f"write {found.upto + 1}: nothing later"):
            ship.fetch(repo, DOMAIN, found.base.journal, home / "x", 0, found.upto + 1)
        # Any instant before it as well, and the points stay when the journal goes.
        middle = found.upto // 2
        assert content(repo, consolidate(repo, found.base, found.journal, middle)) == replay(
            found.journal, SIZES, middle
        )
        ship.retire(repo, DOMAIN, found.base.journal, found.upto)
        assert repo.segments() == []
        assert content(repo, repo.point(made.id)) == expected[found.upto]
        assert check(repo, read_data=True).ok


def journal_of(repo):
    (journal,) = {ref.journal for ref in repo.segments()}
    return journal
