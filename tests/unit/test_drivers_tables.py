"""The tables of a kernel, patterns of aliases, and the order in which drivers are inserted."""

from __future__ import annotations

import itertools

import pytest

from appliance.errors import GuestUnreadable
from images.drivers.closure import close
from images.drivers.glob import Budget, Index, fits, normalise
from images.drivers.tables import Soft, merge, pack, parse, plain_path, tables_from_tree, unpack

RELEASE = "6.1.0-1-amd64"
DEP = b"""kernel/scsi/scsi_common.ko:
kernel/scsi/scsi_mod.ko.xz: kernel/scsi/scsi_common.ko
kernel/scsi/sd_mod.ko.xz: kernel/lib/t10-pi.ko.xz kernel/scsi/scsi_mod.ko.xz kernel/scsi/scsi_common.ko
kernel/lib/t10-pi.ko.xz:
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko
kernel/fs/jbd2/jbd2.ko:
kernel/crypto/crc32c_generic.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
"""
ALIAS = b"""# Aliases extracted from modules themselves.
alias scsi:t-0x00* sd_mod
alias fs-ext4 ext4
alias crypto-crc32c crc32c_intel
alias crypto-crc32c crc32c_generic
alias pci:v00001000d00000060sv*sd*bc*sc*i* megaraid_sas
"""
FILES = {
    "modules.dep": DEP,
    "modules.alias": ALIAS,
    "modules.softdep": b"softdep ext4 pre: crypto-crc32c\nsoftdep jbd2 pre: crypto-crc32c nobody-has-this\n",
    "modules.builtin": b"kernel/drivers/nvme/host/nvme.ko\nkernel/fs/fat/vfat.ko\n",
    "modules.builtin.modinfo": b"vfat.alias=fs-vfat\0vfat.license=GPL\0nvme.author=x\0",
}


class Files:
    """A guest's folder of modules."""

    def __init__(self, files):
        self.files = files

    def read(self, path, limit):
        folder, _, name = path.rpartition("/")
        assert folder == f"/usr/lib/modules/{RELEASE}"
        data = self.files.get(name)
        if data is None:
            raise FileNotFoundError(path)
        if len(data) > limit:
            raise GuestUnreadable(what=path, reason="too large")
        return data


def graph(edges, soft="", builtin=()):
    """Tables of modules a, b, …: `a: b c` needs b and c."""
    names = {}
    for line in edges.split(","):
        name, _, needs = line.strip().partition(":")
        names[name] = needs.split()
    paths = {name: " ".join(f"k/{one}.ko" for one in reversed(needs)) for name, needs in names.items()}
    dep = "".join(f"k/{name}.ko: {needs}\n" for name, needs in paths.items())
    files = {
        "modules.dep": dep.encode(),
        "modules.softdep": soft.encode(),
        "modules.builtin": "".join(f"k/{name}.ko\n" for name in builtin).encode(),
    }
    return parse(RELEASE, files)


def order(tables, *names):
    return [module.name for module in close(tables, names).load]


# --- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("pci:v00008086d*sv*sd*bc*sc*i*", "pci:v00008086d00000001sv00000000sd00000000bc01sc06i01", True),
        ("pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00000001sv00000000sd00000000bc01sc06i01", True),
        ("pci:v*d*sv*sd*bc01sc06i01*", "pci:v00008086d00000001sv00000000sd00000000bc01sc08i02", False),
        ("usb:v0421p0485d010[0-9]dc*", "usb:v0421p0485d0105dc00", True),
        ("usb:v0421p0485d010[0-9]dc*", "usb:v0421p0485d010Adc00", False),
        ("a[!b]c", "abc", False),
        ("a[!b]c", "axc", True),
        ("a[]]c", "a]c", True),
        ("a[b", "a[b", True),  # a bracket without an end stands for itself
        ("*", "", True),
        ("a*a", "a", False),
        ("*ab?d*", "xxabcabzd!", True),
        ("", "", True),
        ("", "a", False),
    ],
)
def test_patterns(pattern, text, expected):
    assert fits(pattern, text) is expected


def test_dashes_and_underscores_are_one_but_in_brackets():
    assert normalise("crypto-xts[a-f]-x") == "crypto_xts[a-f]_x"


def test_the_index_gives_names_in_the_order_of_the_table():
    index = Index([("a*", "second"), ("ab", "first"), ("a*b", "second"), ("b*", "no")], "t")
    assert index.match("ab", Budget()) == ("second", "first")


def test_a_table_that_costs_too_much_is_refused():
    """I5: the budget ends what the matcher cannot make cheap."""
    index = Index([("x*" + "?a" * 500 + f"*{number}", "m") for number in range(1000)], "modules.alias of kernel k")
    with pytest.raises(GuestUnreadable, match=r"modules.alias of kernel k cannot be read: its patterns take too long"):
        index.match("x" + "a" * 1000, Budget(1_000_000))


# --- tables ---------------------------------------------------------------------------------------------------------


def test_tables_of_a_guest():
    tables = tables_from_tree(Files(FILES), f"/usr/lib/modules/{RELEASE}/")
    assert tables.release == RELEASE
    assert tables.modules["t10_pi"].path == "kernel/lib/t10-pi.ko.xz"
    assert tables.modules["sd_mod"].depends == ("scsi_common", "scsi_mod", "t10_pi")
    assert tables.builtin == {"nvme", "vfat"}
    assert tables.soft["ext4"] == Soft(("crypto-crc32c",), ())
    assert tables.match("scsi:t-0x00") == ("sd_mod",)
    assert tables.resolve("fs-vfat") == ("vfat",)
    assert tables.resolve("crc32c-intel") == ("crc32c_intel",)
    # An alias of a driver whose file is not there is none that could be used.
    alias = "pci:v00001000d00000060sv00000000sd00000000bc01sc04i00"
    assert tables.match(alias) == () and tables.named(alias) == ("megaraid_sas",)


@pytest.mark.parametrize("name", ["modules.dep", "modules.alias"])
def test_a_guest_without_a_necessary_table_is_refused(name):
    files = {key: value for key, value in FILES.items() if key != name}
    with pytest.raises(GuestUnreadable, match=f"there is no {name}"):
        tables_from_tree(Files(files), f"/usr/lib/modules/{RELEASE}")


def test_tables_survive_packing():
    """P6-08: the template keeps its own."""
    tables = parse(RELEASE, FILES)
    again = unpack(pack(tables))
    assert again.modules == tables.modules and again.builtin == tables.builtin and again.soft == tables.soft
    assert again.match("crypto-crc32c") == ("crc32c_intel", "crc32c_generic")
    assert pack(again) == pack(tables)
    with pytest.raises(GuestUnreadable, match="damaged"):
        unpack(pack(tables)[:-9])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"modules.alias": b"alias " + b"*a" * 2000 + b" evil\n"}, "more than 2048 characters"),
        ({"modules.dep": b"x" * (9 << 20)}, "more than 8388608 bytes"),
        ({"modules.dep": b"k/a.ko:" + b" k/b.ko" * 20_000}, "line 1 has more than 65536 characters"),
        ({"modules.softdep": b"\n" * 300_000}, "more than 250000 lines"),
    ],
)
def test_tables_beyond_the_limits_are_refused(files, reason):
    """I5: giant or malformed tables."""
    with pytest.raises(GuestUnreadable, match=reason):
        parse(RELEASE, files)


def test_a_release_that_is_none_is_refused():
    with pytest.raises(GuestUnreadable, match=r"'\.\.' is no kernel release"):
        parse("..", FILES)


def test_paths_that_lead_out_are_left_out_and_told():
    """I5: no path of a table is ever followed out of the folder."""
    tables = parse(RELEASE, {"modules.dep": b"../../etc/x.ko:\n/etc/y.ko:\nk/../z.ko:\nk/ok.ko:\nk/no.so:\n"})
    assert list(tables.modules) == ["ok"]
    assert tables.notes == ("4 modules of kernel 6.1.0-1-amd64 have unusable paths and are left out",)
    assert not plain_path("k/./a.ko") and not plain_path("k//a.ko") and not plain_path("a\n.ko")


def test_of_two_modules_the_clients_own_counts():
    """P6-11: the store only fills gaps."""
    client, store = graph("a: b, b"), graph("a, c: a")
    merged = merge(client, store)
    assert merged.modules["a"] is client.modules["a"] and merged.modules["c"] is store.modules["c"]


def test_tables_of_another_release_are_never_merged():
    with pytest.raises(ValueError, match=r"kernel 7\.0 cannot be used with 6\.1\.0-1-amd64"):
        merge(graph("a"), parse("7.0", {"modules.dep": b"k/a.ko:\n"}))


# --- closure --------------------------------------------------------------------------------------------------------


def test_dependencies_come_first():
    tables = parse(RELEASE, FILES)
    closure = close(tables, ["sd_mod", "ext4"])
    assert [module.name for module in closure.load] == [
        "scsi_common", "scsi_mod", "t10_pi", "sd_mod", "crc32c_intel", "crc32c_generic", "jbd2", "ext4",
    ]  # fmt: skip
    assert closure.wanted_by["t10_pi"] == "sd_mod" and closure.wanted_by["ext4"] == ""
    assert closure.missing == ()  # nobody has `nobody-has-this`, and nobody must


def test_built_in_dependencies_are_skipped_and_missing_ones_named():
    closure = close(graph("a: b c d, b", builtin=["c"]), ["a"])
    assert [module.name for module in closure.load] == ["b", "a"]
    assert closure.built_in == ("c",) and closure.missing == (("d", "a"),)


def test_soft_dependencies_before_and_behind():
    assert order(graph("a, b, c", soft="softdep a pre: b post: c\n"), "a") == ["b", "a", "c"]


def test_a_soft_wish_gives_way_to_a_hard_need():
    """a would like b before it, but b cannot be inserted before a."""
    assert order(graph("a, b: a", soft="softdep a pre: b\n"), "a") == ["a", "b"]


def test_circles_survive():
    assert sorted(order(graph("a: b, b: c, c: a"), "a")) == ["a", "b", "c"]
    assert order(graph("a: a"), "a") == ["a"]


def test_a_long_chain_needs_no_deep_stack():
    names = [f"m{number}" for number in range(1500)]
    edges = ", ".join(f"{a}: {b}" for a, b in itertools.pairwise(names)) + f", {names[-1]}"
    assert order(graph(edges), "m0") == names[::-1]


def test_a_closure_without_end_is_refused():
    names = [f"m{number}" for number in range(2500)]
    edges = ", ".join(f"{a}: {b}" for a, b in itertools.pairwise(names)) + f", {names[-1]}"
    with pytest.raises(GuestUnreadable, match="m0 and others need over 2000 modules"):
        close(graph(edges), ["m0"])
