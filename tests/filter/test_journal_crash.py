"""The journal after the worst: killed under load, cut in the middle, flipped bits, started again on what is left."""

from __future__ import annotations

import random
import shutil
import threading
import time

import nbd
import pytest

from appliance.journal import Journal, Kind
from tests.filter.journald import Journald, MiB, replay

SIZES = {"vda": 4 * MiB, "vdb": 4 * MiB}


def stamped(tap, name, answered, first=1):
    """Write numbered blocks until the server is gone; `answered` holds the last number that was answered."""
    number = first
    try:
        disk = tap.disk(name)
        while True:
            disk.pwrite(number.to_bytes(8, "big") * 512, number % 1024 * 4096)
            answered[name] = number
            number += 1
    except nbd.Error:
        return


@pytest.mark.timeout(60)
def test_killed_under_load_it_goes_on_where_it_was(tmp_path):
    """B3: after SIGKILL the durable is there, all that was written without a hole too, the sequence goes on, and no
    number comes twice."""
    before: dict[str, int] = {}
    sure = 0
    for life in range(3):
        with Journald(tmp_path, SIZES, segment_size="1M", commit="50ms") as tap:
            status = tap.control.status()
            assert status.last >= sure, "a durable record is gone"
            assert life == 0 or status.fields["recovered_records"] > 0
            answered: dict[str, int] = {}
            threads = [
                threading.Thread(target=stamped, args=(tap, name, answered, before.get(name, 0) + 1))
                for name in SIZES
            ]
            for thread in threads:
                thread.start()
            limit = time.monotonic() + 20
            while answered.keys() != SIZES.keys():
                assert time.monotonic() < limit, tap.words()
                time.sleep(0.01)
            time.sleep(0.15)
            known = dict(answered)
            tap.control.mark("all of it")
            time.sleep(0.15)
            status = tap.control.status()
            sure = status.durable
            tap.kill()
            for thread in threads:
                thread.join()
        with tap.journal() as journal:
            assert journal.verify() == []
            newest = dict.fromkeys(SIZES, 0)
            for record in journal.records():
                if record.kind == Kind.WRITE:
                    number = int.from_bytes(record.data[:8], "big")
                    # A client that lost its connection does not know whether its last write is there.
                    assert number in (newest[record.disk] + 1, newest[record.disk])
                    newest[record.disk] = number
            # Of what was answered and is not durable yet, any number goes when an older record was not written: its
            # writer had a place, and the kill came before it had filled it.
            assert journal.last >= status.written >= sure
            for name in SIZES:
                assert newest[name] >= known[name], "older than a mark, which is durable"
            before = newest
    with Journald(tmp_path, SIZES):
        journal = Journal(tmp_path / "spool")
        assert len(journal.sessions()) == 3 and journal.holes() == [] and journal.verify() == []
        assert [r.sequence for r in journal.records()] == list(range(1, journal.last + 1))


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """A spool with one sealed and one open segment, and what the disks held after each record."""
    folder = tmp_path_factory.mktemp("torn")
    with Journald(folder, SIZES, segment_size="64M", segment_age="1h") as tap:
        disks = {name: tap.disk(name) for name in SIZES}
        dice = random.Random(1)
        for n in range(60):
            if n == 30:
                tap.control.seal()
            disks[dice.choice(["vda", "vdb"])].pwrite(
                dice.randbytes(dice.choice([512, 4096, 20000])), dice.randrange(MiB)
            )
        disks["vda"].flush()
        tap.kill()
    with Journal(folder / "spool") as journal:
        ends = [(r.position + 48 + len(r.data), r.sequence) for r in journal.records(31)]
    return folder / "spool", ends


def open_file(spool):
    (path,) = spool.glob("*.open")
    return path


def restarted(folder):
    tap = Journald(folder, SIZES)
    with tap:
        status = tap.control.status()
        tap.disk("vda").pwrite(b"after" * 100, 0)
        with tap.journal() as journal:
            assert journal.verify() == [], tap.words()
            assert [r.sequence for r in journal.records()] == list(range(1, status.last + 2))
            assert bytes(list(journal.records())[-1].data) == b"after" * 100
    return status


def test_cut_anywhere_the_whole_records_before_are_kept(torn, tmp_path):
    """B3: a torn tail, at every kind of place: in a header, in a payload, between records."""
    spool, ends = torn
    dice = random.Random(5)
    places = [
        ends[0][0] - 1,
        ends[3][0],
        ends[3][0] + 20,
        ends[10][0] + 47,
        ends[-1][0] - 1,
        *(dice.randrange(300, ends[-1][0]) for _ in range(5)),
    ]
    for n, place in enumerate(places):
        folder = tmp_path / str(n)
        shutil.copytree(spool, folder / "spool")
        with open_file(folder / "spool").open("r+b") as file:
            file.truncate(place)
        kept = max((sequence for end, sequence in ends if end <= place), default=30)
        assert Journal(folder / "spool").last == kept
        status = restarted(folder)
        assert status.last == kept
        assert status.fields["recovered_records"] == kept - 30


def test_a_flipped_bit_ends_the_tail_there(torn, tmp_path):
    """Everything before is kept, what stands behind is cut and its size is told."""
    spool, ends = torn
    dice = random.Random(6)
    for n in range(6):
        folder = tmp_path / str(n)
        shutil.copytree(spool, folder / "spool")
        place = dice.randrange(200, ends[-1][0])
        with open_file(folder / "spool").open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << dice.randrange(8)]))
        kept = max((sequence for end, sequence in ends if end <= place), default=30)
        assert Journal(folder / "spool").last == kept
        status = restarted(folder)
        assert status.last == kept and status.fields["cut_bytes"] > 0


def test_records_behind_a_hole_in_an_older_segment_are_not_used(torn, tmp_path):
    """Two open segments, as after dying while sealing: a hole in the first ends the journal."""
    spool, ends = torn
    shutil.copytree(spool, tmp_path / "spool")
    path = open_file(tmp_path / "spool")
    data = path.read_bytes()
    # The second file: the header of the first, and the records from number 46 on.
    header = int.from_bytes(data[8:12], "little")
    split = next(end for end, sequence in ends if sequence == 45)
    (tmp_path / "spool" / f"{46:020}.open").write_bytes(data[:header] + data[split : ends[-1][0]])
    path.write_bytes(data[:split])
    assert Journal(tmp_path / "spool").last == 60
    torn_copy = tmp_path / "hole"
    shutil.copytree(tmp_path / "spool", torn_copy / "spool")
    (torn_copy / "spool" / path.name).write_bytes(data[: split - 10])
    assert restarted(tmp_path).last == 60
    status = restarted(torn_copy)
    assert status.last == 44 and status.fields["cut_bytes"] > 10000


def test_files_of_others_are_left_alone_or_put_aside(torn, tmp_path):
    spool, _ = torn
    shutil.copytree(spool, tmp_path / "spool")
    (tmp_path / "spool" / "notes.txt").write_text("mine")
    (tmp_path / "spool" / f"{99:020}.open").write_bytes(b"rubbish" * 100)
    (tmp_path / "spool" / "spare").write_bytes(b"old" * 100)
    status = restarted(tmp_path)
    assert status.last == 60
    names = {path.name for path in (tmp_path / "spool").iterdir()}
    assert {"notes.txt", f"{99:020}.open.damaged"} <= names


def test_the_number_goes_on_when_everything_was_forgotten(tmp_path):
    with Journald(tmp_path, SIZES) as tap:
        for n in range(10):
            tap.disk("vda").pwrite(b"x" * 512, n * 512)
        tap.control.seal()
        tap.control.forget(10)
        tap.kill()
    for _ in range(2):
        with Journald(tmp_path, SIZES) as tap:
            assert tap.control.status().last == 10
            tap.kill()
    with Journald(tmp_path, {"vdz": MiB}) as tap:
        tap.disk("vdz").pwrite(b"x" * 512, 0)
        with tap.journal() as journal:
            assert [(r.sequence, r.disk) for r in journal.records(journal.first)] == [(11, "vdz")]
            assert replay_one(journal)


def replay_one(journal):
    return journal.first == 11 and journal.disks() == {"vdz": MiB}


def test_a_full_disk_of_an_earlier_life_can_be_emptied(tmp_path):
    """A spool over its limit at the start serves its control socket: that is how room is made."""
    with Journald(tmp_path, SIZES) as tap:
        disk = tap.disk("vda")
        for n in range(400):
            disk.pwrite(b"x" * 4096, n * 4096)
        tap.kill()
    with Journald(tmp_path, SIZES, spool_limit="1M") as tap:
        with pytest.raises(nbd.Error):
            tap.disk("vda").pwrite(b"x" * 512, 0)
        tap.control.forget(400)
        deadline = time.monotonic() + 5
        while tap.control.status().state != "ok":
            assert time.monotonic() < deadline
        tap.disk("vda").pwrite(b"x" * 512, 0)


def test_replay_after_every_life_is_exact(tmp_path):
    """The state at a number does not change by a restart."""
    images = {name: bytearray(size) for name, size in SIZES.items()}
    states = {}
    for life in range(3):
        with Journald(tmp_path, SIZES, segment_size="128k") as tap:
            for n in range(30):
                data = bytes([life * 30 + n + 1]) * 4096
                tap.disk("vda").pwrite(data, n * 8192)
                images["vda"][n * 8192 : n * 8192 + 4096] = data
            states[tap.control.mark(f"life {life}").sequence] = {name: bytes(image) for name, image in images.items()}
            tap.kill()
    with Journal(tmp_path / "spool") as journal:
        for sequence, state in states.items():
            assert replay(journal, SIZES, sequence) == state
