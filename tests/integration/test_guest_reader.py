"""Points as they are: file systems that were in use, logical volumes, and both readers on the same disk."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import GuestUnreadable
from images.guest import open_guest
from images.guest.appliance import build_appliance, kept
from images.guest.confine import user
from images.guest.ext4 import Ext4
from images.guest.files import Walker
from images.guest.inspect import client_of, find_system
from images.guest.journal import _file, _Journal, open_ext4
from images.guest.reader import ConfinedTree
from images.guest.sources import open_disks, serve_disks
from images.model import Generator, Layer
from tests.guests import clients, packages
from tests.support import world
from tests.support.guestdisk import DEBIAN, Link, debian, ext4, image_of, partitioned, walked, write_tree

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
    "ext4-async-commit": (("-O", "^metadata_csum,^64bit"), ("data=writeback", "journal_async_commit")),
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


@needs_world
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("options", "last"), [
    (("data=writeback", "journal_async_commit"), True), (("data=writeback", "journal_async_commit"), False),
    (("journal_checksum",), True),
], ids=["async, the last one", "async, one in the midst", "the last one"])  # fmt: skip
def test_a_transaction_that_is_not_whole(tmp_path, options, last):
    """P6-01, P6-16: a commit block may reach the disk before what it commits; only the sum in it tells. The kernel says
    what is right: a last one that is not whole never was, and any other is damage."""
    image, crash, folder = tmp_path / "image", tmp_path / "crash", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^metadata_csum,^64bit", image], check=True)
    with mounted(image, folder, *options):
        for number in range(3):
            (folder / f"file{number}").write_bytes(b"x" * 5000)
            commit(folder)
        shutil.copyfile(image, crash)
        whole = walked(folder)
    plain = Ext4(image_of(crash))
    done = list(_Journal(_file(plain, plain.superblock.journal), plain.superblock.block_size, "it")._transactions())
    assert len(done) >= 3
    _, copy = (done[-1] if last else done[-2]).writes[-1]
    with crash.open("r+b") as file:
        (at,) = [place + copy.offset - at for at, place, size in plain.places(plain.superblock.journal)
                 if at <= copy.offset < at + size]  # fmt: skip
        file.seek(at + 7)
        file.write(b"\xa5")
    (tmp_path / "kernel").write_bytes(crash.read_bytes())
    try:
        with mounted(tmp_path / "kernel", tmp_path / "mnt2", *options):
            truth = walked(tmp_path / "mnt2")
    except subprocess.CalledProcessError:
        truth = None
    assert (truth is not None) == (last and "journal_async_commit" in options)
    if truth is None:
        with pytest.raises(GuestUnreadable, match=r"transaction \d+ in it is damaged"):
            open_ext4(image_of(crash))
    else:
        assert seen(open_ext4(image_of(crash))) == truth
        assert "/file1" in truth and truth != whole


def _same(crash, truth):
    try:
        return seen(Ext4(image_of(crash))) == truth
    except Exception:
        return False


# --- the general reader ---

KEY = b"a pass phrase"
FILES = {"/etc/file": "content", "/link": Link("etc/file"), "/out": Link("../../../etc/passwd"),
         "/circle": Link("circle"), "/big": bytes(range(256)) * 20000, "/names/with space": "",
         "/names/\N{SNOWMAN}": ""}  # fmt: skip


def made_appliance(folder):
    package = packages.kernel_package("amd64")
    packages.unpack(package, folder)
    (modules,) = (folder / "lib/modules").iterdir()
    subprocess.run(["depmod", "-b", folder, modules.name], check=True)
    build_appliance(folder / "made", kernel=folder / f"boot/vmlinuz-{modules.name}", modules=modules)
    assert kept(folder / "made").unfit == ""
    shutil.rmtree(folder / "lib")
    shutil.rmtree(folder / "boot")


@pytest.fixture(scope="module")
def appliance():
    """Of this machine's packages and Debian's kernel; the kernel of the machine may be without modules."""
    sources = [Path(build_appliance.__code__.co_filename)]
    digest = packages.sources_digest(sources, packages.kernel_package("amd64"))
    return kept(packages.cached(f"guestfs-{digest}", made_appliance) / "made").folder


def filled(image, folder, size, *maker):
    """A file system of our own making, filled by this kernel."""
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*maker, image], check=True, capture_output=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    return folder


def layered(folder, appliance):
    """Two disks: md over both, LVM on it, a thin volume with ext4, and LUKS2 on another volume with ext4 in it. What
    makes them is libguestfs itself: there is no device mapper in this kernel."""
    script = """
import sys
import guestfs
g = guestfs.GuestFS(python_return_dict=True)
for path in sys.argv[2:4]:
    g.disk_create(path, "raw", 256 << 20)
    g.add_drive_opts(path, format="raw")
g.launch()
for disk in "ab":
    g.part_disk(f"/dev/sd{disk}", "gpt")
g.md_create("r", ["/dev/sda1", "/dev/sdb1"], level="raid1")
g.pvcreate(g.list_md_devices()[0])
g.vgcreate("group", g.list_md_devices())
g.lvcreate("locked", "group", 60)
g.debug("sh", ["lvm lvcreate -T -L 100M -V 80M -n thin group/pool"])
g.luks_format("/dev/group/locked", sys.argv[1], 0)
g.cryptsetup_open("/dev/group/locked", sys.argv[1], "inside")
for device in ("/dev/group/thin", "/dev/mapper/inside"):
    g.mkfs("ext4", device)
    g.mount(device, "/")
    g.tar_in(sys.argv[4], "/")
    g.umount_all()
g.shutdown()
"""
    write_tree(folder / "layered", FILES)
    subprocess.run(["tar", "-C", folder / "layered", "-cf", folder / "layered.tar", "."], check=True)
    environment = {**os.environ, "LIBGUESTFS_PATH": str(appliance), "LIBGUESTFS_BACKEND": "direct",
                   "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg", "LIBGUESTFS_MEMSIZE": "1280", "TMPDIR": str(folder),
                   "LIBGUESTFS_CACHEDIR": str(folder), "LIBGUESTFS_HV": str(hv(folder))}  # fmt: skip
    disks = [folder / "e.raw", folder / "f.raw"]
    command = [sys.executable, "-c", script, KEY, *disks, folder / "layered.tar"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"vde": f"raw:{disks[0]}", "vdf": f"raw:{disks[1]}"}


def hv(folder):
    """libguestfs looks for KVM whatever it is told; here it is not in a cage that has none."""
    wrapper = folder / "qemu.sh"
    wrapper.write_text('#!/bin/bash\nexec qemu-system-x86_64 "${@//accel=kvm:tcg/accel=tcg}"\n')
    wrapper.chmod(0o755)
    return wrapper


def disks_of_all_kinds(folder):
    """vda: Debian on ext4; vdb: xfs; vdc: btrfs with a subvolume; vdd: LUKS around ext4."""
    debian(folder / "a", {"/etc/circle": Link("circle"), "/etc/out": Link("../../../etc/hostname")})
    for name, maker in {"b": ("mkfs.xfs", "-q"), "c": ("mkfs.btrfs", "-q")}.items():
        where = filled(folder / f"{name}.raw", folder / f"mnt-{name}", 320 << 20, *maker)
        try:
            if name == "c":
                subprocess.run(["btrfs", "-q", "subvolume", "create", where / "@"], check=True)
                where = where / "@"
            write_tree(where, FILES)
        finally:
            subprocess.run(["umount", folder / f"mnt-{name}"], check=True)
    plain = ext4(folder / "plain", write_tree(folder / "files", FILES))
    (folder / "key").write_bytes(KEY)
    secret = ("--object", f"secret,id=key,file={folder}/key")
    luks = ("-O", "luks", "-o", "key-secret=key,iter-time=10")
    subprocess.run(["qemu-img", "convert", *secret, "-f", "raw", *luks, plain, folder / "d.raw"], check=True)
    return {"vda": f"{folder}/a/disk.raw", "vdb": f"{folder}/b.raw", "vdc": f"raw:{folder}/c.raw",
            "vdd": f"raw:{folder}/d.raw"}  # fmt: skip


@pytest.fixture(scope="module")
def general(tmp_path_factory, appliance):
    """One start for all tests: it takes a minute where there is little processor."""
    folder = tmp_path_factory.mktemp("g")
    disks = disks_of_all_kinds(folder) | layered(folder, appliance)
    before = {name: Path(spec.removeprefix("raw:")).read_bytes() for name, spec in disks.items()}
    with serve_disks(disks, folder, user()) as sockets:
        with ConfinedTree.general(sockets, appliance, [b"wrong", KEY]) as tree:
            yield tree, tree.volumes(), disks
    for name, spec in disks.items():
        assert Path(spec.removeprefix("raw:")).read_bytes() == before[name], f"{name} was written"


@needs_world
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_both_readers_tell_the_same_of_one_disk(general, tmp_path):
    """P6-01: the fast reader is proven equal, to the last answer about paths."""
    slow, volumes, disks = general
    with open_disks({"vda": disks["vda"]}, tmp_path) as opened, ConfinedTree.fast(opened) as fast:
        assert [one for one in volumes if one.disks == ("vda",)] == list(fast.volumes())
        systems = []
        for tree in (fast, slow):
            system = find_system(tree, fast.volumes())
            systems.append((system, client_of(tree, system, fast.volumes())))
        assert systems[0] == systems[1]
        odd = ["/lib/modules", "/etc/circle", "/etc/out", "/none", "/etc/hostname/x", "/../etc", "/lost+found"]
        for path in (*DEBIAN, *odd):
            assert told(fast, path) == told(slow, path), path


def told(tree, path):
    """All answers about a path, errors by their class."""
    answers = []
    reads = [lambda path, limit=limit: tree.read(path, limit) for limit in (1 << 20, 3)]
    for question in (tree.kind, tree.resolve, tree.list, *reads):
        try:
            answers.append(question(path))
        except (FileNotFoundError, GuestUnreadable) as error:
            answers.append(type(error))
    return answers


KINDS = {
    "xfs": ("vdb", "xfs", ()),
    "btrfs-subvolume": ("vdc:@", "btrfs", ()),
    "luks": ("luks-vdd", "ext4", (Layer.LUKS,)),
    "thin-on-lvm-on-md": ("group/thin", "ext4", (Layer.PARTITION, Layer.MD, Layer.LVM)),
    "luks2-on-lvm-on-md": ("luks-group-locked", "ext4", (Layer.PARTITION, Layer.MD, Layer.LVM, Layer.LUKS)),
}


@needs_world
@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "fs", "layers"), KINDS.values(), ids=KINDS)
def test_what_only_the_general_reader_knows(general, name, fs, layers):
    """P6-01: xfs, a subvolume of btrfs, LUKS with its key; and no path leads out of them."""
    tree, volumes, _ = general
    (volume,) = [one for one in volumes if one.name == name]
    below = ("vde", "vdf") if "group" in name else (name.removeprefix("luks-").partition(":")[0],)
    assert (volume.fs, volume.layers, volume.disks) == (fs, layers, below)
    tree.mount(name, "/")
    assert {"etc", "link", "big", "names"} <= set(tree.list("/"))
    assert tree.list("/names") == ("with space", "\N{SNOWMAN}")
    assert tree.read("/big", 6 << 20) == FILES["/big"]
    assert tree.read("/link", 7) == b"content"
    assert tree.resolve("/link") == "/etc/file"
    for path in ("/out", "/circle", "/none"):
        with pytest.raises(FileNotFoundError):
            tree.read(path, 100)
    with pytest.raises(GuestUnreadable, match="at most 3"):
        tree.read("/etc/file", 3)


@needs_world
@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "layers", "generator"), [
    ("mbr", (Layer.PARTITION,), Generator.INITRAMFS_TOOLS), ("dracut", (Layer.PARTITION, Layer.LVM), Generator.DRACUT),
])  # fmt: skip
def test_real_clients_at_both_instants(tmp_path, name, layers, generator):
    """P6-01, P6-02: Debians that have run, of which the second instant is a disk that was in use before."""
    files = clients.build(name)
    origin = clients.ORIGINS[name]
    for instant, setting in (("first", 42), ("second", 43)):
        with open_guest({"vda": str(files.disk(instant))}, tmp_path) as guest:
            client = guest.client
            assert guest.reader == "fast"
            assert (client.release, client.generator, client.root.layers) == (files.kernel, generator, layers)
            assert f"client.setting={setting}" in client.command_line.split()
            menu = files.expected[instant]["menu"].split()
            assert client.command_line.split() == [word for word in menu if not word.startswith("BOOT_IMAGE=")]
            assert set(client.nics) == {origin.nic_name}
            alias = guest.tree.read(f"{client.modules}/modules.alias", 16 << 20)
            assert alias.startswith(b"#") and b"alias pci:" in alias
            assert client.warnings == ()


@needs_world
@pytest.mark.timeout(60)
def test_what_the_fast_reader_does_not_know_names_the_other(tmp_path):
    """A root on xfs without libguestfs' appliance is refused, with what would help."""
    where = filled(tmp_path / "x.raw", tmp_path / "mnt", 320 << 20, "mkfs.xfs", "-q")
    try:
        write_tree(where, {"/etc/os-release": "ID=x\n"})
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)
    image = partitioned(tmp_path / "disk", [("83", tmp_path / "x.raw")])
    with pytest.raises(GuestUnreadable, match=r"no system is on vda1 \(xfs\)") as caught:
        with open_guest({"vda": str(image)}, tmp_path):
            pass
    assert "rewind image reader build" in caught.value.hint
