"""What every place that keeps objects promises (appliance/store/backend/base.py), asked of each of them.

A new backend adds a place to conftest.py, not a test.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.errors import AlreadyExists, ConfigError, NoSpace, ObjectNotFound, PermissionDenied, Temporary
from appliance.store.backend.base import check_name
from appliance.store.backend.faulty import Crashed, Fault, Faulty, at
from appliance.store.backend.wrap import RETRY_ATTEMPTS, Retrying
from tests.support.limits import limit

ROOT = Path(__file__).parents[2]
HEX = "3f0c" + "5a" * 14
KiB = 1 << 10


def names(listing):
    return [info.name for info in listing]


# --- create-only ------------------------------------------------------------------------------------------------------


def test_what_was_put_is_there(place, backend):
    for name in ("config", f"packs/{HEX}", "points/a/b-c_d.e", "x" * 200):
        backend.put(name, name.encode())
    other = place.open()
    for name in ("config", f"packs/{HEX}", "points/a/b-c_d.e", "x" * 200):
        assert other.get(name) == name.encode()


def test_any_buffer_can_be_put(backend):
    for kind in (bytes, bytearray, memoryview):
        backend.put(f"{kind.__name__}/x", kind(b"content"))
        backend.put(f"{kind.__name__}/empty", kind(b""))
        assert backend.get(f"{kind.__name__}/x") == b"content"
        assert backend.get(f"{kind.__name__}/empty") == b""


def test_the_buffer_may_be_used_again_afterwards(backend):
    data = bytearray(b"first")
    backend.put("x", data)
    data[:] = b"other"
    assert backend.get("x") == b"first"


def test_a_name_is_created_once(place, backend):
    """P5-09: what is stored is never changed."""
    backend.put("points/1", b"first")
    for writer in (backend, place.open()):
        with pytest.raises(AlreadyExists, match="points/1") as caught:
            writer.put("points/1", b"second, longer")
        assert caught.value.fields["name"] == "points/1"
    assert backend.get("points/1") == b"first"


def test_a_deleted_name_can_be_created_again(backend):
    backend.put("x", b"1")
    backend.delete("x")
    backend.put("x", b"2")
    assert backend.get("x") == b"2"


def test_one_of_eight_threads_wins(place):
    """The content is the winner's, whole."""
    rounds = 12
    backends = [place.open() for _ in range(8)]
    start = threading.Barrier(8)

    def contend(number: int) -> list[int]:
        won = []
        for turn in range(rounds):
            start.wait()
            try:
                backends[number].put(f"race/{turn}", bytes([number]) * (100 * KiB))
                won.append(turn)
            except AlreadyExists:
                pass
        return won

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(contend, range(8)))
    assert sorted(turn for won in wins for turn in won) == list(range(rounds))
    for number, won in enumerate(wins):
        for turn in won:
            assert backends[0].get(f"race/{turn}") == bytes([number]) * (100 * KiB)


CONTENDER = """
import sys
from appliance.errors import AlreadyExists
from appliance.store.backend import open_backend
url, number = sys.argv[1], sys.argv[2]
backend = open_backend(url)
list(backend.list())
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    try:
        backend.put(f"race/{turn}", number.encode() * 50000)
        print(turn)
    except AlreadyExists:
        pass
"""


def test_one_of_several_processes_wins(place):
    if place.url is None:
        pytest.skip(f"{place.name} is for one process")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, place.url, str(number)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for number in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    wins = [[int(turn) for turn in process.communicate(timeout=limit(20))[0].split()] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert sorted(turn for won in wins for turn in won) == list(range(20))
    backend = place.open()
    for number, won in enumerate(wins):
        for turn in won:
            assert backend.get(f"race/{turn}") == str(number).encode() * 50000


def test_an_object_is_whole_from_its_first_instant(place):
    size = 2 << 20
    writer, reader = place.open(), place.open()
    stop = threading.Event()
    seen: set[int] = set()

    def watch() -> None:
        while not stop.is_set():
            for info in reader.list("packs/"):
                seen.add(info.size)
                seen.add(len(reader.get(info.name)))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        for number in range(10):
            writer.put(f"packs/{number:032x}", bytes(size))
        stop.set()
        watching.result()
    assert seen <= {size}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_range_ends_where_the_object_ends(backend):
    content = b"0123456789"
    backend.put("x", content)
    for offset in (0, 1, 7, 9, 10, 11, 1000):
        for length in (None, 0, 1, 3, 10, 1000):
            assert backend.get("x", offset, length) == content[offset:][:length], (offset, length)


def test_a_range_of_an_empty_object_is_empty(backend):
    backend.put("x", b"")
    assert backend.get("x", 0, 5) == backend.get("x", 3) == b""


def test_what_is_not_there_is_named(backend):
    backend.put("a/b/c", b"")
    backend.put("file", b"")
    for name in ("nothing", "a/b/nothing", f"packs/{HEX}", "a", "a/b", "file/below"):
        for arguments in ((), (3, 0), (0, 1)):
            with pytest.raises(ObjectNotFound, match=name) as caught:
                backend.get(name, *arguments)
            assert caught.value.fields == {"url": backend.url, "name": name} | caught.value.fields
        with pytest.raises(ObjectNotFound, match=name):
            backend.stat(name)


def test_nothing_was_ever_put(backend):
    assert names(backend.list()) == names(backend.list("packs/")) == []
    backend.delete("x")
    with pytest.raises(ObjectNotFound):
        backend.stat("x")


def test_stat_and_list_agree(backend):
    backend.put(f"packs/{HEX}", b"12345")
    (info,) = backend.list()
    assert info == backend.stat(f"packs/{HEX}") or abs(info.modified - backend.stat(f"packs/{HEX}").modified) < 1
    assert (info.name, info.size) == (f"packs/{HEX}", 5)
    assert abs(info.modified - time.time()) < 60


def test_a_listing_is_sorted_and_chosen_by_text(backend):
    everything = sorted(
        ["config", "b_", "b-2", "b/1", "b/2", "b/2.d", "b0", "packs/ab/x", f"packs/ab/{HEX}", f"packs/{HEX}",
         "packs/" + "ff" * 16, "packs/" + "00" * 16, "packs/short", "points/1", "points/10", "points/2"]
    )  # fmt: skip
    for name in reversed(everything):
        backend.put(name, name.encode())
    for prefix in ("", "b", "b/", "b/2", "packs", "packs/", "packs/3f", "packs/ab/", "points/1", "nothing/", "config"):
        assert names(backend.list(prefix)) == [name for name in everything if name.startswith(prefix)], prefix
    for name in everything:
        assert backend.get(name) == name.encode()


def test_a_listing_holds_what_stays_exactly_once(place):
    backend, other = place.open(), place.open()
    stay = [f"packs/{number:032x}" for number in range(0, 60, 2)]
    for number in range(60):
        backend.put(f"packs/{number:032x}", b"")
    seen = []
    for info in backend.list("packs/"):
        if len(seen) % 2 == 0 and len(seen) < 60:
            other.delete(f"packs/{59 - len(seen):032x}")
        seen.append(info.name)
    assert len(seen) == len(set(seen))
    assert set(stay) <= set(seen)
    assert names(backend.list()) == stay


def test_delete_is_repeatable(backend):
    backend.put("a/b", b"")
    for _ in range(2):
        backend.delete("a/b")
    backend.delete("a/b/c")
    assert names(backend.list()) == []


def test_many_threads_share_one_backend(backend):
    def work(number: int) -> None:
        for turn in range(8):
            name = f"packs/{number:02x}{turn:030x}"
            backend.put(name, name.encode() * 1000)
            assert backend.get(name, 32 * 1000, 32) == (name.encode() * 1000)[32 * 1000 : 32 * 1001]
            if turn % 2:
                backend.delete(name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(names(backend.list("packs/"))) == 32


def test_closing_twice_is_allowed(place):
    backend = place.open()
    backend.put("x", b"")
    backend.close()
    backend.close()
    assert names(place.open().list()) == ["x"]


def test_capabilities_are_known(backend):
    backend.put("x", b"")
    assert backend.capabilities().create_only
    assert backend.capabilities().retention == 0


# --- names ------------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "", "/a", "a/", "a//b", "..", "a/../b", "a/.", ".tmp/x", "A", "a b", "a\\b", "a\0", "a?b", "a#b", "a%20b", "ä",
    "x" * 201, "a/" * 300 + "a", "a\n",
]  # fmt: skip


def test_names_that_would_be_changed_on_the_way_are_refused(backend):
    for name in BAD_NAMES:
        for call in (backend.get, backend.stat, backend.delete, lambda n: backend.put(n, b"")):
            with pytest.raises(ConfigError):
                call(name)
    assert names(backend.list()) == []


def test_names_that_are_used_are_allowed():
    for name in ("config", "packs/" + "0f" * 32, "points/2026-01-01t00.00.00z-ab_1", "-", "a..b"):
        assert check_name(name) == name


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def retrying(place, plan, **options):
    pauses = []
    faulty = Faulty(place.open(), plan, **options)
    return Retrying(faulty, sleep=pauses.append), faulty, pauses


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.LOSE, Fault.REPEAT])
def test_a_put_that_was_lost_or_sent_twice_ends_well(place, fault):
    """A9: nothing acknowledged is lost, nothing written is taken for somebody else's."""
    backend, _, pauses = retrying(place, at(1, fault))
    backend.put("points/1", b"manifest")
    assert place.open().get("points/1") == b"manifest"
    assert len(pauses) == (fault is not Fault.REPEAT)
    with pytest.raises(AlreadyExists):
        backend.put("points/1", b"another!")


@pytest.mark.parametrize("fault", [Fault.LOSE, Fault.REFUSE])
def test_somebody_else_is_never_taken_for_our_lost_put(place, fault):
    place.open().put("points/1", b"somebody else's")
    backend, _, _ = retrying(place, at(1, fault))
    for content in (b"somebody elSe's", b"shorter", b""):
        with pytest.raises(AlreadyExists):
            backend.put("points/1", content)
    assert place.open().get("points/1") == b"somebody else's"


def test_half_an_object_is_not_taken_for_ours(place):
    backend, _, _ = retrying(place, at(1, Fault.TEAR))
    with pytest.raises(AlreadyExists):
        backend.put("points/1", b"manifest")


def test_reads_and_deletes_are_repeated(place):
    place.open().put("x", b"content")
    backend, faulty, pauses = retrying(place, lambda op: Fault.LOSE if op.number % 2 else None)
    assert backend.get("x", 3) == b"tent"
    assert backend.stat("x").size == 7
    backend.delete("x")
    assert [op.kind for op in faulty.operations] == ["get"] * 2 + ["stat"] * 2 + ["delete"] * 2
    assert len(pauses) == 3


def test_a_listing_that_breaks_off_goes_on(place):
    everything = [f"points/{number:03d}" for number in range(40)]
    writer = place.open()
    for name in everything:
        writer.put(name, b"")
    backend, faulty, _ = retrying(place, lambda op: Fault.TEAR if op.number < 4 else None)
    assert names(backend.list("points/")) == everything
    assert len(faulty.operations) == 4


def test_patience_is_bounded_and_grows(place):
    backend, faulty, pauses = retrying(place, lambda op: Fault.REFUSE)
    for call in (lambda: backend.get("x"), lambda: backend.put("x", b""), lambda: names(backend.list())):
        faulty.operations.clear()
        pauses.clear()
        with pytest.raises(Temporary, match=place.open().url.partition("?")[0]):
            call()
        assert len(faulty.operations) == RETRY_ATTEMPTS
        assert len(pauses) == RETRY_ATTEMPTS - 1
        assert sum(pauses) < 30
        assert pauses[0] <= 0.1 < pauses[-1]


@pytest.mark.parametrize(("fault", "error"), [(Fault.NO_SPACE, NoSpace), (Fault.DENY, PermissionDenied)])
def test_what_no_other_try_mends_is_told_at_once(place, fault, error):
    backend, faulty, pauses = retrying(place, lambda op: fault)
    with pytest.raises(error, match="points/1"):
        backend.put("points/1", b"")
    assert (len(faulty.operations), pauses) == (1, [])
    assert names(place.open().list()) == []


def test_a_slow_place_is_only_slow(place):
    backend, _, pauses = retrying(place, lambda op: None, seconds=0.05)
    start = time.monotonic()
    backend.put("x", b"content")
    assert backend.get("x") == b"content"
    assert time.monotonic() - start >= 0.1
    assert pauses == []


@pytest.mark.parametrize(("fault", "there"), [(Fault.CRASH_BEFORE, False), (Fault.CRASH_AFTER, True)])
def test_after_a_crash_an_object_is_there_or_not(place, fault, there):
    """No handler of errors goes on after the process's death."""
    backend, _, _ = retrying(place, at(1, fault))
    with pytest.raises(Crashed):
        backend.put("x", b"content")
    with pytest.raises(Crashed):
        backend.stat("x")
    assert names(place.open().list()) == (["x"] if there else [])


def test_damage_is_what_was_asked_for(place):
    place.open().put("x", b"content!")
    faulty = Faulty(place.open(), lambda op: {1: Fault.FLIP, 2: Fault.LIE}.get(op.number))
    assert faulty.get("x") == b"cont" + bytes([ord("e") ^ 1]) + b"nt!"
    assert faulty.get("x") == b"cont"
    assert faulty.get("x") == b"content!"
