"""Packages and modules that are damaged or lead astray; the driver store is as before."""

from __future__ import annotations

import io
import struct
import tarfile

import pytest

from appliance.errors import GuestUnreadable
from images.drivers.glob import Budget
from images.drivers.store import DriversRefused, DriverStore

RELEASE = "6.1.0-1-amd64"


def module(name="odd", release=RELEASE, **words) -> bytes:
    """The smallest ELF file that has what a module says about itself."""
    said = {"name": name, "vermagic": f"{release} SMP mod_unload", "alias": "pci:v0000ABCDd*", **words}
    info = b"".join(f"{key}={value}".encode() + b"\0" for key, value in said.items())
    texts = b"\0.modinfo\0.shstrtab\0"
    header = 64
    table = header + len(info) + len(texts)
    section = struct.Struct("<IIQQQQIIQQ")
    sections = (
        section.pack(*[0] * 10)
        + section.pack(1, 1, 0, 0, header, len(info), 0, 0, 1, 0)
        + section.pack(10, 3, 0, 0, header + len(info), len(texts), 0, 0, 1, 0)
    )
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    return elf + info + texts + sections


def deb(members, name="data.tar", links=()) -> bytes:
    """A Debian package with these files, whatever their paths."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for link, target in links:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for path, data in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    content = inner.getvalue()
    out = b"!<arch>\n"
    for part, data in (("debian-binary", b"2.0\n"), (name, content)):
        out += f"{part:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def cpio(members) -> bytes:
    out = b""
    for number, (path, mode, data) in enumerate([*members, ("TRAILER!!!", 0, b"")]):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path.encode() + b"\0"
        out += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    return out


def rpm(payload: bytes) -> bytes:
    header = struct.pack(">4s4sII", b"\x8e\xad\xe8\x01", bytes(4), 0, 0)
    return b"\xed\xab\xee\xdb" + bytes(92) + header + header + payload


@pytest.fixture
def store(tmp_path):
    return DriverStore(tmp_path / "store")


@pytest.fixture
def add(store, tmp_path):
    def put(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return store.add(path)

    return put


def refused(add, store, tmp_path, name, data, reason):
    with pytest.raises((DriversRefused, GuestUnreadable), match=reason):
        add(name, data)
    assert store.list() == () and list((tmp_path / "store").iterdir()) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([name, "store"])


@pytest.mark.parametrize("wrap", [deb, lambda files: rpm(cpio([(k, 0o100644, v) for k, v in files.items()]))])
def test_a_module_may_lie_anywhere_in_a_package(add, store, wrap):
    files = {f"./lib/modules/{RELEASE}/updates/dkms/odd.ko": module(), "opt/more.ko": module("more")}
    added = add("p.pkg", wrap(files))
    assert (added.release, added.modules) == (RELEASE, 2) and added.name.startswith("p.pkg-")
    (tables,) = store.tables(RELEASE)
    assert {one.path for one in tables.modules.values()} == {"updates/dkms/odd.ko", "extra/more.ko"}
    assert set(tables.match("pci:v0000ABCDd00000001", Budget())) == {"odd", "more"}


def test_what_a_module_says_becomes_tables(add, store):
    add("odd.ko", module(depends="libata,snd-x", softdep="pre: a-b post: c"))
    (tables,) = store.tables(RELEASE)
    odd = tables.modules["odd"]
    assert odd.depends == ("libata", "snd_x") and odd.signed is False
    assert (tables.soft["odd"].before, tables.soft["odd"].behind) == (("a-b",), ("c",))


OUT = ["../../etc/x.ko", f"lib/modules/{RELEASE}/../../../x.ko", f"lib/modules/{RELEASE}/..x/../a.ko"]


@pytest.mark.parametrize("path", OUT)
def test_paths_that_lead_out_are_refused(add, store, tmp_path, path):
    """I5"""
    refused(add, store, tmp_path, "p.deb", deb({"ok.ko": module(), path: module()}), "leads out of it")


def test_links_in_a_package_are_not_followed(add, store, tmp_path):
    """I5: neither a module that is a link, nor a folder that leads elsewhere."""
    out = tmp_path / "out"
    out.mkdir()
    add("p.deb", deb({"lib/modules/x.ko": module()}, links=[("lib/modules", str(out)), ("y.ko", "/etc/passwd")]))
    assert list(out.iterdir()) == []
    (tables,) = store.tables(RELEASE)
    assert list(tables.modules) == ["x"]  # as depmod: the file's name, whatever it says about itself


def test_links_in_a_folder_are_not_followed(store, tmp_path):
    folder = tmp_path / "drivers"
    folder.mkdir()
    (tmp_path / "secret.ko").write_bytes(module("secret"))
    (folder / "link.ko").symlink_to(tmp_path / "secret.ko")
    with pytest.raises(DriversRefused, match="no kernel modules"):
        store.add(folder)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("p.deb", b"!<arch>\n", r"it has no data\.tar"),
        ("p.deb", deb({"a.ko": module()})[:400], "it is damaged"),
        ("p.deb", deb({"a.ko": module()}, name="data.tar.xz"), "it is damaged"),
        ("p.deb", deb({"readme": b"x"}), "no kernel modules"),
        ("p.rpm", rpm(b"")[:100], "it is damaged"),
        ("p.rpm", rpm(b"garbage"), "packed in an unknown way"),
        ("p.rpm", rpm(cpio([("a.ko", 0o100644, module())])[:200]), "it ends too early"),
        ("p.rpm", rpm(cpio([("a.ko", 0o120777, b"/etc/passwd")])), "no kernel modules"),
        ("p.zip", b"PK\x03\x04", r"it is no folder, \.deb, \.rpm or module"),
        ("a.ko", b"\x7fELF", "no ELF file of a module"),
        ("a.ko", module()[:-200], "no ELF file of a module"),
        ("a.ko.xz", module(), "cannot be decompressed"),
        ("a.ko", module(vermagic=""), "no vermagic"),
        ("a b.ko", module(), "no usable path"),
        ("p.deb", deb({"a.ko": module("a"), "b.ko": module("b", "5.10.0")}), r"several kernels: 5\.10\.0, 6\.1"),
        ("p.deb", deb({"x/a.ko": module(), "y/a.ko": module()}), "two modules for extra/a.ko"),
        ("p.deb", deb({"lib/modules/5.10.0/kernel/a.ko": module()}), r"vermagic, and lies in the folder of 5\.10\.0"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_nothing(add, store, tmp_path, name, data, reason):
    """I3, I5"""
    refused(add, store, tmp_path, name, data, reason)


def test_there_is_no_such_path(store, tmp_path):
    with pytest.raises(DriversRefused, match="No such file"):
        store.add(tmp_path / "nothing")


def test_a_record_that_was_edited_does_not_bring_another_kernels_module(add, store, tmp_path):
    """I3: vermagic is asked again when a plan is made."""
    add("odd.ko", module())
    (record,) = (tmp_path / "store").glob("*/*/drivers.json")
    record.write_text(record.read_text().replace(f'"vermagic": "{RELEASE}', '"vermagic": "5.10.0'))
    assert store.tables(RELEASE)[0].modules == {}
