"""From a guest's files to its Client: boot loaders, names of devices, networks, and what is malformed."""

import subprocess
import time

import pytest

from appliance import nbd
from appliance.errors import ConfigError, ConnectError, GuestUnreadable
from appliance.process import Child
from images.guest import _explained, open_guest
from images.guest.bootloader import boot_entry
from images.guest.files import Walker
from images.guest.fstab import Names, mapped_name, parse_crypttab, parse_fstab
from images.guest.grub import parse_grub, parse_grubenv, version_key
from images.guest.inspect import System, client_of
from images.guest.journal import open_ext4
from images.guest.kernel import is_signed, release_of
from images.guest.network import interfaces
from images.guest.sealed import locked
from images.guest.volumes import Volume
from images.model import Firmware, Generator, Layer, Mount
from tests.support.guestdisk import DEBIAN, Link, bzimage, debian, ext4, image_of, partitioned, write_tree
from tests.support.limits import limit

RELEASE = "6.1.0-50-amd64"
UUID = "11111111-2222-3333-4444-555555555555"


def tree_of(folder, files):
    tree = Walker()
    tree.mount("/", open_ext4(image_of(ext4(folder / "image", write_tree(folder / "files", files), size=16 << 20))))
    return tree


# --- the whole ---


@pytest.mark.timeout(60)
def test_a_debian_is_read_as_it_would_start(tmp_path):
    """P6-01, P6-02: kernel, command line, root with its place, modules, network, of one plain disk."""
    image = debian(tmp_path / "disk")
    before = image.read_bytes()
    with open_guest({"vda": str(image)}, tmp_path) as guest:
        client = guest.client
        assert guest.reader == "fast"
        assert guest.tree.read(f"{client.modules}/modules.dep", 100).startswith(b"kernel/drivers/nvme")
    assert image.read_bytes() == before
    assert (client.host, client.os_id, client.os_name) == ("client", "debian", "Debian GNU/Linux 12 (bookworm)")
    assert (client.release, client.kernel) == (RELEASE, f"/boot/vmlinuz-{RELEASE}")
    assert (client.initrd, client.modules) == (f"/boot/initrd.img-{RELEASE}", f"/usr/lib/modules/{RELEASE}")
    assert client.command_line == f"root=UUID={UUID} ro quiet client.setting=42"
    assert (client.generator, client.firmware) == (Generator.INITRAMFS_TOOLS, Firmware.BIOS)
    assert client.nics == {"ens3": ""}
    assert client.fstab == (Mount(f"UUID={UUID}", "/", "ext4", ("errors=remount-ro",)),)
    root = client.root
    assert (root.spec, root.fs, root.uuid, root.disks) == (f"UUID={UUID}", "ext4", UUID, ("vda",))
    assert (root.layers, root.offset, root.length) == ((Layer.PARTITION,), 1 << 20, 32 << 20)
    assert (client.signed_kernel, client.warnings) == (False, ())


@pytest.mark.timeout(60)
def test_one_guest_by_every_kind_of_disk(tmp_path):
    """P6-16: an export of an NBD server, as a point is served; qcow2; raw."""
    raw = debian(tmp_path / "disk")
    qcow2, socket = tmp_path / "disk.qcow2", tmp_path / "nbd.sock"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    server = ["qemu-nbd", "--read-only", "--format=raw", "--persistent", "--export-name=v d", f"--socket={socket}", raw]
    clients = []
    with Child(server, name="qemu-nbd") as child:
        wait_for(socket, child, "v d")
        for spec in (f"nbd+unix:///v%20d?socket={socket}", str(raw), f"raw:{raw}", str(qcow2), f"qcow2:{qcow2}"):
            with open_guest({"vda": spec}, tmp_path) as guest:
                clients.append(guest.client)
    assert all(client == clients[0] for client in clients)
    with pytest.raises(ConfigError, match="disk '/none' cannot be opened: No such file"):
        with open_guest({"vda": "/none"}, tmp_path):
            pass
    with pytest.raises(ConfigError, match=r"disk '.*disk.raw' cannot be opened: .*not in qcow2 format"):
        with open_guest({"vda": f"qcow2:{raw}"}, tmp_path):
            pass
    with pytest.raises(ConnectError):
        with open_guest({"vda": "nbd+unix:///vda?socket=/none"}, tmp_path):
            pass


def wait_for(socket, child, export=""):
    """Its socket is there a moment before anybody listens at it."""
    deadline = time.monotonic() + limit(20)
    while True:
        try:
            nbd.connect(socket, export, contexts=()).close()
            return
        except ConnectError:
            assert child.alive() and time.monotonic() < deadline, child.tail()
            time.sleep(0.02)


@pytest.mark.timeout(60)
def test_a_disk_that_goes_away_while_it_is_read(tmp_path):
    """A server that ends is an unreadable guest, not a crash."""
    raw, socket = debian(tmp_path / "disk", {"/usr/big": bytes(range(256)) * 20000}), tmp_path / "nbd.sock"
    server = ["qemu-nbd", "--read-only", "--format=raw", "--persistent", f"--socket={socket}", raw]
    with Child(server, name="qemu-nbd") as child:
        wait_for(socket, child)
        with open_guest({"vda": f"nbd+unix:///?socket={socket}"}, tmp_path) as guest:
            child.kill()
            with pytest.raises(GuestUnreadable, match="disk 'vda' cannot be read"):
                guest.tree.read("/usr/big", 8 << 20)


@pytest.mark.timeout(60)
def test_an_uefi_system_with_its_esp(tmp_path):
    """The firmware is what the disk is set up for; shim and GRUB are where they are on the ESP."""
    esp = tmp_path / "esp"
    esp.write_bytes(bytes(4 << 20))
    subprocess.run(["mkfs.vfat", "-i", "ABCD1234", esp], check=True, capture_output=True)
    write_tree(tmp_path / "EFI", {"debian/shimx64.efi": "MZ", "debian/grubx64.efi": "MZ", "BOOT/BOOTX64.EFI": "MZ"})
    subprocess.run(["mcopy", "-s", "-i", esp, tmp_path / "EFI", "::"], check=True)
    fstab = f"UUID={UUID} / ext4 defaults\nUUID=ABCD-1234 /boot/efi vfat umask=0077\n"
    files = {**DEBIAN, "/etc/fstab": fstab, "/boot/efi/": "", f"/boot/vmlinuz-{RELEASE}": bzimage(RELEASE, signed=True)}
    root = ext4(tmp_path / "root", write_tree(tmp_path / "files", files), "-U", UUID)
    image = partitioned(tmp_path / "disk", [("U", esp), ("L", root)], label="gpt")
    with open_guest({"nvme0n1": str(image)}, tmp_path) as guest:
        client = guest.client
        assert [volume.name for volume in guest.volumes] == ["nvme0n1p1", "nvme0n1p2"]
        assert guest.tree.read("/boot/efi/EFI/BOOT/BOOTX64.EFI", 10) == b"MZ"
    assert (client.firmware, client.signed_kernel) == (Firmware.UEFI, True)
    assert (client.shim, client.grub) == ("/boot/efi/EFI/debian/shimx64.efi", "/boot/efi/EFI/debian/grubx64.efi")
    assert client.warnings == ()


@pytest.mark.timeout(60)
def test_a_separate_boot_on_a_second_disk(tmp_path):
    """Paths in grub.cfg are relative to /boot then."""
    boot = {name.removeprefix("/boot"): text for name, text in DEBIAN.items() if name.startswith("/boot")}
    boot["/grub/grub.cfg"] = boot["/grub/grub.cfg"].replace("/boot/", "/")
    rest = {name: text for name, text in DEBIAN.items() if not name.startswith("/boot")}
    rest |= {"/boot/": "", "/etc/fstab": f"UUID={UUID} / ext4 x\nLABEL=boot /boot ext4 x\n/dev/sdc1 /srv ext4 nofail\n"}
    root = partitioned(tmp_path / "a", [("83", ext4(tmp_path / "r", write_tree(tmp_path / "rf", rest), "-U", UUID))])
    other = ext4(tmp_path / "b", write_tree(tmp_path / "bf", boot), "-L", "boot")
    with open_guest({"vda": str(root), "vdb": str(other)}, tmp_path) as guest:
        assert guest.client.kernel == f"/boot/vmlinuz-{RELEASE}"
        assert guest.client.initrd == f"/boot/initrd.img-{RELEASE}"
        assert {where: volume.name for where, volume in guest.mounts.items()} == {"/": "vda1", "/boot": "vdb"}
    with pytest.raises(GuestUnreadable, match="/boot on LABEL=boot, which the guest's /etc/fstab names"):
        with open_guest({"vda": str(root)}, tmp_path):
            pass


REFUSED = {
    "no system": ({"/usr/lib/os-release": None, "/etc/os-release": None}, r"no system is on vda1 \(ext4\)"),
    "no kernel": ({f"/boot/vmlinuz-{RELEASE}": None}, "neither an entry nor a kernel in /boot"),
    "not a kernel": ({f"/boot/vmlinuz-{RELEASE}": b"\0" * 100000}, "'/boot/vmlinuz-.*not a Linux kernel for x86"),
    "no modules": ({f"/usr/lib/modules/{RELEASE}/modules.dep": None,
                    f"/usr/lib/modules/{RELEASE}/kernel/drivers/nvme/host/nvme.ko": None}, "no modules there"),
    "modules of another": ({f"/boot/vmlinuz-{RELEASE}": bzimage("6.1.0-99-amd64")},
                           "'/lib/modules/6.1.0-99-amd64' of the guest"),
    "release with a path": ({f"/boot/vmlinuz-{RELEASE}": bzimage("../../../etc")}, "does not say which release"),
    "giant fstab": ({"/etc/fstab": "x" * (2 << 20)}, "'/etc/fstab' of the guest cannot be read: it has 2097152"),
    "giant grub.cfg": ({"/boot/grub/grub.cfg": "x" * (5 << 20)}, "'/boot/grub/grub.cfg' of the guest"),
    "fstab is a folder": ({"/etc/fstab": None, "/etc/fstab/x": ""}, "'/etc/fstab' .* not a regular file"),
    "other root": ({"/boot/grub/grub.cfg": str(DEBIAN["/boot/grub/grub.cfg"]).replace("quiet", "\x1b[2J")},
                   r"the command line in /boot/grub/grub.cfg cannot be read: it is '.*\?\[2J"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_system_that_starts_is_refused_with_the_reason(tmp_path, changes, reason):
    """I5, P6-02: the file is named."""
    image = debian(tmp_path / "disk", changes)
    with pytest.raises(GuestUnreadable, match=reason):
        with open_guest({"vda": str(image)}, tmp_path):
            pass


@pytest.mark.timeout(60)
@pytest.mark.parametrize("word", ["../../../../../../boot/grub", "/etc", ".x", "", "Debian", "a b", "a" * 65])
def test_a_system_with_a_strange_id_is_some_linux(tmp_path, word):
    """The word becomes a folder of a medium: os-release(5) allows letters, digits and three marks, and no path."""
    image = debian(tmp_path / "disk", {"/usr/lib/os-release": f'ID="{word}"\nPRETTY_NAME="x"\n'})
    with open_guest({"vda": str(image)}, tmp_path) as guest:
        assert guest.client.os_id == "linux"


@pytest.mark.timeout(60)
def test_words_of_a_boot_loader_are_no_part_of_the_command_line(tmp_path):
    """Also where no boot loader wrote it: pxelinux and the kernel's EFI stub would load what `initrd=` names."""
    line = "root=/dev/vda1 initrd=../other BOOT_IMAGE=/x  ro\n"
    image = debian(tmp_path / "disk", {"/boot/grub/grub.cfg": None, "/etc/kernel/cmdline": line})
    with open_guest({"vda": str(image)}, tmp_path) as guest:
        assert guest.client.command_line == "root=/dev/vda1 ro"


@pytest.mark.timeout(60)
def test_what_is_not_needed_and_malformed_is_a_warning(tmp_path):
    image = debian(tmp_path / "disk", {
        "/etc/netplan/x.yaml": "network: [", "/etc/netplan/y.yaml": "[" * 100000,
        "/etc/hostname": "no name\x1b[31m\n", "/etc/network/interfaces": "x" * (2 << 20),
        "/etc/fstab": "/dev/sda1 / ext4 defaults\n/dev/sdb1 /usr ext4 nofail\n",
        "/etc/systemd/network/x.network": "no section\n",
    })  # fmt: skip
    with open_guest({"vda": str(image)}, tmp_path) as guest:
        told = "\n".join(guest.client.warnings)
        assert guest.client.host == "localhost"
    for part in ("/etc/netplan/x.yaml is not", "/etc/netplan/y.yaml is not", "/etc/network/interfaces is not",
                 "/etc/systemd/network/x.network", "names /usr on /dev/sdb1", "names /dev/sda1 by its",
                 "names /dev/sdb1 by its number"):  # fmt: skip
        assert part in told


# --- GRUB ---

ADVANCED = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
else
   set default="DEFAULT"
fi
function load_video {
  insmod all_video
}
set vt_handoff=vt.handoff=7
menuentry 'Debian, "newest" > x' --class debian $menuentry_id_option 'simple' {
	linux	/vmlinuz-3 root=/dev/x ro quiet $vt_handoff $unknown
	initrd	/amd-ucode.img /initrd-3
}
submenu 'Advanced options' $menuentry_id_option 'advanced' {
	menuentry 'Debian 3' --class debian $menuentry_id_option 'three' {
		if [ x = y ]; then
			linux /no
		fi
		linux	/vmlinuz-3 root=/dev/x ro
	}
	menuentry 'Debian 2' $menuentry_id_option 'two' {
		linux	/vmlinuz-2 root=/dev/x 'a=b c' \\
			last
	}
}
menuentry "Memory test" { linux16 /memtest
}
"""


@pytest.mark.parametrize(("default", "kernel"), [
    ("0", "/vmlinuz-3"), ("1>1", "/vmlinuz-2"), ("1", "/vmlinuz-3"), ("advanced>two", "/vmlinuz-2"),
    ("two", "/vmlinuz-2"), ("Advanced options>Debian 2", "/vmlinuz-2"), ('Debian, "newest" > x', "/vmlinuz-3"),
    ("2", "/memtest"), ("77", "/vmlinuz-3"), ("none", "/vmlinuz-3"), ("", "/vmlinuz-3"), ("Memory test", "/memtest"),
])  # fmt: skip
def test_the_default_of_grub(default, kernel):
    text = ADVANCED.replace("{ linux16", "{\nlinux16")
    assert parse_grub(text.replace("DEFAULT", default.replace('"', '\\"')), {}).chosen().kernel == kernel
    saved = text.replace("DEFAULT", "${saved_entry}")
    assert parse_grub(saved, {"saved_entry": default}).chosen().kernel == kernel
    assert parse_grub(saved, {"saved_entry": "0", "next_entry": default}).chosen().kernel == kernel


def test_lines_of_a_grub_entry():
    menu = parse_grub(ADVANCED, {})
    first = menu.entries[0]
    assert (first.options, first.initrds) == ("root=/dev/x ro quiet vt.handoff=7", ("/amd-ucode.img", "/initrd-3"))
    assert menu.entries[1].children[1].options == 'root=/dev/x "a=b c" last'
    assert [entry.id for entry in menu.entries[1].children] == ["three", "two"]


@pytest.mark.parametrize(("line", "options"), [
    ('a="b c" d', '"a=b c" d'),
    ("a='b $two' d", '"a=b $two" d'),
    ('a="b $two" d', '"a=b x y" d'),
    ("a=$two d", "a=x y d"),
    ("a=b\\ c", '"a=b c"'),
    ('dyndbg="file x root=/dev/evil +p" root=/dev/x', '"dyndbg=file x root=/dev/evil +p" root=/dev/x'),
    ("$two", "x y"), ('""', ""), ("a=b # c", "a=b"), ('a=\\"b\\"', "a=b"),
])  # fmt: skip
def test_a_word_with_spaces_stays_one(line, options):
    """GRUB gives the kernel a word in quotes where the word has spaces. Without them a part of a value was a word of
    its own: here a root that no boot loader would have taken."""
    menu = parse_grub(f"set two='x y'\nmenuentry 'x' {{\nlinux /vmlinuz {line}\n}}\n", {})
    assert menu.chosen().options == options


def test_grubenv_as_grub_fills_it():
    text = "# GRUB Environment Block\nsaved_entry=two\nkernelopts=root=/dev/mapper/a ro\n" + "#" * 900
    assert parse_grubenv(text) == {"saved_entry": "two", "kernelopts": "root=/dev/mapper/a ro"}


@pytest.mark.parametrize("text", ["}" * 10000, "menuentry x {\n" * 100000, "set a=$a$a$a$a\n" * 300 + "$a" * 10,
                                  "menuentry '" + "x" * 100000, "'\"" * 50000, "submenu a b {\n" * 5000 + "}\n" * 5000,
                                  "\\" * 100000, "linux\nlinux x\ninitrd\nset\nset =\n{\n", "$" * 100000,
                                  'a"' * 40000, "\\\n" * 50000])  # fmt: skip
def test_a_hostile_grub_cfg_ends(text):
    """I5: no recursion without an end, no text that grows, no search that takes longer than its file is long."""
    menu = parse_grub(text, {})
    menu.chosen()
    assert sum(map(len, menu.variables.values())) < 100_000


FEDORA = {
    "/boot/grub2/grub.cfg": 'load_env -f x\nset default="${saved_entry}"\ninsmod blscfg\nblscfg\n',
    "/boot/grub2/grubenv": f"saved_entry=abc-6.9.10-1.x86_64\nkernelopts=root=/dev/mapper/fedora-root ro rd.lvm.lv=fedora/root\n{'#' * 500}",  # noqa: E501
    **{f"/boot/loader/entries/abc-{version}.conf": f"title Fedora {version}\nversion {version}\n"
       f"linux /vmlinuz-{version}\ninitrd /initramfs-{version}.img $tuned_initrd\noptions $kernelopts $tuned_params\n"
       for version in ("6.9.9-1.x86_64", "6.9.10-1.x86_64", "6.10.0-1.x86_64", "0-rescue")},
    **{f"/boot/vmlinuz-{version}": "kernel" for version in ("6.9.9-1.x86_64", "6.9.10-1.x86_64", "6.10.0-1.x86_64")},
    "/boot/initramfs-6.9.10-1.x86_64.img": "initrd",
}  # fmt: skip


def test_entries_of_their_own_files(tmp_path):
    """P6-02: BLS by grubenv, and the highest version where it names none."""
    boot = boot_entry(tree_of(tmp_path, FEDORA), {"/": "", "/boot": ""})
    assert (boot.kernel, boot.initrd) == ("/boot/vmlinuz-6.9.10-1.x86_64", "/boot/initramfs-6.9.10-1.x86_64.img")
    assert boot.command_line == "root=/dev/mapper/fedora-root ro rd.lvm.lv=fedora/root"
    (tmp_path / "n").mkdir()
    newest = tree_of(tmp_path / "n", {**FEDORA, "/boot/grub2/grubenv": "kernelopts=root=x\n"})
    boot = boot_entry(newest, {"/": "", "/boot": ""})
    assert boot.kernel == "/boot/vmlinuz-6.10.0-1.x86_64"
    assert "'/initramfs-6.10.0-1.x86_64.img', which /boot/loader/entries/abc-6.10.0" in boot.warnings[0]


def test_systemd_boot(tmp_path):
    tree = tree_of(tmp_path, {
        "/efi/loader/loader.conf": "timeout 3\ndefault machine-6.1*\n",
        "/efi/loader/entries/machine-6.1.conf": "linux /m/6.1/linux\ninitrd /m/6.1/initrd\n"
                                                "options root=UUID=a\noptions ro",
        "/efi/loader/entries/machine-6.9.conf": "linux /m/6.9/linux\n",
        "/efi/m/6.1/linux": "x", "/efi/m/6.1/initrd": "x", "/efi/m/6.9/linux": "x",
    })  # fmt: skip
    boot = boot_entry(tree, {"/": "", "/efi": ""})
    assert (boot.kernel, boot.initrd, boot.command_line) == ("/efi/m/6.1/linux", "/efi/m/6.1/initrd", "root=UUID=a ro")


def test_a_kernel_on_a_subvolume(tmp_path):
    grub = "menuentry 'x' {\nlinux /@/boot/vmlinuz-1 root=UUID=a rootflags=subvol=@\ninitrd /@/boot/initrd-1\n}\n"
    tree = tree_of(tmp_path, {"/boot/grub/grub.cfg": grub, "/boot/vmlinuz-1": "x", "/boot/initrd-1": "x"})
    assert boot_entry(tree, {"/": "subvol=@"}).kernel == "/boot/vmlinuz-1"


def test_without_a_boot_loader_the_newest_kernel(tmp_path):
    names = ("5.9.0-1", "5.10.0-2", "5.10.0-10")
    tree = tree_of(tmp_path, {
        **{f"/boot/vmlinuz-{name}": "x" for name in names}, "/boot/initrd.img-5.10.0-10": "x",
        "/etc/default/grub": 'GRUB_CMDLINE_LINUX="root=/dev/vda1 quiet"\n',
    })  # fmt: skip
    boot = boot_entry(tree, {})
    assert (boot.kernel, boot.initrd) == ("/boot/vmlinuz-5.10.0-10", "/boot/initrd.img-5.10.0-10")
    assert boot.command_line == "root=/dev/vda1 quiet"
    assert "the newest kernel is taken" in boot.warnings[0]
    assert sorted(names, key=version_key) == list(names)


# --- names of devices ---

VOLUMES = (
    Volume(name="vda1", fs="ext4", uuid="u-1", label="boot", disks=("vda",), partuuid="p-1", partlabel="first"),
    Volume(name="vdb1", fs="vfat", uuid="ABCD-1234", disks=("vdb",)),
    Volume(name="my-vg/ro-ot", fs="ext4", uuid="u-2", disks=("vda", "vdb")),
    Volume(name="nvme0n1p2", fs="btrfs", uuid="u-3", disks=("nvme0n1",)),
    Volume(name="nvme0n1p2:@", fs="btrfs", uuid="u-3", disks=("nvme0n1",), flags="subvol=@"),
)


@pytest.mark.parametrize(("spec", "name"), [
    ("UUID=u-1", "vda1"), ('UUID="u-1"', "vda1"), ("LABEL=boot", "vda1"), ("PARTUUID=P-1", "vda1"),
    ("PARTLABEL=first", "vda1"), ("/dev/disk/by-uuid/abcd-1234", "vdb1"), ("UUID=abcd-1234", "vdb1"),
    ("/dev/mapper/my--vg-ro--ot", "my-vg/ro-ot"), ("/dev/my-vg/ro-ot", "my-vg/ro-ot"), ("/dev/vda1", "vda1"),
    ("/dev/sda1", "vda1"), ("/dev/sdb1", "vdb1"), ("/dev/nvme0n1p2", "nvme0n1p2"), ("UUID=u-3", "nvme0n1p2"),
    ("UUID=", None), ("LABEL=", None), ("/dev/sdz9", None), ("/dev/mapper/none", None), ("nfs:/x", None), ("", None),
    ("/dev/disk/by-path/x", None), ("/dev/sda" + "9" * 100, None),
])  # fmt: skip
def test_which_volume_a_name_means(spec, name):
    found = Names(VOLUMES).find(spec)
    assert (found.name if found else None) == name


def test_names_of_device_mapper():
    assert [mapped_name(name) for name in ("a-b", "a--b-c", "luks", "a-b--c")] == ["a/b", "a-b/c", "luks", "a/b-c"]


@pytest.mark.parametrize("line", ["root_crypt UUID=AA-1 none luks", "root_crypt /dev/sda2", 'root_crypt "UUID=aa-1"'])
def test_names_that_crypttab_gives(line):
    """What is in a container is called by crypttab's name for it, wherever a name is looked up."""
    names = Names(SEALED["partition"], (line, "other UUID=none none", "odd"))
    assert names.find("/dev/mapper/root_crypt").name == "luks-vda2"
    for spec in ("/dev/mapper/other", "/dev/mapper/odd", "/dev/mapper/none"):
        assert names.find(spec) is None


def test_containers_that_are_closed():
    assert [one.name for one in locked((*DATA, *SEALED["container on a volume"]))] == ["vda3"]


@pytest.mark.parametrize(("keys", "why"), [((), "without its passphrase nobody opens vda3"),
                                           ((b"x",), "none of the passphrases opens vda3")])  # fmt: skip
def test_a_closed_container_is_told_where_no_system_was_found(keys, why):
    """With the option that gives a passphrase. What is over, or has nothing closed, says what it said."""
    error = GuestUnreadable(what="the point", reason="no system is on vda3 (crypto_LUKS)")
    told = _explained(error, Tells(DATA), keys)
    assert str(told) == f"the point cannot be read: no system is on vda3 (crypto_LUKS); {why}"
    assert "`--luks-key FILE`" in told.hint and "`settle`" in told.hint
    for volumes in (SEALED["partition"], None):
        assert _explained(error, Tells(volumes), keys) is error


class Tells:
    def __init__(self, volumes):
        self._volumes = volumes

    def volumes(self):
        if self._volumes is None:
            raise GuestUnreadable(what="the point", reason="its reader ended")
        return self._volumes


def test_fstab_and_crypttab():
    text = "#x\n\nUUID=a / ext4\n/dev/sda1\t/mnt/with\\040space  ext4 ro,nofail 0 2\nshort line\n\\"
    assert parse_fstab(text) == (Mount("UUID=a", "/", "ext4", ("defaults",)),
                                 Mount("/dev/sda1", "/mnt/with space", "ext4", ("ro", "nofail")))  # fmt: skip
    assert parse_crypttab("# x\nroot UUID=a none luks\n") == ("root UUID=a none luks",)
    assert len(parse_fstab("a b c\n" * 100000)) == 1000


# --- encrypted containers ---

_P, _L, _V = Layer.PARTITION, Layer.LUKS, Layer.LVM
# As the general reader tells them: what is in a container is `luks-` and the container's name.
SEALED = {
    "partition": (
        Volume(name="vda2", fs="crypto_LUKS", uuid="aa-1", disks=("vda",), layers=(_P,)),
        Volume(name="luks-vda2", fs="ext4", uuid="r", disks=("vda",), layers=(_P, _L)),
    ),
    "volume in a container": (
        Volume(name="vda2", fs="crypto_LUKS", uuid="aa-1", disks=("vda",), layers=(_P,)),
        Volume(name="luks-vda2", fs="LVM2_member", uuid="pv", disks=("vda",), layers=(_P, _L)),
        Volume(name="vg/root", fs="ext4", uuid="r", disks=("vda",), layers=(_P, _L, _V)),
    ),
    "container on a volume": (
        Volume(name="vda2", fs="LVM2_member", uuid="pv", disks=("vda",), layers=(_P,)),
        Volume(name="vg/root", fs="crypto_LUKS", uuid="aa-1", disks=("vda",), layers=(_P, _V)),
        Volume(name="luks-vg-root", fs="ext4", uuid="r", disks=("vda",), layers=(_P, _V, _L)),
    ),
}  # fmt: skip
DATA = (
    Volume(name="vda3", fs="crypto_LUKS", uuid="dd-1", disks=("vda",), layers=(_P,)),
    Volume(name="vdb1", fs="crypto_LUKS", uuid="dd-2", disks=("vdb",), layers=(_P,)),
    Volume(name="luks-vdb1", fs="xfs", uuid="d", disks=("vdb",), layers=(_P, _L)),
)
CRYPTTAB = "data1 UUID=dd-1 /etc/key luks\nROOT\ndata2 UUID=dd-2 /etc/key luks\n"


def sealed_client(tmp_path, volumes, line, usr=None):
    files = {**DEBIAN, "/etc/crypttab": CRYPTTAB.replace("ROOT", line)}
    mounts = {"/": volumes[-1], **({"/usr": usr} if usr else {})}
    everything = (*DATA, *volumes, *([usr] if usr else []))
    return client_of(tree_of(tmp_path, files), System(volumes[-1], mounts, (), ()), everything)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("volumes", SEALED.values(), ids=SEALED)
def test_only_containers_below_the_root_are_opened_before_it(tmp_path, volumes):
    """Those of data have keys in files of the root: the system opens them itself, and nobody types for them."""
    spec = "/dev/vg/root" if volumes[-1].name == "luks-vg-root" else "/dev/sda2"
    for number, name in enumerate(("UUID=AA-1", "/dev/disk/by-uuid/aa-1", '"UUID=aa-1"', spec)):
        (tmp_path / str(number)).mkdir()
        client = sealed_client(tmp_path / str(number), volumes, f"root_crypt {name} none luks,discard")
        assert client.root.containers == (("root_crypt", "aa-1"),)
        assert client.usr_layers == ()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", ["", "root_crypt UUID=9 none", "a:b UUID=aa-1 none", "-x UUID=aa-1", "root_crypt"])
def test_a_container_that_crypttab_does_not_name(tmp_path, line):
    assert sealed_client(tmp_path, SEALED["partition"], line).root.containers == ()


@pytest.mark.timeout(60)
def test_a_usr_in_a_container_of_its_own(tmp_path):
    client = sealed_client(tmp_path, SEALED["partition"], "root UUID=aa-1 none luks", DATA[-1])
    assert client.root.containers == (("root", "aa-1"), ("data2", "dd-2"))
    assert client.usr_layers == (_P, _L)


# --- networks ---

MAC = "52:54:00:ab:cd:ef"
NETWORKS = {
    "ifupdown": ({"/etc/network/interfaces": "auto lo br0 ens3\niface lo inet loopback\n"
                  "iface br0 inet dhcp\n bridge_ports ens4 ens5\niface ens3 inet static\n address 10.0.0.1/24\n"
                  f" hwaddress ether {MAC.upper()}\nsource interfaces.d/*\nsource-directory more\n",
                  "/etc/network/interfaces.d/a": "iface ens6 inet dhcp\niface ens6:1 inet static\n",
                  "/etc/network/more/b": "allow-hotplug ens7\niface vlan10 inet dhcp\n vlan-raw-device ens3\n"},
                 {"ens3": MAC, "ens4": "", "ens5": "", "ens6": "", "ens7": ""}),
    "netplan": ({"/etc/netplan/01.yaml": f"network:\n  version: 2\n  ethernets:\n    ens3: {{dhcp4: true}}\n    nic0:\n"
                 f"      match: {{macaddress: '{MAC}'}}\n      set-name: lan0\n    any: {{match: {{name: 'en*'}}}}\n"
                 "    only-mac: {match: {macaddress: 'aa:bb:cc:dd:ee:ff'}}\n"
                 "  bridges: {br0: {interfaces: [ens3]}}\n"}, {"ens3": "", "lan0": MAC}),
    "networkd": ({"/etc/systemd/network/10.network": "[Match]\nName=enp1s0 eth*\n[Network]\nDHCP=yes\nDNS=1\nDNS=2\n",
                  "/etc/systemd/network/10.link": f"[Match]\nMACAddress={MAC}\n[Link]\nName=wan0\n"},
                 {"enp1s0": "", "wan0": MAC}),
    "NetworkManager": ({"/etc/NetworkManager/system-connections/a.nmconnection":
                        f"[connection]\nid=a\ntype=ethernet\ninterface-name=enp1s0\n[ethernet]\nmac-address={MAC}\n",
                        "/etc/NetworkManager/system-connections/b.nmconnection":
                        "[connection]\ntype=wireguard\ninterface-name=vpn\n"}, {"enp1s0": MAC}),
    "ifcfg": ({"/etc/sysconfig/network-scripts/ifcfg-eth0": f'DEVICE="eth0"\nHWADDR={MAC}\n',
               "/etc/sysconfig/network-scripts/ifcfg-bond0": "DEVICE=bond0\nTYPE=Bond\n"}, {"eth0": MAC}),
    "udev": ({"/etc/udev/rules.d/70-persistent-net.rules":
              f'SUBSYSTEM=="net", ATTR{{address}}=="{MAC}", NAME="eth7"\n'}, {"eth7": MAC}),
    "nothing": ({"/etc/x": ""}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_interfaces_that_the_configuration_speaks_of(tmp_path, files, expected):
    warnings = []
    assert (interfaces(tree_of(tmp_path, files), warnings), warnings) == (expected, [])


# --- kernels ---


def test_the_release_and_signature_of_a_kernel():
    assert release_of(bzimage(RELEASE), "/x") == RELEASE
    assert (is_signed(bzimage(RELEASE)), is_signed(bzimage(RELEASE, signed=True))) == (False, True)
    for raw in (b"", b"MZ", b"MZ" + b"\xff" * 100, b"MZ" + bytes(58) + b"\x40\0\0\0PE\0\0", bytes(1000)):
        assert not is_signed(raw)
        with pytest.raises(GuestUnreadable, match="not a Linux kernel"):
            release_of(raw, "/x")


def test_links_to_the_kernel_are_followed(tmp_path):
    grub = "menuentry 'x' {\nlinux /vmlinuz root=UUID=a\ninitrd /initrd.img\n}\n"
    tree = tree_of(tmp_path, {
        "/boot/grub/grub.cfg": grub, "/vmlinuz": Link("boot/vmlinuz-1"), "/boot/vmlinuz-1": "x",
        "/initrd.img": Link("../../../../etc/shadow"),
    })  # fmt: skip
    boot = boot_entry(tree, {})
    assert (boot.kernel, boot.initrd) == ("/boot/vmlinuz-1", "")
    assert "'/initrd.img', which /boot/grub/grub.cfg names, is not there" in boot.warnings[0]
