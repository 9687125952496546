"""Hostile disks: whatever bytes are on them, a reader gives an answer or says what is unreadable, and nothing else.

Most runs call the reader's code in this process, where nothing hides what it raises; some go through the cage.
Real disks are damaged where their structures are, since noise alone is refused at the first magic number.
"""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appliance.errors import GuestUnreadable
from images.guest import open_guest
from images.guest.blocks import check_inside
from images.guest.child import Reader
from images.guest.fat import Fat
from images.guest.files import Walker
from images.guest.journal import open_ext4
from images.guest.lvm import logical_volumes
from images.guest.reader import ConfinedTree
from images.tree import Kind
from tests.support.guestdisk import DEBIAN, Link, ext4, partitioned, write_tree

MiB = 1 << 20
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
# A folder damaged to hold itself has no end.
DEEPEST, MOST = 6, 300


class Bytes:
    """A disk in memory, with damage laid over it."""

    def __init__(self, content, damage=()):
        changed = bytearray(content)
        for at, new in damage:
            changed[at : at + len(new)] = new[: max(0, len(changed) - at)]
        self.name, self.size, self._content = "vda", len(changed), bytes(changed)

    def read(self, offset, length):
        assert offset >= 0 and length >= 0 and offset + length <= self.size, "a read outside the disk"
        return self._content[offset : offset + length]


class Guarded(Bytes):
    """Reads outside are refused, as the disks of the child do; `Bytes` is below it, where none may come through."""

    def read(self, offset, length):
        check_inside(self, offset, length)
        return super().read(offset, length)


def look_at_everything(tree):
    """Walk it as far as it is sane. What is unreadable may be said at any time."""
    left = [MOST]

    def below(path, depth):
        for name in tree.list(path or "/"):
            left[0] -= 1
            if left[0] < 0 or depth > DEEPEST:
                return
            child = f"{path}/{name}"
            try:
                kind = tree.kind(child)
                assert tree.resolve(child).startswith("/")
                if kind is Kind.FOLDER:
                    below(child, depth + 1)
                else:
                    assert len(tree.read(child, 4096)) <= 4096
            except (GuestUnreadable, FileNotFoundError):
                continue

    try:
        below("", 0)
    except (GuestUnreadable, FileNotFoundError):
        pass


def build(make):
    """The bytes that `make` leaves in its file; once for all examples."""

    @functools.cache
    def made():
        with tempfile.TemporaryDirectory() as folder:
            return Path(make(Path(folder))).read_bytes()

    return made


SOURCE = {"/etc/passwd": "guest", "/link": Link("../../../../etc/passwd"), "/deep/er/file": b"x" * 20000,
          "/long": Link("/" + "x" * 100), **{f"/many/{number}{'n' * 80}": "" for number in range(60)}}  # fmt: skip


@build
def ext4_disk(folder):
    return ext4(folder / "image", write_tree(folder / "s", SOURCE), "-b", "1024", size=4 * MiB)


@build
def ext2_disk(folder):
    return ext4(folder / "image", write_tree(folder / "s", SOURCE), "-t", "ext2", "-b", "1024", size=2 * MiB)


@build
def dirty_disk(folder):
    """With three transactions in its journal, made by debugfs; one revokes a block."""
    image = ext4(folder / "image", write_tree(folder / "s", SOURCE), "-b", "1024", "-J", "size=1", size=6 * MiB)
    (folder / "block").write_bytes(b"J" * 1024 * 4)
    commands = ["jo -c", f"jw -b 3000-3003 {folder}/block", f"jw -b 3004-3007 {folder}/block", "jw -r 3001", "jc"]
    command = ["debugfs", "-w", "-f", "-", image]
    done = subprocess.run(command, input="\n".join(commands), text=True, capture_output=True)
    assert "wrote" not in done.stderr.lower() and done.returncode == 0, done.stderr
    return image


@build
def fat_disk(folder):
    image = folder / "image"
    image.write_bytes(bytes(2 * MiB))
    subprocess.run(["mkfs.vfat", image], check=True, capture_output=True)
    write_tree(folder / "EFI", {"debian/a long name.efi": "x" * 5000, "b/c/d": "y"})
    subprocess.run(["mcopy", "-s", "-i", image, folder / "EFI", "::"], check=True)
    return image


def mounted(files):
    tree = Walker()
    tree.mount("/", files)
    return tree


def damage(most, width=8):
    """Some places, in the structures or anywhere, with bytes that are more often extreme than not."""
    extreme = st.sampled_from([b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\1\0\0\0", b"\x7f", b"\xff" * 8])
    return st.lists(st.tuples(st.integers(0, most - 1), extreme | st.binary(min_size=1, max_size=width)), min_size=1,
                    max_size=6)  # fmt: skip


def spots(disk, *ranges):
    """Damage inside these (start, length) of a disk."""
    return st.lists(
        st.one_of([damage(length).map(lambda found, start=start: [(start + at, new) for at, new in found])
                   for start, length in ranges]),
        min_size=1, max_size=2,
    ).map(lambda parts: [one for part in parts for one in part])  # fmt: skip


def read_ext4(disk):
    try:
        look_at_everything(mounted(open_ext4(Guarded(*disk))))
    except GuestUnreadable:
        pass


@QUICK
@given(spots(ext4_disk, (1024, 1024), (2048, 512), (MiB // 4, MiB)) | damage(4 * MiB))
def test_damaged_ext4(found):
    """I5: superblock, descriptors, inodes, extents, folders."""
    read_ext4((ext4_disk(), found))


@QUICK
@given(st.data())
def test_damaged_ext4_where_its_inodes_and_folders_are(data):
    """I5: every inode of the disk is used, so damage in the tables is met."""
    content = ext4_disk()
    table = int.from_bytes(content[2048 + 8 : 2048 + 12], "little") * 1024
    read_ext4((content, data.draw(spots(ext4_disk, (table, 60 * 256)))))


@QUICK
@given(spots(ext2_disk, (1024, 1024), (2048, 512), (16 << 10, MiB)))
def test_damaged_ext2(found):
    """I5: lists of blocks instead of extents."""
    read_ext4((ext2_disk(), found))


def journal_of(content):
    """Where the journal begins: its superblock is the only block of that kind."""
    at = content.find(b"\xc0\x3b\x39\x98\0\0\0\4")
    assert at > 0
    return at


def test_the_dirty_disk_is_dirty():
    files = open_ext4(Guarded(dirty_disk()))
    assert files._blocks.read(3000 * 1024, 1024) == b"J" * 1024
    assert Guarded(dirty_disk()).read(3000 * 1024, 1024) != b"J" * 1024


@QUICK
@given(st.data())
def test_damaged_journal(data):
    """I5: tags, lengths, sequence numbers, checksums."""
    content = dirty_disk()
    read_ext4((content, data.draw(spots(dirty_disk, (journal_of(content), 1024), (journal_of(content) + 1024, 12000)))))


@QUICK
@given(spots(fat_disk, (0, 512), (512, 4096), (4096, 65536)))
def test_damaged_fat(found):
    """I5."""
    try:
        look_at_everything(mounted(Fat(Guarded(fat_disk(), found))))
    except GuestUnreadable:
        pass


TEXT = """group {
id = "x"
seqno = 2
extent_size = 8
physical_volumes { pv0 { id = "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa" pe_start = 2048 pe_count = 100 } }
logical_volumes { root { status = ["READ", "WRITE", "VISIBLE"] segment_count = 1
segment1 { start_extent = 0 extent_count = 10 type = "striped" stripe_count = 1 stripes = ["pv0", 3] } } }
}
"""


def physical_volume(text):
    raw = bytearray(2 * MiB)
    raw[512:520], raw[520:528] = b"LABELONE", (1).to_bytes(8, "little")
    raw[532:536], raw[536:544] = (32).to_bytes(4, "little"), b"LVM2 001"
    raw[544:576] = b"a" * 32
    numbers = (2 * MiB, MiB, 0, 0, 0, 4096, MiB - 4096, 0, 0)
    raw[576 : 576 + 72] = b"".join(number.to_bytes(8, "little") for number in numbers)
    raw[4096 + 4 : 4096 + 20] = b" LVM2 x[5A%r0N*>"
    raw[4096 + 20 : 4096 + 24] = (1).to_bytes(4, "little")
    for at, number in ((24, 4096), (32, MiB - 4096), (40, 512), (48, len(text))):
        raw[4096 + at : 4096 + at + 8] = number.to_bytes(8, "little")
    raw[4608 : 4608 + len(text)] = text
    return bytes(raw)


def lvm(content, found=()):
    try:
        return [one.blocks.read(0, 100) for one in logical_volumes([Guarded(content, found)]) if one.blocks]
    except GuestUnreadable:
        return None


def test_the_crafted_volume_is_one():
    (found,) = logical_volumes([Guarded(physical_volume(TEXT.encode()))])
    assert (found.group, found.name, found.blocks.size) == ("group", "root", 10 * 4096)


@QUICK
@given(spots(None, (512, 200), (4096, 100), (4608, len(TEXT))))
def test_damaged_lvm(found):
    """I5: label, areas, text."""
    lvm(physical_volume(TEXT.encode()), found)


WORDS = ["{", "}", "[", "]", "=", '"', "a", "9" * 30, "-1", "#", "\n", ",", "group", "physical_volumes",
         "logical_volumes", "seqno", "extent_size", "segment1", "stripes", "VISIBLE", "\0", "\\"]  # fmt: skip


@QUICK
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=60).map(" ".join))
@example("a {" * 5000)
@example("a = [" + '"x",' * 5000)
@example('a = "' + "\\" * 9999)
def test_hostile_text_of_lvm(text):
    """I5."""
    lvm(physical_volume(text.encode(errors="replace")[:MiB]))
    lvm(physical_volume((TEXT.replace("seqno = 2", f"seqno = 2 {text}")).encode(errors="replace")[:MiB]))


@build
def whole_disk(folder):
    root = ext4(folder / "root", write_tree(folder / "s", DEBIAN), "-b", "1024", size=6 * MiB)
    return partitioned(folder / "disk", [("L", root)], label="gpt")


@QUICK
@given(spots(whole_disk, (0, 4096), (MiB + 1024, 1024)) | st.binary(max_size=2000).map(lambda noise: [(440, noise)]))
def test_damaged_disks(found):
    """I5: partition tables, and what is taken for what."""
    reader = Reader({"vda": Guarded(whole_disk(), found)})
    try:
        names = [volume["name"] for volume in reader.volumes()]
        for name in names:
            reader.mount(name, "/")
            look_at_everything(reader._walker)
    except GuestUnreadable:
        pass


@pytest.mark.timeout(120)
@settings(QUICK, max_examples=8)
@given(spots(whole_disk, (MiB + 1024, 300), (MiB + MiB // 4, MiB)))
def test_damaged_disks_in_the_cage(found):
    """I5: the parent has a guest, or is told that there is none; nothing else, and nothing is left running."""
    disk = Guarded(whole_disk(), found)
    with ConfinedTree.fast({"vda": disk}, seconds=20) as tree:
        try:
            for volume in tree.volumes():
                tree.mount(volume.name, "/")
                look_at_everything(tree)
        except GuestUnreadable:
            pass


SCRIPTS = st.text(alphabet="{}[]='\"\\$#\n\t menuentrysdflx/.0", max_size=2000)


@pytest.mark.timeout(120)
@settings(QUICK, max_examples=8)
@given(st.sampled_from(["/boot/grub/grub.cfg", "/etc/fstab", "/etc/os-release", "/etc/network/interfaces",
                        "/boot/vmlinuz-6.1.0-50-amd64", "/etc/crypttab", "/etc/hostname"]),
       st.binary(max_size=3000) | SCRIPTS.map(str.encode))  # fmt: skip
def test_hostile_text_files(path, content):
    """I5: whatever is in them, there is a Client or a GuestUnreadable."""
    with tempfile.TemporaryDirectory(prefix="rw") as name:
        folder = Path(name)
        files = {key: value for key, value in DEBIAN.items() if key != path} | {path: content}
        root = ext4(folder / "root", write_tree(folder / "s", files), "-b", "1024", size=6 * MiB)
        try:
            with open_guest({"vda": f"raw:{root}"}, folder) as guest:
                assert all(warning.isprintable() for warning in guest.client.warnings)
                assert guest.client.command_line.isprintable()
        except GuestUnreadable as error:
            assert str(error).isprintable()
    assert not os.path.exists(name)
