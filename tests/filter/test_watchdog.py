"""The watchdog of a journal: kills what hangs in time, and nothing else. With real processes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from appliance import nbd
from appliance.capture import watchdog
from appliance.capture.tap import Recorder
from appliance.config import Home, Settings
from appliance.errors import JournalError, NbdFailed
from appliance.process import Child
from appliance.units import MiB

# The machine may be busy: a promise is kept within this, by all that a test can tell.
_LATE = 1.0


@pytest.fixture
def recorder():
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        home = Home(Path(folder))
        home.create()
        made = Recorder(home, "u", Settings(journal_stall=0.25), [("vda", 64 * MiB), ("vdb", 1 * MiB)])
        made.start()
        yield made
        made.stop()


def gone(recorder, timeout=5.0):
    """Seconds until it has ended."""
    begun = time.monotonic()
    while recorder.alive():
        assert time.monotonic() - begun < timeout
        time.sleep(0.005)
    return time.monotonic() - begun


def await_stop(pid):
    """Until each of its threads stands, or is gone: on a busy machine one may do more after the signal was sent."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            while (task / "stat").read_text().rpartition(")")[2].split()[0] not in "TtZX":
                time.sleep(0.001)


def await_dog(recorder):
    """Until it watches: a connection is all that it makes."""
    limit = time.monotonic() + 10
    while not _sockets(recorder._dog.pid):
        assert time.monotonic() < limit, "the watchdog does not come to its work"
        time.sleep(0.01)


def _sockets(pid):
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found += [one] if os.readlink(one).startswith("socket:") else []
    return found


def test_a_journal_that_hangs_is_killed_in_time(recorder):
    """P5-42: and its client is free then, with an error of its own and not of the guest."""
    await_dog(recorder)
    with nbd.connect(recorder.socket, "vda", ()) as client:
        client.pwrite(b"x" * 4096, 0)
        begun = time.monotonic()
        os.kill(recorder.pid, signal.SIGSTOP)
        await_stop(recorder.pid)
        with pytest.raises(NbdFailed):
            client.pwrite(b"y" * 4096, 4096)
        waited = time.monotonic() - begun
    assert 0.1 < waited < 0.25 + _LATE
    gone(recorder)
    assert "has not answered for" in recorder.why()


def test_a_journal_that_works_is_left_alone(recorder):
    """P5-42."""
    time.sleep(1.5)
    assert recorder.alive() and recorder.control().status().state == "ok"


def test_garbage_of_others_neither_kills_it_nor_keeps_it_alive(recorder):
    """P5-42: the control socket is anybody's who may open it."""
    over = threading.Event()

    def flood(seed):
        chance = random.Random(seed)
        while not over.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.settimeout(0.02)
                client.connect(os.fspath(recorder.control_socket))
                client.sendall(chance.choice([b"status\n" * 30, os.urandom(2000), b"y" * 3000]))
                client.recv(16)

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    try:
        time.sleep(1.5)
        assert recorder.alive()
        os.kill(recorder.pid, signal.SIGSTOP)
        assert gone(recorder) < 0.25 + _LATE
    finally:
        over.set()
        for one in threads:
            one.join()
    assert "has not answered" in recorder.why()


def test_a_lost_or_stopped_watchdog_is_replaced(recorder):
    """P5-42: the journal is not without one for longer than until the next look."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        before = recorder._dog.pid
        os.kill(before, number)
        limit = time.monotonic() + 5
        while recorder._dog.pid == before:  # a signal takes its time to be seen
            assert recorder.alive() and time.monotonic() < limit
            time.sleep(0.01)
        assert recorder.alive()
    await_dog(recorder)
    os.kill(recorder.pid, signal.SIGSTOP)
    assert gone(recorder) < 0.25 + _LATE


class Ending(Child):
    """A watchdog that has done its work between one look at it and the next."""

    def alive(self):
        self.wait(5)
        return super().alive()


def test_a_watchdog_that_ends_while_it_is_looked_at_is_asked_why(recorder):
    """P5-42: the reason is for the ledger, and not lost with who knew it."""
    recorder._dog.kill()
    recorder._dog = Ending(["sh", "-c", "sleep 0.2; echo '{\"killed\": \"it was slow\"}'"], name="ending")
    assert not recorder.alive()
    assert recorder.why() == "it was slow"


def test_clients_are_freed_before_the_process_has_died(recorder):
    """P5-42: one that is stuck in the kernel does not die by a signal, so its connections are taken from it."""
    if os.getuid():
        pytest.skip("only root may take another process's descriptors everywhere")
    with nbd.connect(recorder.socket, "vda", ()) as client:
        recorder._dog.kill()
        os.kill(recorder.pid, signal.SIGSTOP)
        handle = os.pidfd_open(recorder.pid)
        try:
            taken = watchdog._connections(handle, recorder.pid)
            assert taken
            for one in taken:
                one.shutdown(socket.SHUT_RDWR)
                one.close()
            with pytest.raises(NbdFailed):
                client.pwrite(b"y" * 4096, 0)
        finally:
            os.close(handle)
        os.kill(recorder.pid, signal.SIGCONT)


def test_the_end_of_the_journal_is_the_end_of_its_watchdog(recorder):
    """P5-42: and what nobody killed is not told as killed."""
    dog = recorder._dog
    os.kill(recorder.pid, signal.SIGKILL)
    gone(recorder)
    assert dog.wait(2) in (0, 1)  # 1: it had not even begun to watch
    assert recorder.killed == ""
    recorder.stop()
    recorder.start()
    assert recorder.alive()


def test_a_spool_leaves_room_on_its_disk(recorder):
    """P5-31: a limit that its disk does not reach would never make room."""
    status = recorder.control().status()
    disk = os.statvfs(recorder.spool)
    assert 0 < status.limit < disk.f_bavail * disk.f_frsize + MiB
    with pytest.raises(JournalError):
        recorder.control().mark("")
