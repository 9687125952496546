"""Arithmetic on lists of extents, compared with sets of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from appliance.extents import Extent, align, intersect, merge, of_chunks, total, union

SIZE = 200


@st.composite
def lists(draw, zeroes=True):
    """A sorted list without overlaps."""
    cuts = sorted(draw(st.sets(st.integers(0, SIZE), max_size=12)))
    found = []
    for low, high in itertools.pairwise(cuts):
        if draw(st.booleans()):
            found.append(Extent(low, high - low, zero=zeroes and draw(st.booleans())))
    return found


def bytes_of(extents):
    return {(position, extent.zero) for extent in extents for position in range(extent.offset, extent.end)}


def positions(extents):
    return {position for position, _zero in bytes_of(extents)}


def assert_a_list(extents):
    for one, two in itertools.pairwise(extents):
        assert one.end <= two.offset
    assert all(extent.length > 0 for extent in extents)


@given(lists())
def test_merge_keeps_every_byte_and_its_kind(extents):
    merged = list(merge(extents))
    assert_a_list(merged)
    assert bytes_of(merged) == bytes_of(extents)
    for one, two in itertools.pairwise(merged):
        assert one.end < two.offset or one.zero != two.zero


@given(lists(), lists(), lists())
def test_union_is_every_byte_of_any(a, b, c):
    """P5-21: the union of what changed between neighbours is what may differ between the ends."""
    found = list(union(a, b, c))
    assert_a_list(found)
    assert positions(found) == positions(a) | positions(b) | positions(c)
    assert total(found) == len(positions(found))
    assert all(one.end < two.offset for one, two in itertools.pairwise(found))


@given(lists(), st.integers(0, SIZE), st.integers(0, SIZE))
def test_intersect_cuts_and_keeps_the_kind(extents, start, end):
    found = list(intersect(extents, start, end))
    assert bytes_of(found) == {one for one in bytes_of(extents) if start <= one[0] < end}


@given(lists(), st.sampled_from([1, 4, 16, 64]), st.integers(0, SIZE))
def test_align_grows_to_whole_units_inside_the_disk(extents, unit, size):
    found = list(align(extents, unit, size))
    assert_a_list(found)
    expected = {
        position
        for extent in extents
        for touched in range(extent.offset // unit, -(-extent.end // unit))
        for position in range(touched * unit, (touched + 1) * unit)
        if extent.offset < size and position < size
    }
    assert positions(found) == expected


@given(st.sets(st.integers(0, 30)), st.integers(0, SIZE))
def test_chunks_become_extents_cut_at_the_end(indexes, size):
    found = list(of_chunks(sorted(indexes), 8, size))
    assert_a_list(found)
    assert positions(found) == {p for index in indexes for p in range(index * 8, index * 8 + 8) if p < size}
