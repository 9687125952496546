"""The journal plugin on a real nbdkit: what is sent is what is recorded, in one order, and durable when it says so."""

from __future__ import annotations

import errno
import random
import shutil
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import nbd
import pytest

from appliance.errors import JournalError, SequenceMissing
from appliance.journal import Journal, Kind, latest, pieces
from appliance.journal.build import build
from appliance.units import CHUNK
from tests.filter.journald import FUA, Journald, MiB, replay, scribble

SIZES = {"vda": 4 * MiB, "vdb": 2 * MiB + 512}


@pytest.fixture
def tap(tmp_path):
    with Journald(tmp_path, SIZES, segment_size="512k", commit="50ms") as tap:
        yield tap


def test_two_disks_written_at_once_replay_to_what_they_hold(tap):
    """P5-38, P5-39: every request of both disks is in one order without a hole; its replay is what they hold."""
    images = {name: bytearray(size) for name, size in SIZES.items()}
    between = []

    def write(name):
        disk, dice = tap.disk(name), random.Random(name)
        for _ in range(4):
            scribble(disk, images[name], dice, 50)
            tap.control.seal()  # so that there are several segments also where the keeper waits for a slow disk
        disk.shutdown()

    threads = [threading.Thread(target=write, args=(name,)) for name in SIZES]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        between.append(tap.control.mark(f"mark {len(between)}").sequence)
        time.sleep(0.02)
    tap.control.mark("end")
    with tap.journal() as journal:
        assert journal.verify() == [] and journal.holes() == []
        assert replay(journal, SIZES) == images
        assert [record.sequence for record in journal.records()] == list(range(1, journal.last + 1))
        assert [mark.sequence for mark in journal.marks()][:-1] == between
        assert [mark.label for mark in journal.marks()][-1] == "end"
        assert len(journal.parts) > 3


def test_newest_content_by_chunk_equals_the_replay(tap):
    """P5-19: `latest` and `pieces` give what a replay gives, between any two numbers, for any range."""
    images = {name: bytearray(size) for name, size in SIZES.items()}
    dice = random.Random(7)
    for name in SIZES:
        scribble(tap.disk(name), images[name], dice, 150)
    with tap.journal() as journal:
        for _ in range(20):
            after, upto = sorted(dice.sample(range(journal.last + 1), 2))
            before, target = replay(journal, SIZES, after), replay(journal, SIZES, upto)
            for name, size in SIZES.items():
                image = bytearray(before[name])
                touched = list(latest(journal, name, after, upto))
                assert all(one.index < two.index for one, two in pairwise(touched))
                for one in touched:
                    start, end = one.index * CHUNK, min((one.index + 1) * CHUNK, size)
                    chunk = bytearray(CHUNK) if one.covers(end - start) else image[start:end]
                    one.apply(journal, chunk)
                    image[start:end] = chunk[: end - start]
                assert image == target[name]
                start = dice.randrange(size)
                length = dice.randrange(1, size - start + 1)
                image = bytearray(before[name])
                for piece in pieces(journal, name, start, length, after, upto):
                    image[piece.offset : piece.offset + piece.length] = piece.read(journal)
                assert image[start : start + length] == target[name][start : start + length]


@pytest.mark.parametrize(("length", "most"), [(4096, 1.03), (65536, 1.02)])
def test_the_journal_takes_little_more_than_what_was_written(tap, length, most):
    """B5: journal bytes per byte of the guest, headers, index and footers of sealed segments counted."""
    disk = tap.disk("vda")
    for n in range(8 * MiB // length):
        disk.pwrite(b"x" * length, n * length % (4 * MiB))
    tap.control.seal()
    sealed = sum(path.stat().st_size for path in tap.spool.glob("*.rwj"))
    assert sealed / (8 * MiB) <= most
    stats = tap.control.stats()
    assert stats["bytes"] == 8 * MiB
    assert abs(stats["journal_bytes"] - sealed) < 1000


def test_a_flush_and_fua_wait_for_the_disk(tmp_path):
    """P5-38: an answer to FUA or flush means durable; without them durable follows within the bound."""
    with Journald(tmp_path, SIZES, commit="10s") as tap:
        disk = tap.disk("vda")
        disk.pwrite(b"a" * 512, 0)
        assert tap.control.status().durable == 0
        disk.pwrite(b"b" * 512, 512, FUA)
        assert tap.control.status().durable == 2
        disk.pwrite(b"c" * 512, 1024)
        tap.disk("vdb").flush()
        assert tap.control.status().durable == 3
        begun = time.monotonic()
        tap.control.mark("now")
        assert time.monotonic() - begun < 5
    with Journald(tmp_path, SIZES, commit="100ms") as tap:
        tap.disk("vda").pwrite(b"a" * 512, 0)
        deadline = time.monotonic() + 5
        while (status := tap.control.status()).durable < status.last:
            assert time.monotonic() < deadline
        assert status.fields["undurable_us"] == 0


def test_requests_at_the_edges(tap):
    disk = tap.disk("vdb")
    disk.pwrite(b"e", SIZES["vdb"] - 1)
    disk.zero(SIZES["vdb"], 0)
    big = random.Random(1).randbytes(MiB)
    disk.pwrite(big, 3)
    with tap.journal() as journal:
        records = list(journal.records())
    assert [(r.disk, r.offset, r.length, r.kind) for r in records] == [
        ("vdb", SIZES["vdb"] - 1, 1, Kind.WRITE),
        ("vdb", 0, SIZES["vdb"], Kind.ZERO),
        ("vdb", 3, MiB, Kind.WRITE),
    ]
    assert records[2].data == big
    assert records[0].wall_ns <= records[2].wall_ns <= time.time_ns()
    assert abs(records[0].time.timestamp() - time.time()) < 60


def test_a_request_of_32_mib_goes_through(tmp_path):
    with Journald(tmp_path, {"vda": 64 * MiB}, segment_size="64k") as tap:
        data = random.Random(2).randbytes(MiB) * 32
        tap.disk("vda").pwrite(data, 5 * MiB)
        tap.control.seal()
        with tap.journal() as journal:
            assert journal.verify() == []
            assert next(journal.records()).data == data
            touched = list(latest(journal, "vda", 0, journal.last))
            assert [one.index for one in touched] == list(range(80, 592))
            chunk = bytearray(CHUNK)
            touched[100].apply(journal, chunk)
            assert chunk == data[100 * CHUNK : 101 * CHUNK]


def test_what_the_export_can(tap):
    """A read is refused: zeroes could be written back over good data."""
    disk = tap.disk("vda")
    assert disk.get_size() == SIZES["vda"]
    assert disk.can_flush() and disk.can_fua() and disk.can_zero() and disk.can_trim() and disk.can_multi_conn()
    assert disk.get_block_size(nbd.SIZE_MINIMUM) == 1
    with pytest.raises(nbd.Error) as refused:
        disk.pread(512, 0)
    assert refused.value.errnum == errno.EIO
    with pytest.raises(nbd.Error):
        tap.disk("vdc")
    names = []
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(str(tap.socket))
    client.opt_list(lambda name, _: names.append(name))
    assert names == list(SIZES)


def test_a_mark_separates_what_came_before_from_what_came_after(tap):
    """P5-39: a mark is one instant over all disks."""
    a, b = tap.disk("vda"), tap.disk("vdb")
    a.pwrite(b"1" * 512, 0)
    b.pwrite(b"1" * 512, 0)
    mark = tap.control.mark('before the "upgrade" \\ äöü 時')
    b.pwrite(b"2" * 512, 0)
    a.pwrite(b"2" * 512, 0)
    with tap.journal() as journal:
        assert [m.label for m in journal.marks()] == ['before the "upgrade" \\ äöü 時']
        at_mark = replay(journal, SIZES, mark.sequence)
        assert (at_mark["vda"][0], at_mark["vdb"][0]) == (ord("1"), ord("1"))
        first_after = next(journal.records(mark.sequence + 1))
        assert journal.at(first_after.wall_ns) >= mark.sequence
        assert journal.at(first_after.wall_ns - 1) <= mark.sequence
        assert journal.at(0) == 0


def test_segments_are_sealed_by_age_and_deleted_when_not_needed(tmp_path):
    """P5-27: what is forgotten is gone from the disk, the rest can be read, and its absence is told."""
    with Journald(tmp_path, SIZES, segment_size="64k", segment_age="200ms") as tap:
        disk = tap.disk("vda")
        disk.pwrite(b"x" * 512, 0)
        deadline = time.monotonic() + 5
        while not list(tap.spool.glob("*.rwj")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for n in range(100):
            disk.pwrite(b"y" * 4096, n * 4096)
            if n % 10 == 0:
                tap.control.seal()
        assert tap.control.seal() == 101
        before = tap.control.status()
        kept = tap.journal()
        freed = tap.control.forget(50)
        after = tap.control.status()
        assert freed > 30 * 4096 and after.bytes == before.bytes - freed and 1 < after.first <= 51
        kept.refresh()
        assert kept.first == after.first and kept.verify() == []
        with pytest.raises(SequenceMissing, match="it was forgotten"):
            list(kept.records(1))
        assert [record.sequence for record in kept.records(after.first)] == list(range(after.first, 102))
        with pytest.raises(SequenceMissing):
            list(latest(kept, "vda", 0, 101))


def test_a_full_spool_refuses_at_once_and_says_so(tmp_path):
    """P5-29: ENOSPC at once; the connection takes nothing more; a note says where the disk stops being exact."""
    with Journald(tmp_path, SIZES, spool_limit="1M", segment_size="128k") as tap:
        disk, other = tap.disk("vda"), tap.disk("vdb")
        written = 0
        with pytest.raises(nbd.Error) as refused:
            while True:
                began = time.monotonic()
                disk.pwrite(b"x" * 4096, 0)
                written += 1
                if written == 128:
                    tap.control.seal()  # a journal that has no processor would put all into one segment
        assert refused.value.errnum == errno.ENOSPC and time.monotonic() - began < 1
        assert 200 < written < 256
        other.pwrite(b"small" * 100, 0)
        status = tap.control.status()
        assert [d["refused"] for d in status.fields["disks"]] == [1, 0]
        with pytest.raises(nbd.Error):
            tap.disk("vdb").pwrite(b"x" * 65536, 0)
        assert tap.control.status().state == "full" and tap.control.status().reason
        tap.control.mark("there is room for a mark")
        tap.control.seal()
        tap.control.forget(status.last)
        deadline = time.monotonic() + 60
        while tap.control.status().state != "ok":
            assert time.monotonic() < deadline
        with pytest.raises(nbd.Error) as still:
            disk.pwrite(b"x" * 512, 0)
        assert still.value.errnum == errno.ENOSPC
        tap.disk("vda").pwrite(b"new" * 100, 0)
        with tap.journal() as journal:
            assert journal.verify() == []
            lost = list(journal.lost())
            # The second refusal of the old connection came after a new time had begun: it is noted again.
            assert {(record.disk, record.kind) for record in lost} <= {("vda", Kind.LOST), ("vdb", Kind.LOST)}
            assert lost and sum(1 for path in tap.spool.iterdir()) < 6
        assert sum(path.stat().st_size for path in tap.spool.glob("*.rwj")) <= MiB


def test_a_full_disk_is_told_as_space_and_leaves_no_hole(tmp_path):
    """P5-29: the file system itself is full: ENOSPC before anything is written, and the journal stays whole."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "journal", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with Journald(tmp_path, SIZES, segment_size="256k") as tap:
            tap.parameters["spool"] = small / "spool"
            tap.spool = small / "spool"
            tap.kill()
            tap.start()
            disk = tap.disk("vda")
            with pytest.raises(nbd.Error) as refused:
                for _ in range(1000):
                    disk.pwrite(b"x" * 4096, 0)
            assert refused.value.errnum == errno.ENOSPC
            assert tap.control.status().state == "full", tap.words()
            with tap.journal() as journal:
                assert [r.disk for r in journal.lost()] == ["vda"]
            tap.control.forget(tap.control.status().last)
            deadline = time.monotonic() + 5
            while tap.control.status().state != "ok":
                assert time.monotonic() < deadline
            time.sleep(0.5)
            tap.disk("vda").pwrite(b"y" * 4096, 0)
            with tap.journal() as journal:
                assert journal.verify() == []
            tap.kill()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_many_writers_leave_no_hole_on_a_full_disk(tmp_path):
    """P5-29: whoever comes to the end of the room asks for more himself; what the others took meanwhile counts."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M", "journal", small], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with Journald(tmp_path, SIZES, segment_size="1M") as tap:
            tap.parameters["spool"] = tap.spool = small / "spool"
            tap.kill()
            tap.start()

            def fill(number):
                disk = tap.disk("vda")
                for _ in range(100):
                    try:
                        disk.pwrite(bytes([number + 1]) * (256 << 10), number * MiB % SIZES["vda"])
                    except nbd.Error as error:
                        return error.errnum
                return 0

            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(fill, range(8))) == {errno.ENOSPC}
            assert tap.control.status().state != "failed", tap.words()
            assert tap.control.status().bytes > 18 * MiB, "given up though there was space"
            with tap.journal() as journal:
                assert journal.verify() == [] and journal.last == tap.control.status().last
            tap.kill()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_the_control_socket_is_for_its_owner_only(tap):
    assert stat.S_IMODE(tap.control_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tap.spool.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tap.spool.iterdir())


def test_two_processes_do_not_share_a_spool(tap, tmp_path):
    again = Journald(tmp_path, SIZES)
    done = subprocess.run(
        [*again.argv()[:2], f"--unix={tmp_path}/other", *again.argv()[3:]], capture_output=True, text=True
    )
    assert done.returncode != 0 and "another process uses it" in done.stderr
    tap.disk("vda").pwrite(b"x" * 512, 0)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["spool=S"],
        ["disk=vda:1M"],
        ["spool=S", "disk=vda"],
        ["spool=S", "disk=:1M"],
        ["spool=S", "disk=a b:1M"],
        ["spool=S", "disk=vda:-1"],
        ["spool=S", "disk=vda:1M", "disk=vda:2M"],
        ["spool=S", f"disk={'x' * 32}:1M"],
        ["spool=S", "disk=vda:1M", "commit=0"],
        ["spool=S", "disk=vda:1M", "commit=1d"],
        ["spool=S", "disk=vda:1M", "commit=-1s"],
        ["spool=S", "disk=vda:1M", "commit=nan"],
        ["spool=S", "disk=vda:1M", "commit="],
        ["spool=S", "disk=vda:1M", "segment-size=1"],
        ["spool=S", "disk=vda:1M", "segment-size=1T"],
        ["spool=S", "disk=vda:1M", "spool-limit=1k"],
        ["spool=S", "disk=vda:1M", "segment-age=1us"],
        ["spool=S", "disk=vda:1M", "rubbish=1"],
        ["spool=/dev/null", "disk=vda:1M"],
        ["spool=/nowhere/at/all", "disk=vda:1M"],
        ["spool=S", "disk=vda:1M", f"control=/{'x' * 200}"],
        ["spool=S", "disk=vda:1M", "control=/nowhere/at/all"],
        ["spool=S", "disk=vda:99999999999999999999"],
        ["spool=S", *(f"disk=d{n}:1M" for n in range(257))],
    ],
)
def test_parameters_that_make_no_sense_are_refused_with_a_sentence(words, tmp_path):
    done = subprocess.run(
        ["nbdkit", "--foreground", f"--unix={tmp_path}/s", str(build()), *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=10,
    )
    assert done.returncode == 1
    assert "error:" in done.stderr


def test_it_goes_into_the_background_with_relative_paths(tmp_path):
    """nbdkit changes its folder and forks: paths, threads and locks must survive both."""
    subprocess.run(
        [
            "nbdkit",
            f"--unix={tmp_path}/tap.sock",
            f"--pidfile={tmp_path}/pid",
            str(build()),
            "spool=spool",
            "control=tap.ctl",
            "disk=vda:1M",
        ],
        cwd=tmp_path,
        check=True,
        timeout=10,
    )
    import os
    import signal
    import time

    # nbdkit's child writes the file, after its parent has ended.
    for _ in range(500):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            break
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    try:
        tap = Journald(tmp_path, {"vda": MiB})
        tap.disk("vda").pwrite(b"x" * 512, 0, FUA)
        assert tap.control.status().durable == 1
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while (tmp_path / "tap.ctl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [r.sequence for r in Journal(tmp_path / "spool").records()] == [1]


def test_the_manual_page_has_every_parameter_and_request(tmp_path):
    root = build.__globals__["_SOURCE"]
    page = (root / "nbdkit-journal-plugin.pod").read_text()
    for word in ["spool", "disk", "control", "commit", "segment-size", "segment-age", "spool-limit"]:
        assert f"B<{word}=>" in page
    for word in ["status", "stats", "mark LABEL", "seal", "forget UPTO"]:
        assert f"=item C<{word}>" in page
    if shutil.which("podchecker"):
        subprocess.run(["podchecker", "-warnings", root / "nbdkit-journal-plugin.pod"], check=True, capture_output=True)
    help_text = subprocess.run(["nbdkit", "--help", str(build())], capture_output=True, text=True, check=True).stdout
    assert "spool-limit=SIZE" in help_text
    dump = subprocess.run(["nbdkit", "--dump-plugin", str(build())], capture_output=True, text=True, check=True).stdout
    assert "journal_format=1" in dump


class TestControl:
    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b" ",
            b"STATUS",
            b"status now",
            b"mark",
            b"mark ",
            b"mark " + b"x" * 257,
            b"mark \xff",
            b"mark a\tb",
            b"mark \xc2\x85",
            b"mark \xed\xa0\x80",
            b"mark \xf4\x90\x80\x80",
            b"mark \xc0\x80",
            b"mark \xe2\x82",
            b"forget",
            b"forget x",
            b"forget -1",
            b"forget 99999999999999999999999",
            b"forget 1 2",
            b"sta\0tus",
            b"seal it",
            b"\xff" * 500,
        ],
    )
    def test_what_makes_no_sense_is_refused_and_the_connection_goes_on(self, tap, line):
        answers = tap.ask(line, b"status", b"status\r"[:-1])
        assert "error" in answers[0] and answers[1]["state"] == "ok" and answers[2]["last"] == 0

    def test_a_line_without_end_is_cut_off(self, tap):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(tap.control_path))
            client.sendall(b"x" * 5000)
            assert b"too long" in client.recv(4096)
            with pytest.raises(OSError):
                for _ in range(100):
                    client.sendall(b"x" * 5000)
                    assert client.recv(4096), "closed"
                    time.sleep(0.01)
                raise AssertionError("it goes on reading")
            tap.control.status()

    def test_random_bytes_from_many_clients_disturb_nothing(self, tap):
        """P5-42: garbage, clients that do not read, and more clients than there are places, under writes."""
        dice = random.Random(3)
        disk = tap.disk("vda")
        clients = []
        for n in range(150):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(5)
            client.connect(str(tap.control_path))
            client.setblocking(False)
            try:
                for _ in range(dice.randrange(4)):
                    client.send(
                        dice.choice(
                            [dice.randbytes(dice.randrange(1, 3000)), b"status\n" * 400, b"mark x\nseal\n" * 50]
                        )
                    )
            except OSError:
                pass  # cut off, or it does not read any more: both are right
            clients.append(client)
            if n % 3 == 0:
                clients.pop(dice.randrange(len(clients))).close()
            began = time.monotonic()
            disk.pwrite(b"x" * 4096, n * 4096)
            assert time.monotonic() - began < 2
        assert tap.control.status().state == "ok"
        assert tap.control.mark("still here").sequence > 150
        for client in clients:
            client.close()
        stats = tap.control.stats()
        assert stats["latency"]["count"] == 150 == sum(count for _, count in stats["latency"]["histogram"])

    def test_a_client_that_sends_all_and_leaves_is_served(self, tap):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(tap.control_path))
            client.sendall(b"mark one\nseal\nstatus\n")
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answers:
                lines = answers.read().splitlines()
        assert len(lines) == 3 and b'"sealed": 1' in lines[1]

    def test_python_says_what_was_refused_and_who_is_silent(self, tap, tmp_path):
        from appliance.errors import JournalSilent
        from appliance.journal import Control

        with pytest.raises(JournalError, match="label"):
            tap.control.mark("two\nlines")
        with pytest.raises(JournalSilent):
            Control(tmp_path / "nobody").status()
        tap.process.send_signal(19)
        try:
            with pytest.raises(JournalSilent):
                for _ in range(50):  # each thread stops when it is scheduled next
                    Control(tap.control_path, timeout=0.3).status()
        finally:
            tap.process.send_signal(18)
