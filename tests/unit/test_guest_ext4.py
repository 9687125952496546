"""The ext4 reader against what mkfs wrote, the walker's paths, and what it refuses."""

import contextlib
import os
import random
import struct
import subprocess

import pytest

from appliance.errors import GuestUnreadable
from images.guest.files import Unsupported, Walker
from images.guest.journal import _Journal, open_ext4
from images.tree import Kind
from tests.support.guestdisk import Link, ext4, image_of, walked, write_tree

OPTIONS = {
    "ext4": (),
    "ext4-1k": ("-b", "1024"),
    "ext4-32bit": ("-b", "1024", "-O", "^64bit,^metadata_csum"),
    "meta_bg": ("-b", "1024", "-O", "meta_bg,^resize_inode", "-g", "1024"),
    "ext3": ("-t", "ext3", "-b", "2048"),
    "ext2": ("-t", "ext2", "-b", "1024", "-I", "128"),
    "bigalloc": ("-O", "bigalloc", "-C", "65536"),
}


def source(folder):
    """Files of every size that takes another way: short and long links, holes, three steps of block lists."""
    noise = random.Random(5)
    write_tree(folder, {
        "/etc/empty": "",
        "/etc/one": "1",
        "/etc/näme with spaces": "x" * 5000,
        "/usr/lib/big": noise.randbytes(5 << 20),
        "/lib": Link("usr/lib"),
        "/long": Link("/" + "../" * 30 + "usr/lib/big"),
        **{f"/many/{number:04}-{'n' * (number % 100)}": str(number) for number in range(1500)},
    })  # fmt: skip
    with (folder / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(9 << 20)
        file.write(b"end")
    return folder


def tree_of(image):
    tree = Walker()
    tree.mount("/", open_ext4(image_of(image)))
    return tree


def everything(tree, path=""):
    """As `guestdisk.walked`, by the reader."""
    found = {}
    for name in tree.list(path or "/"):
        child = f"{path}/{name}"
        kind = tree.kind(child)
        if kind is Kind.FOLDER:
            found[child] = None
            if child != "/lost+found":
                found.update(everything(tree, child))
        elif kind is Kind.FILE:
            found[child] = tree.read(child, 64 << 20)
    found.pop("/lost+found", None)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_file_is_as_it_was_written(tmp_path, options):
    folder = source(tmp_path / "source")
    tree = tree_of(ext4(tmp_path / "image", folder, *options, size=192 << 20))
    written = {path: content for path, content in walked(folder).items() if not isinstance(content, str)}
    assert everything(tree) == written
    assert tree.resolve("/long") == "/usr/lib/big"
    assert tree.read("/long", 8 << 20) == written["/usr/lib/big"]


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """P6-04: what a guest could use to lead its reader astray."""
    folder = tmp_path_factory.mktemp("links")
    write_tree(folder / "source", {
        "/etc/file": "of the guest",
        "/up": Link("../../../../../../etc/passwd"),
        "/etc/up": Link(f"/{'../' * 50}etc/file"),
        "/circle": Link("circle2"),
        "/circle2": Link("circle"),
        "/self": Link("self/self"),
        "/nowhere": Link("/not/there"),
        "/folder": Link("etc"),
        "/through": Link("etc/file/x"),
        **{f"/chain{number}": Link(f"chain{number + 1}" if number < 38 else "etc/file") for number in range(39)},
        "/proc/self/": "",
    })  # fmt: skip
    os.mknod(folder / "source" / "device", 0o600 | 0o60000, os.makedev(7, 0))
    os.mkfifo(folder / "source" / "pipe")
    return tree_of(ext4(folder / "image", folder / "source"))


@pytest.mark.parametrize("path", ["/up", "/circle", "/self", "/nowhere", "/through", "/etc/file/x", "/etc/none",
                                  "/proc/self/root", "/proc/self/exe", "/" + "x" * 300])  # fmt: skip
def test_no_path_leads_out_of_the_guest(links, path):
    """P6-04, I5: an absent path is absent, whatever the host has there."""
    for question in (links.resolve, links.list, lambda path: links.read(path, 100)):
        with pytest.raises(FileNotFoundError):
            question(path)


@pytest.mark.parametrize("path", ["/etc/file", "/../../etc/file", "//etc/.//file", "/etc/up", "/folder/file", "/chain0",
                                  "/folder/../etc/../etc/file"])  # fmt: skip
def test_one_file_by_many_paths(links, path):
    assert links.resolve(path) == "/etc/file"
    assert links.read(path, 12) == b"of the guest"


def test_kinds_are_of_the_path_itself(links):
    kinds = {path: links.kind(path) for path in ("/etc", "/etc/file", "/folder", "/nowhere", "/device", "/pipe")}
    assert kinds == {
        "/etc": Kind.FOLDER, "/etc/file": Kind.FILE, "/folder": Kind.LINK, "/nowhere": Kind.LINK,
        "/device": Kind.OTHER, "/pipe": Kind.OTHER,
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/device", "/pipe", "/etc"])
def test_only_regular_files_are_read(links, path):
    """P6-04: a device node of the guest is a name and nothing else."""
    with pytest.raises(GuestUnreadable, match="not a regular file"):
        links.read(path, 1 << 20)


def test_no_more_is_read_than_was_allowed(links):
    with pytest.raises(GuestUnreadable, match=r"file '/etc/file' of .* cannot be read: it has 12 bytes and at most 11"):
        links.read("/etc/file", 11)


@pytest.mark.parametrize(("options", "reason"), [
    (("-O", "inline_data"), "features 0x8000"),
    (("-O", "journal_dev"), "features 0x8"),
])  # fmt: skip
def test_what_is_not_known_is_said_to_be_unsupported(tmp_path, options, reason):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, image], check=True)
    with pytest.raises(Unsupported, match=reason):
        open_ext4(image_of(image))


@pytest.mark.parametrize(("block", "refused"), [(100, False), (101, True)])
def test_fast_commits_begin_one_block_behind_the_circle(block, refused):
    """jbd2 (fs/jbd2/journal.c, `j_fc_first = j_last + 1`): a file system that was read without them would be an older
    one. Hand-made, since no tool writes them but a running kernel."""
    blocks = {block: struct.pack("<HHII", 9, 8, 0, 7)}
    found = object.__new__(_Journal)
    found._name, found._fast, found._end = "vda1", 256, 100
    found._raw = lambda number: blocks.get(number, bytes(4096)).ljust(4096, b"\0")
    with pytest.raises(Unsupported, match="fast commits") if refused else contextlib.nullcontext():
        found._refuse_fast_commits(7)
