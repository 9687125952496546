"""Sizes and durations, in both directions."""

from __future__ import annotations

import pytest

from appliance.units import (
    CHUNK,
    GiB,
    KiB,
    MiB,
    chunks_of,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64k", 64 * KiB), ("1.5 GiB", 3 * GiB // 2), ("10G", 10 * GiB), (" 2 MB ", 2 * MiB)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1x", "k", "1 2", "nan", "1e3"])
def test_what_is_no_size_is_refused_with_the_text(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("500ms", 0.5), ("15m", 900), ("1h30m", 5400), ("1d 2h", 93600), ("1w", 604800),
     ("2 days", 172800), ("3 min", 180), ("1 hour 30 minutes", 5400), ("10mins", 600), ("5 secs", 5), ("2 hrs", 7200)],
)  # fmt: skip
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "1x", "1h30", "soon", "1h-5m", "-5", "nan", "inf", "1e3", "2 months"])
def test_what_is_no_duration_is_refused_with_the_text(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1000, "1000 B"), (CHUNK, "64 KiB"), (1023 * KiB, "1023 KiB"), (3 * GiB // 2, "1.5 GiB")],
)
def test_sizes_are_written(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (3.4, "3.4 s"), (125, "2 m 05 s"), (3840, "1 h 04 m"), (266400, "3 d 02 h"),
     (60, "1 m"), (900, "15 m"), (3600, "1 h"), (3605, "1 h"), (172800, "2 d")],
)  # fmt: skip
def test_durations_are_written(seconds, text):
    assert format_duration(seconds) == text


def test_the_last_chunk_may_be_partly_beyond_the_end():
    assert [chunks_of(size) for size in (0, 1, CHUNK, CHUNK + 1)] == [0, 1, 1, 2]
