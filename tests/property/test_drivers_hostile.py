"""Tables and modules that nobody's kernel has: they are refused or used, and never hang, crash or put out of order."""

from __future__ import annotations

import contextlib
import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import GuestUnreadable
from images.drivers import modinfo
from images.drivers.closure import close
from images.drivers.glob import Budget, Index, fits
from images.drivers.plan import make_plan
from images.drivers.tables import FILES, Module, Soft, Tables, pack, parse, unpack
from images.model import Client, Device, Firmware, Generator, Inventory, Layer, Root, Verdict

RELEASE = "6.1.0-1-amd64"
NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
NAMES = [f"m{number}" for number in range(8)]
names = st.sampled_from(NAMES)
PATTERNS = st.text("ab*?[]-!", max_size=12)


# --- patterns -------------------------------------------------------------------------------------------------------


@given(PATTERNS, st.text("ab-]!", max_size=12))
@settings(max_examples=500, deadline=None)
def test_patterns_mean_what_the_standard_librarys_mean(pattern, text):
    """For patterns on which both agree what a bracket is; fnmatch swaps nothing in `[b-a]` and calls it empty."""
    assert fits(pattern, text) == fnmatch.fnmatchcase(text, pattern)


SLOW = ["*a" * 1000 + "b", "*" * 2000 + "b", "?*" * 1000 + "b", "*[ab]" * 400 + "c", "[" * 2000]


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_takes_long(pattern):
    """I5: with a matcher that goes back the first would never end."""
    assert fits(pattern, "a" * 2000) is False


@given(st.lists(st.tuples(PATTERNS, names), max_size=10), st.text("ab-", max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_index_finds_what_a_search_of_all_finds(pairs, alias):
    pairs = [(pattern.replace("-", "_"), name) for pattern, name in pairs]
    alias = alias.replace("-", "_")
    expected = tuple(dict.fromkeys(name for pattern, name in pairs if fits(pattern, alias)))
    assert Index(pairs, "t").match(alias, Budget()) == expected


# --- tables ---------------------------------------------------------------------------------------------------------


@given(st.fixed_dictionaries({name: st.binary(max_size=400) for name in FILES}))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_tables_or_refused(files):
    with contextlib.suppress(GuestUnreadable):
        tables = parse(RELEASE, files)
        tables.match(NVME)
        assert unpack(pack(tables)).modules == tables.modules


LINES = st.lists(st.text("kmab01 :/.*?[]-\n\0=", max_size=40), max_size=20).map("\n".join).map(str.encode)
WORDS = st.sampled_from(
    [
        b"k/m0.ko: k/m1.ko", b"k/m1.ko: k/m0.ko", b"../x.ko:", b"k/nvme.ko", b"alias * m0", b"alias pci:v*[ m1",
        b"alias fs-ext4 m1", b"softdep m0 pre: m1 * post: m0", b"softdep m1 pre: pci:*",
    ]
)  # fmt: skip


@given(st.fixed_dictionaries({name: LINES | st.lists(WORDS, max_size=9).map(b"\n".join) for name in FILES}))
@settings(max_examples=200, deadline=None)
def test_a_plan_with_hostile_tables_ends(files):
    """I5"""
    with contextlib.suppress(GuestUnreadable):
        tables = parse(RELEASE, files)
        root = Root("UUID=1", "ext4", "1", ("vda",), (Layer.PARTITION,))
        client = Client("h", "d", "D", RELEASE, "/k", "/i", "/m", "", root, Generator.UNKNOWN, Firmware.BIOS)
        devices = (Device(modalias=NVME, carries=("vda",)), Device(modalias="scsi:t-0x00"))
        target = Inventory(name="t", source="qemu", firmware=Firmware.BIOS, devices=devices)
        plan = make_plan(client, tables, target, tables)
        inside = [one.path for one in plan.decisions if one.verdict is Verdict.IN]
        assert inside == list(plan.load)
        assert not any(path.startswith("/") or ".." in path.split("/") for path in inside)


def test_the_worst_tables_that_are_allowed_end():
    """I5: 100 000 patterns that all must be tried, none of them cheap."""
    pattern = b"alias pci:v" + b"*a?" * 30 + b"* m\n"
    tables = parse(RELEASE, {"modules.alias": pattern * 100_000})
    with pytest.raises(GuestUnreadable, match="take too long to compare"):
        tables.match("pci:v" + "a" * 1000)


# --- order ----------------------------------------------------------------------------------------------------------


def tables_of(hard, soft):
    modules = {name: Module(name, f"k/{name}.ko", tuple(hard.get(name, ()))) for name in NAMES}
    return Tables(RELEASE, modules, frozenset(), {name: Soft(*pair) for name, pair in soft.items()}, ())


acyclic = st.dictionaries(names, st.lists(names, max_size=4)).map(
    lambda graph: {name: [one for one in needs if one < name] for name, needs in graph.items()}
)
tuples = st.lists(names, max_size=3).map(tuple)
softly = st.dictionaries(names, st.tuples(tuples, tuples))
asked = st.lists(names, min_size=1, max_size=4)


@given(acyclic, softly, asked)
@settings(max_examples=300, deadline=None)
def test_the_order_is_topological_whatever_the_soft_ones_say(hard, soft, wanted):
    """Every module stands behind all that it depends on, once, and everything that was asked for is there."""
    load = [module.name for module in close(tables_of(hard, soft), wanted).load]
    assert len(load) == len(set(load)) and set(wanted) <= set(load)
    for number, name in enumerate(load):
        assert set(hard.get(name, ())) <= set(load[:number])


@given(acyclic, asked)
@settings(max_examples=200, deadline=None)
def test_nothing_goes_in_that_nobody_needs(hard, wanted):
    expected, waiting = set(), list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in expected:
            expected.add(name)
            waiting += hard.get(name, ())
    assert {module.name for module in close(tables_of(hard, {}), wanted).load} == expected


@given(st.dictionaries(names, st.lists(names, max_size=4)), softly, asked)
@settings(max_examples=300, deadline=None)
def test_circles_lose_nothing(hard, soft, wanted):
    load = [module.name for module in close(tables_of(hard, soft), wanted).load]
    assert len(load) == len(set(load))
    assert set(load) >= set(wanted) | {one for name in load for one in hard.get(name, ())}


# --- modules --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.sampled_from(["", ".xz", ".gz", ".zst"]))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_module(data, suffix):
    with pytest.raises(GuestUnreadable):
        modinfo.read(f"a.ko{suffix}", data)


@given(st.binary(min_size=58, max_size=200))
@settings(max_examples=300, deadline=None)
def test_a_damaged_elf_header_is_refused(rest):
    """Offsets and sizes that lead anywhere."""
    with contextlib.suppress(GuestUnreadable):
        modinfo.read("a.ko", b"\x7fELF\x02\x01" + rest[:52] + b"\x40\x00" + rest[52:])
