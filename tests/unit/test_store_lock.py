"""Locks: who is kept out, who is told, and which ones are taken over."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from appliance.errors import Locked
from appliance.store.backend.memory import MemoryBackend
from appliance.store.lock import Locks


@pytest.fixture
def place(request):
    return MemoryBackend(f"lock-{request.node.nodeid}")


@pytest.fixture
def locks(place, tmp_path):
    return Locks(place, tmp_path)


def foreign(place, name="exclusive.aaaa.00000000", **facts):
    """The lock of a process on another host, as far as anyone here can tell."""
    facts = {"format": 1, "purpose": "capture", "pid": 7, "host": "elsewhere", "boot": "another", **facts}
    place.put(f"locks/{name}", json.dumps(facts).encode())


@pytest.mark.parametrize(
    ("held", "wanted", "possible"),
    [
        ("shared", "shared", True), ("shared", "maintenance", True), ("shared", "exclusive", False),
        ("maintenance", "shared", True), ("maintenance", "maintenance", False), ("maintenance", "exclusive", False),
        ("exclusive", "shared", False), ("exclusive", "maintenance", False), ("exclusive", "exclusive", False),
    ],
)  # fmt: skip
def test_who_keeps_out_whom(locks, held, wanted, possible):
    with locks.acquire(held, "one"):
        if possible:
            locks.acquire(wanted, "two").release()
        else:
            with pytest.raises(Locked):
                locks.acquire(wanted, "two")
    locks.acquire(wanted, "two").release()


def test_the_holder_is_named(locks, place):
    """A12: the sentence says who holds it."""
    foreign(place)
    with pytest.raises(Locked) as caught:
        locks.acquire("shared", "export")
    assert "capture (process 7 on elsewhere)" in str(caught.value)
    assert caught.value.exit_code == 31
    assert [info.name for info in place.list("locks/")] == ["locks/exclusive.aaaa.00000000"]


def test_waiting_ends_when_the_lock_goes(locks):
    held = locks.acquire("exclusive", "one")
    threading.Timer(0.3, held.release).start()
    locks.acquire("exclusive", "two", wait=10).release()


def test_a_dead_holder_on_this_host_is_taken_over_at_once(locks, place):
    script = "import json; from appliance.store.lock import _ourselves; print(json.dumps(_ourselves()))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    foreign(place, **json.loads(process.stdout))
    locks.acquire("exclusive", "next").release()


def test_a_lock_is_stale_when_it_did_not_change_for_long(place, tmp_path):
    foreign(place)
    locks = Locks(place, tmp_path, stale=1.5)
    with pytest.raises(Locked):
        locks.acquire("shared", "export")
    # Another process of ours remembers since when it was seen.
    time.sleep(1.6)
    Locks(place, tmp_path, stale=1.5).acquire("shared", "export").release()


def test_a_lock_that_is_renewed_is_not_stale(place, tmp_path, monkeypatch):
    monkeypatch.setattr("appliance.store.lock._ourselves", lambda: {"host": "elsewhere", "boot": "another"})
    held = Locks(place, tmp_path / "a", refresh=0.1).acquire("exclusive", "long work")
    (tmp_path / "b").mkdir()
    other = Locks(place, tmp_path / "b", stale=2.0)
    stop = time.monotonic() + 3
    while time.monotonic() < stop:
        assert [holder.id for holder in other.holders()] == [held.id]
        time.sleep(0.05)
    assert held.held()
    held.release()
    assert not list(place.list("locks/"))


def test_a_stepped_clock_changes_nothing(place, tmp_path, monkeypatch):
    """A9: wall clocks are not compared with anything."""
    held = Locks(place, tmp_path).acquire("exclusive", "work")
    for step in (-(10**8), 10**8):
        monkeypatch.setattr(time, "time", lambda step=step: 1.8e9 + step)
        with pytest.raises(Locked):
            Locks(place, tmp_path).acquire("shared", "export")
        assert held.held()
    held.release()


def test_a_holder_that_was_taken_over_notices(place, tmp_path):
    held = Locks(place, tmp_path, refresh=0.05).acquire("shared", "capture")
    for info in list(place.list("locks/")):
        place.delete(info.name)
    limit = time.monotonic() + 10
    while held.held():
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert not list(place.list("locks/"))


def test_only_one_of_many_gets_it(place, tmp_path):
    inside, most = 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most
        with Locks(place, tmp_path).acquire("exclusive", "work", wait=25):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
