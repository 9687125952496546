"""What the wrappers add: fewer requests, a rate, counts."""

from __future__ import annotations

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import ObjectNotFound, Temporary
from appliance.store.backend.ahead import LONGEST, NEAR, SHORTEST, WINDOWS, ReadingAhead
from appliance.store.backend.faulty import Fault, Faulty
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.wrap import Counting, Counts, Limited

KiB = 1 << 10
MiB = 1 << 20
PACK = random.Random(1).randbytes(8 * MiB)
numbers = itertools.count()


def packs(count=1, content=PACK):
    backend = MemoryBackend(f"wrappers-{next(numbers)}")
    for number in range(count):
        backend.put(f"packs/{number}", content)
    return backend


def ranges(size=27 * KiB, content=PACK):
    return [(start, min(size, len(content) - start)) for start in range(0, len(content), size)]


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_a_stream_takes_few_requests():
    """P5-15: a cold read of an instant needs few requests."""
    counting = Counting(packs())
    backend = ReadingAhead(counting)
    for start, length in ranges():
        assert backend.get("packs/0", start, length) == PACK[start : start + length]
    assert len(ranges()) == 304
    assert counting.counts.gets <= 9
    assert counting.counts.bytes_read == len(PACK)


def test_a_stream_that_is_a_little_out_of_order_does_too():
    """As several threads write a pack."""
    counting = Counting(packs())
    backend = ReadingAhead(counting)
    mixed = [one for four in zip(*[iter(ranges())] * 4, strict=True) for one in random.Random(2).sample(four, 4)]
    for start, length in mixed:
        assert backend.get("packs/0", start, length) == PACK[start : start + length]
    assert counting.counts.gets <= 25
    assert counting.counts.bytes_read < 1.1 * len(PACK)


def test_many_threads_share_what_is_under_way():
    counting = Counting(Faulty(packs(), lambda _: None, seconds=0.005))
    backend = ReadingAhead(counting)
    with ThreadPoolExecutor(16) as pool:
        read = list(pool.map(lambda one: backend.get("packs/0", *one), ranges()))
    assert b"".join(read) == PACK
    assert counting.counts.gets <= 30
    assert counting.counts.bytes_read < 1.5 * len(PACK)


def test_scattered_reads_cost_what_they_cost():
    counting = Counting(packs(50))
    backend = ReadingAhead(counting)
    asked = 0
    rng = random.Random(3)
    for _ in range(500):
        name, start = f"packs/{rng.randrange(50)}", rng.randrange(len(PACK) - 27 * KiB)
        assert backend.get(name, start, 27 * KiB) == PACK[start : start + 27 * KiB]
        asked += 27 * KiB
    assert counting.counts.gets <= 500
    assert counting.counts.bytes_read < 3 * asked


def test_memory_is_bounded():
    backend = ReadingAhead(packs(4), memory=3 * MiB)
    for name in range(4):
        for start, length in ranges():
            backend.get(f"packs/{name}", start, length)
            assert backend._held <= 3 * MiB
    held = [window for windows in backend._windows.values() for window in windows]
    assert sum(len(window.data) for window in held) == backend._held
    assert all(len(windows) <= WINDOWS for windows in backend._windows.values())


def test_a_failure_is_only_the_failing_callers():
    """Who waits for a request that fails asks himself."""
    inner = Faulty(packs(), lambda operation: Fault.REFUSE if operation.number == 1 else None, seconds=0.02)
    backend = ReadingAhead(inner)
    results: list = []

    def read() -> None:
        try:
            results.append(backend.get("packs/0", 0, 1000))
        except Temporary as error:
            results.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sorted(type(result).__name__ for result in results) == ["Temporary", "bytes", "bytes", "bytes"]
    assert len(inner.operations) == 2


def test_what_was_deleted_is_gone():
    backend = ReadingAhead(packs())
    backend.get("packs/0", 0, 1000)
    backend.delete("packs/0")
    with pytest.raises(ObjectNotFound):
        backend.get("packs/0", 0, 1000)
    assert backend._held == 0


def test_whole_objects_pass_through():
    counting = Counting(packs())
    backend = ReadingAhead(counting)
    assert backend.get("packs/0") == backend.get("packs/0", 0, len(PACK)) == PACK
    assert backend.get("packs/0", 5, 0) == b""
    assert counting.counts.gets == 3


SMALL = PACK[: 1 * MiB + 12345]
OFFSETS = st.one_of(
    st.integers(0, len(SMALL) + 1000),
    st.sampled_from([0, 1, SHORTEST, NEAR, len(SMALL) - 1, len(SMALL), len(SMALL) + 1, LONGEST, 2 * LONGEST]),
)
LENGTHS = st.one_of(st.none(), st.integers(0, 300 * KiB), st.just(LONGEST), st.just(LONGEST + 1))


@given(st.lists(st.tuples(OFFSETS, LENGTHS, st.booleans()), max_size=25), st.integers(0, 2 * MiB))
@settings(max_examples=150, deadline=None)
def test_any_order_of_ranges_is_right(wanted, memory):
    """`True`: the range goes on where the one before ended."""
    backend = ReadingAhead(packs(1, SMALL), memory=memory)
    end = 0
    for offset, length, goes_on in wanted:
        start = end if goes_on else offset
        assert backend.get("packs/0", start, length) == SMALL[start:][:length]
        end = start + (length or 0)


# --- counting, limiting -----------------------------------------------------------------------------------------------


def test_counts_are_of_attempts_and_of_bytes_that_went_through():
    backend = Counting(Faulty(packs(), lambda operation: Fault.REFUSE if operation.number == 2 else None))
    backend.get("packs/0", 0, 100)
    with pytest.raises(Temporary):
        backend.get("packs/0", 0, 100)
    backend.put("x", b"12345")
    backend.stat("x")
    list(backend.list())
    backend.delete("x")
    assert backend.counts == Counts(2, 1, 1, 1, 1, bytes_read=100, bytes_written=5)
    assert backend.counts.requests == 6


def test_a_rate_is_kept_over_all_threads():
    pauses: list[float] = []
    backend = Limited(packs(0), rate=1 * MiB, sleep=pauses.append)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: backend.put(f"x/{number}", bytes(64 * KiB)), range(16)))
    backend.get("x/0")
    assert max(pauses) == pytest.approx(1.0, abs=0.1 + time.monotonic() - start)
    assert pauses == sorted(pauses) or len(pauses) == 16
