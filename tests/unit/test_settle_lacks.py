"""What a guest lacks for settling, told before it is started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from images.guest.layout import ESP
from images.guest.volumes import Volume
from images.model import Firmware, Generator
from images.settle.choice import After
from images.settle.lacks import lacking
from tests.support.guestdisk import write_tree
from tests.support.imagekit import FolderTree
from tests.support.settling import plan

UEFI, BIOS = Firmware.UEFI, Firmware.BIOS
TOOLS = ("/usr/sbin/update-initramfs", "/usr/bin/lsinitramfs")
GRUB = "/usr/sbin/grub-install"
STATIC = {"/etc/network/interfaces": "auto ens3\niface ens3 inet static\n  address 10.0.0.2/24\n"}
ROOT = "0fc63daf-8483-4772-8e79-3d69d8477de4"


def told(folder, files, kinds=("0x83",), after=None, of=BIOS, to=BIOS, **changes):
    made = plan(firmware=to)
    made = replace(made, client=replace(made.client, firmware=of, **changes))
    (folder / "tree").mkdir()
    contents = files if isinstance(files, dict) else dict.fromkeys(files, "")
    tree = FolderTree(write_tree(folder / "tree", contents))
    volumes = [Volume(name=f"vda{number}", disks=("vda",), kind=kind) for number, kind in enumerate(kinds, 1)]
    return lacking(made, tree, volumes, (after or After(settle=True)).choice(made, ""))


@pytest.mark.parametrize(
    ("changes", "files", "words"),
    [
        ({"to": UEFI}, (*TOOLS, "/sbin/sfdisk", "/sbin/mkfs.vfat"), ["GRUB for UEFI (grub-efi-amd64-bin); the"]),
        ({"to": UEFI}, (*TOOLS, GRUB, "/usr/lib/grub/x86_64-efi/"), ["mkfs.vfat (dosfstools)", "sfdisk (fdisk)"]),
        ({"to": UEFI, "kinds": (ESP,)}, TOOLS, ["grub-efi-amd64-bin), unless its EFI system partition has"]),
        ({"of": UEFI, "kinds": (ESP, ROOT)}, (*TOOLS, GRUB), ["no GRUB for a BIOS (grub-pc-bin)", "sfdisk (fdisk)"]),
        ({"of": UEFI, "kinds": (ESP, ROOT)}, (*TOOLS, GRUB, "/usr/lib/grub/i386-pc/", "/sbin/sfdisk"), []),
        ({"of": UEFI}, (*TOOLS, "/boot/grub/i386-pc/"), []),  # it may be in front of the disk already
        ({}, TOOLS[:1], ["no lsinitramfs"]),
        ({"generator": Generator.DRACUT}, (), ["no dracut", "no lsinitrd"]),
        ({"generator": Generator.UNKNOWN}, (), ["tool that made /boot/initrd.img"]),
        ({"initrd": ""}, (), ["uses no initramfs"]),
        ({}, TOOLS, []),
        ({"of": UEFI, "to": UEFI, "kinds": (ESP,)}, TOOLS, []),
    ],
)  # fmt: skip
def test_what_keeps_a_disk_from_starting_by_itself(tmp_path, changes, files, words):
    """P6-19: the README names these programs; who did not read it learned of them after the boot."""
    found = told(tmp_path, files, **changes)
    # A package is of no use where no program is named.
    named = any(")" in word or word.startswith("no ") for word in words)
    assert len(found) == len(words) + named
    for one, word in zip(found, words, strict=False):
        assert word in one and "the boot medium has to stay" in one
    assert ("each start from the boot medium tries again" in "".join(found[-1:])) == named


def test_a_loader_that_nobody_signed_is_of_no_use_to_secure_boot(tmp_path):
    made = plan(firmware=UEFI)
    made = replace(made, inventory=made.inventory.model_copy(update={"secure_boot": True}))
    write_tree(tmp_path, dict.fromkeys((*TOOLS, GRUB, "/usr/lib/grub/x86_64-efi/"), ""))
    found = lacking(made, FolderTree(tmp_path), (), ["loader"])
    assert "signed for Secure Boot" in found[0] and len(found) == 1


@pytest.mark.parametrize(
    ("after", "files", "word"),
    [
        (After(grow=True), {}, "its root will not grow: the guest has no sfdisk (fdisk)"),
        (After(grow=True), {"/usr/sbin/sfdisk": ""}, None),
        (After(identity="new"), STATIC, "(isc-dhcp-client), which has to be in the point"),
        (After(identity="new"), STATIC | {"/sbin/dhclient": ""}, None),
        (After(identity="new", keep=("addresses",)), STATIC, None),
        (After(identity="new"), {"/etc/network/interfaces": "iface ens3 inet dhcp\n"}, None),
        (After(identity="new"), {"/etc/ssh/ssh_host_rsa_key": "k"}, "SSH host keys: the guest has no ssh-keygen"),
        (After(), STATIC, None),
    ],
)
def test_what_the_other_choices_need(tmp_path, after, files, word):
    found = told(tmp_path, files, after=after)
    assert (word in found[0] if word else not found), found
    # Who the machine is is decided once.
    assert any("tries again" in one for one in found) == (bool(word) and "DHCP" not in found[0])
