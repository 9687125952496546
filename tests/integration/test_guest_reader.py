"""Points as they are: file systems that were in use, logical volumes, and both readers on the same disk."""

import contextlib
import os
import random
import shutil
import subprocess

import pytest

from images.guest.ext4 import Ext4
from images.guest.files import Walker
from images.guest.journal import open_ext4
from tests.support import world
from tests.support.guestdisk import image_of, walked

needs_world = pytest.mark.skipif(not world.inside(), reason="needs the private world of ./dev test")


@contextlib.contextmanager
def mounted(image, folder, *options):
    """A file system of our own making in this kernel; what we read is a copy of it in its midst."""
    folder.mkdir()
    # Without barriers the loop device does not sync this machine's disk a thousand times; the order stays.
    subprocess.run(["mount", "-o", ",".join(("loop", "noatime", "barrier=0", *options)), image, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def seen(files):
    """Path → content, by the reader."""
    tree = Walker()
    tree.mount("/", files)

    def below(path):
        found = {}
        for name in tree.list(path or "/"):
            child = f"{path}/{name}"
            kind = tree.kind(child).value
            found[child] = tree.read(child, 8 << 20) if kind == "file" else None
            if kind == "link":
                (found[child],) = {files.target(files.lookup(_folder(files, path), name.encode())).decode()}
            elif kind == "folder":
                found.update(below(child))
        return found

    everything = below("")
    everything.pop("/lost+found", None)
    return everything


def _folder(files, path):
    node = files.root
    for name in filter(None, path.split("/")):
        node = files.lookup(node, name.encode())
    return node


def scribble(folder, dice):
    """What a guest does: new and longer files, other names, deleted folders whose blocks are used again."""
    for _ in range(60):
        name = folder / f"d{dice.randrange(6)}" / f"f{dice.randrange(40)}{'n' * dice.randrange(60)}"
        name.parent.mkdir(exist_ok=True)
        action = dice.randrange(6)
        there = sorted(name.parent.iterdir())
        if action <= 2:
            name.write_bytes(dice.randbytes(dice.choice((3, 3000, 60000))))
        elif action == 3 and there:
            os.rename(dice.choice(there), folder / f"d{dice.randrange(6)}-moved{dice.randrange(1000)}")
        elif action == 4 and there:
            shutil.rmtree(name.parent)
        else:
            name.unlink(missing_ok=True)
            name.symlink_to("x" * dice.choice((5, 200)))


def commit(folder):
    """All data in place and all metadata in the journal. `sync` would write the metadata to its place too."""
    for base, _, files in os.walk(folder):
        for name in (*files, "."):
            if not os.path.islink(os.path.join(base, name)):
                handle = os.open(os.path.join(base, name), os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)


JOURNALS = {
    "ext4": ((), ()),
    "ext4-1k": (("-b", "1024", "-J", "size=1"), ()),
    "ext4-no-checksums": (("-O", "^metadata_csum,^64bit"), ()),
    "ext4-data-journal": (("-b", "1024", "-J", "size=4"), ("data=journal",)),
    "ext3": (("-t", "ext3"), ()),
}


@needs_world
@pytest.mark.timeout(90)
@pytest.mark.parametrize(("make", "mount"), JOURNALS.values(), ids=JOURNALS)
def test_a_disk_of_a_running_guest_is_read_as_if_its_journal_had_been_replayed(tmp_path, make, mount):
    """P6-01, P6-16: eight crashes of one file system. The truth is what the kernel showed at that moment; without the
    journal it must have been something else at least once, or nothing was tested."""
    image, crash, folder = tmp_path / "image", tmp_path / "crash", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", *make, image], check=True)
    dice, stale = random.Random(1), 0
    with mounted(image, folder, *mount):
        for _ in range(8):
            scribble(folder, dice)
            commit(folder)
            shutil.copyfile(image, crash)
            truth = walked(folder)
            assert seen(open_ext4(image_of(crash))) == truth
            stale += not _same(crash, truth)
    assert stale


def _same(crash, truth):
    try:
        return seen(Ext4(image_of(crash))) == truth
    except Exception:
        return False
