"""Partition tables, file systems, LVM and FAT as the real tools make them, and as libblkid sees them."""

import json
import shutil
import subprocess

import pytest

from appliance.errors import GuestUnreadable
from images.guest.fat import Fat
from images.guest.files import Unsupported, Walker
from images.guest.layout import ESP, partitions
from images.guest.signature import recognise
from images.guest.volumes import find_volumes, open_files
from images.model import Layer
from tests.guests import lvm
from tests.support import world
from tests.support.guestdisk import FileBlocks, ext4, image_of, partitioned, write_tree

MiB = 1 << 20
needs_world = pytest.mark.skipif(not world.inside(), reason="needs the private world of ./dev test")


def disk(path, script, size=64 * MiB):
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True, capture_output=True)
    return path


TABLES = {
    "mbr": "label: dos\n,8M,83,*\n,8M,8e\n,4M,ef\n",
    "extended": "label: dos\n,8M,83\n,,5\n,4M,83\n,5M,83\n,6M,82\n",
    "gpt": "label: gpt\nsize=8M,type=U,name=EFI\nsize=8M,type=L,name=root\nsize=4M,type=L\n",
    "gpt-gap": 'label: gpt\n3: start=20480,size=8192,type=L,name="x y"\n7: size=8192,type=V\n',
}


@pytest.mark.parametrize("script", TABLES.values(), ids=TABLES)
def test_partitions_are_those_of_sfdisk(tmp_path, script):
    """P6-01."""
    image = disk(tmp_path / "disk", script)
    shown = json.loads(subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True).stdout)
    table = shown["partitiontable"]
    expected = {
        int(one["node"].removeprefix(str(image)).removeprefix("p")): (one["start"] * 512, one["size"] * 512)
        for one in table["partitions"]
        if one["type"] not in ("5", "f")
    }
    found = partitions(FileBlocks(image))
    assert {one.number: (one.offset, one.length) for one in found} == expected
    if table["label"] == "gpt":
        assert [one.uuid for one in found] == [one["uuid"].lower() for one in table["partitions"]]
        assert [one.label for one in found] == [one.get("name", "") for one in table["partitions"]]
        assert [one.kind for one in found] == [one["type"].lower() for one in table["partitions"]]
    else:
        assert found[0].uuid == f"{int(table['id'], 16):08x}-01"


def test_a_damaged_gpt_is_read_from_its_copy(tmp_path):
    image = disk(tmp_path / "disk", TABLES["gpt"])
    before = partitions(FileBlocks(image))
    assert before[0].kind == ESP
    with image.open("r+b") as file:
        file.seek(600)
        file.write(b"damage")
    assert partitions(FileBlocks(image)) == before
    with image.open("r+b") as file:
        file.seek(-500, 2)
        file.write(b"damage")
    with pytest.raises(GuestUnreadable, match="both copies of its GPT are damaged"):
        partitions(FileBlocks(image))


def test_an_extended_partition_in_a_circle_ends(tmp_path):
    """I5."""
    image = disk(tmp_path / "disk", "label: dos\nstart=2048,size=2048,type=83\nstart=4096,size=65536,type=5\n")
    entry = bytes(4) + b"\x05" + bytes(3) + (0).to_bytes(4, "little") + (8).to_bytes(4, "little")
    with image.open("r+b") as file:
        file.seek(4096 * 512 + 446)
        file.write(bytes(4) + b"\x83" + bytes(3) + b"\1\0\0\0\1\0\0\0" + entry.replace(bytes(4), b"\0\0\0\0"))
        file.seek(4096 * 512 + 510)
        file.write(b"\x55\xaa")
    assert 1 <= len(partitions(FileBlocks(image))) <= 100


MAKERS = {
    "ext2": ["mkfs.ext2", "-q", "-F", "-L", "marked"],
    "ext3": ["mkfs.ext3", "-q", "-F", "-L", "marked"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-L", "marked"],
    "vfat16": ["mkfs.vfat", "-F", "16", "-n", "MARKED"],
    "vfat32": ["mkfs.vfat", "-F", "32", "-n", "MARKED"],
    "swap": ["mkswap", "-L", "marked"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-L", "marked"],
    "btrfs": ["mkfs.btrfs", "-q", "-L", "marked"],
    "luks1": ["cryptsetup", "-q", "luksFormat", "--type", "luks1",
              "--pbkdf-force-iterations", "1000"],
    "luks2": ["cryptsetup", "-q", "luksFormat", "--type", "luks2", "--label", "marked", "--pbkdf", "pbkdf2",
              "--pbkdf-force-iterations", "1000"],
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", MAKERS.values(), ids=MAKERS)
def test_what_is_on_a_volume_is_told_as_libblkid_tells_it(tmp_path, command):
    if not shutil.which(command[0]):
        pytest.skip(f"there is no {command[0]}")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(320 * MiB)
    subprocess.run([*command, image], input=b"key", check=True, capture_output=True)
    shown = subprocess.run(["blkid", "-p", "-o", "export", image], check=True, capture_output=True, text=True).stdout
    blkid = dict(line.partition("=")[::2] for line in shown.splitlines())
    found = recognise(FileBlocks(image))
    assert (found.fs, found.uuid, found.label) == (blkid["TYPE"], blkid["UUID"], blkid.get("LABEL", ""))


def test_noise_is_nothing_known(tmp_path):
    (tmp_path / "noise").write_bytes(bytes(range(1, 256)) * 4096)
    (tmp_path / "short").write_bytes(b"x")
    assert recognise(FileBlocks(tmp_path / "noise")).fs == ""
    assert [one.volume.fs for one in find_volumes({"vda": FileBlocks(tmp_path / "short")})] == [""]


@needs_world
@pytest.mark.timeout(60)
def test_a_root_on_lvm_beside_a_boot_partition(tmp_path):
    """P6-01: as Debian's installer makes it."""
    root = ext4(tmp_path / "root", write_tree(tmp_path / "r", {"/etc/hostname": "on-lvm\n"}), size=24 * MiB)
    boot = ext4(tmp_path / "boot", write_tree(tmp_path / "b", {"/vmlinuz": "kernel"}), size=16 * MiB)
    (tmp_path / "space").write_bytes(bytes(40 * MiB))
    image = partitioned(tmp_path / "disk", [("83", boot), ("8e", tmp_path / "space")])
    start, length = lvm.make_volume(image, 17 * MiB, 40 * MiB, "vg-client", "root")
    with image.open("r+b") as file:
        file.seek(start)
        file.write(root.read_bytes())
    found = {one.volume.name: one for one in find_volumes({"vda": image_of(image, "vda")})}
    assert list(found) == ["vda1", "vda2", "vg-client/root"]
    volume = found["vg-client/root"].volume
    assert (volume.fs, volume.disks, volume.layers) == ("ext4", ("vda",), (Layer.PARTITION, Layer.LVM))
    assert found["vg-client/root"].blocks.size == length
    tree = Walker()
    tree.mount("/", open_files(found["vg-client/root"]))
    tree.mount("/boot", open_files(found["vda1"]))
    assert (tree.read("/etc/hostname", 10), tree.read("/etc/../boot/vmlinuz", 10)) == (b"on-lvm\n", b"kernel")


def lvm_disks(tmp_path, script):
    """Two disks of 64 MiB that LVM's tools have worked on, by loop devices."""
    names, devices = ("vda", "vdb"), []
    try:
        for name in names:
            with (tmp_path / name).open("wb") as file:
                file.truncate(64 * MiB)
            command = ["losetup", "--show", "--find", tmp_path / name]
            devices.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        accept = ", ".join(f'"a|^{device}$|"' for device in devices)
        settings = f"""devices {{ filter=[{accept}, "r|.*|"] use_devicesfile=0 scan=["/dev"]
            obtain_device_list_from_udev=0 external_device_info_source="none" }}
            backup {{ backup=0 archive=0 }} activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
            global {{ locking_dir="{tmp_path}" use_lvmpolld=0 system_id_source="none" }}"""
        for line in script:
            words = [word.format(*devices) for word in line.split()]
            command = ["lvm", words[0], "--config", settings, "--driverloaded", "n", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stderr)
    finally:
        for device in devices:
            subprocess.run(["losetup", "--detach", device], check=True)
    return {name: image_of(tmp_path / name, name) for name in names}


@needs_world
@pytest.mark.timeout(60)
def test_a_logical_volume_in_pieces_on_two_disks(tmp_path):
    """The pieces are where LVM says they are, in its order; other kinds are named and not read."""
    make = "lvcreate -an -Zn -Wn -n"
    disks = lvm_disks(tmp_path, [
        "pvcreate {0} {1}", "vgcreate -s 4m group {0} {1}",
        f"{make} a -l 3 group {{0}}", f"{make} b -l 2 group {{0}}", "lvextend -l +4 group/a {1}",
        "lvextend -l +2 group/a {0}", "lvremove -y group/b", f"{make} s -i 2 -l 4 group",
    ])  # fmt: skip
    # Every extent says in its first bytes where it is.
    for name in disks:
        with (tmp_path / name).open("r+b") as file:
            for extent in range(15):
                file.seek(MiB + extent * 4 * MiB)
                file.write(f"{name}:{extent:02}".encode())
    found = {one.volume.name: one for one in find_volumes({name: image_of(tmp_path / name, name) for name in disks})}
    blocks = found["group/a"].blocks
    order = [blocks.read(at, 6).decode() for at in range(0, blocks.size, 4 * MiB)]
    assert order == ["vda:00", "vda:01", "vda:02", *(f"vdb:0{n}" for n in range(4)), "vda:05", "vda:06"]
    assert found["group/a"].volume.disks == ("vda", "vdb")
    assert "group/b" not in found
    with pytest.raises(Unsupported):
        open_files(found["group/s"])


class Handle:
    """What libguestfs tells of a group `group` on these disks; bytes of a disk are as long as `whole` says."""

    def __init__(self, folder, names, whole=True):
        self._disks = {f"/dev/{name}": (folder / name).read_bytes() for name in names}
        self._whole = whole

    def lvs(self):
        return ["/dev/group/a", "/dev/group/b", "/dev/group/s"]

    def pvs_full(self):
        return [{"pv_uuid": f"id{name[5:]}", "pv_name": name} for name in self._disks]

    def vgpvuuids(self, _group):
        return ["id-vda", "id-vdb"]

    def blockdev_getsize64(self, device):
        return len(self._disks[device])

    def pread_device(self, device, count, offset):
        return self._disks[device][offset : offset + (count if self._whole else 0)]


@needs_world
@pytest.mark.timeout(60)
def test_a_volume_lies_on_its_own_disks_and_not_on_all_of_the_group(tmp_path):
    """By libguestfs, which tells of groups alone. One of stripes lies on both."""
    from images.guest.general_child import GuestfsReader, _Device

    make = "lvcreate -an -Zn -Wn -n"
    script = ["pvcreate {0} {1}", "vgcreate -s 4m group {0} {1}", f"{make} a -l 3 group {{1}}",
              f"{make} b -l 2 group {{0}}", f"{make} s -i 2 -l 4 group"]  # fmt: skip
    disks = lvm_disks(tmp_path, script)
    found = {f"/dev/{name}": _Device(name, (name,)) for name in disks}
    for whole, a, b in ((True, ("vdb",), ("vda",)), (False, ("vda", "vdb"), ("vda", "vdb"))):
        reader = GuestfsReader(tuple(disks), Handle(tmp_path, disks, whole))
        volumes = dict(reader._logical(found))
        assert {name[-1]: one.disks for name, one in volumes.items()} == {"a": a, "b": b, "s": ("vda", "vdb")}


@needs_world
@pytest.mark.timeout(60)
def test_the_metadata_of_lvm_goes_round_in_its_ring(tmp_path):
    """Its area is full after many changes, and the newest text may begin at its end."""
    changes = [f"vgchange --addtag t{number}{'x' * 400} group" for number in range(25)]
    disks = lvm_disks(tmp_path, [
        "pvcreate --metadatasize 64k --dataalignment 1m {0}", "vgcreate group {0}",
        "lvcreate -an -Zn -Wn -n a -l 1 group", *changes, "lvcreate -an -Zn -Wn -n last -l 1 group",
    ])  # fmt: skip
    assert {"group/a", "group/last"} <= {one.volume.name for one in find_volumes(disks)}


@pytest.mark.parametrize("bits", ["12", "16", "32"])
def test_the_esp_is_read(tmp_path, bits):
    size = {"12": 2, "16": 32, "32": 64}[bits]
    image = tmp_path / "esp"
    with image.open("wb") as file:
        file.truncate(size * MiB)
    subprocess.run(["mkfs.vfat", "-F", bits, "-s", "1", image], check=True, capture_output=True)
    content = bytes(range(256)) * 2000
    write_tree(tmp_path / "EFI", {"debian/shimx64.efi": content, "debian/a rather long name.cfg": "x",
                                  **{f"many/file{number}": str(number) for number in range(200)}})  # fmt: skip
    subprocess.run(["mcopy", "-s", "-i", image, tmp_path / "EFI", "::"], check=True)
    tree = Walker()
    tree.mount("/", Fat(image_of(image)))
    assert tree.list("/EFI/debian") == ("a rather long name.cfg", "shimx64.efi")
    assert tree.read("/efi/DEBIAN/ShimX64.EFI", MiB) == content
    assert len(tree.list("/EFI/many")) == 200
    assert tree.read("/EFI/many/file199", 10) == b"199"
    with pytest.raises(FileNotFoundError):
        tree.read("/EFI/none", 1)
