"""The room of a larger disk, which two settling steps want: `loader` for a partition, `grow` for the root."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.service.image.settling import outcomes
from images.model import Firmware, Generator
from tests.support import settled_disk
from tests.support.settled_disk import BIOS_BOOT, ESP
from tests.support.settling import Root, plan

CHOICE = {"loader": {}, "grow": {}}
UEFI = plan(firmware=Firmware.UEFI)
DOS = "label: dos\nstart=2048, size=20480\n"
# No room before its first partition.
GPT = "label: gpt\nfirst-lba: 34\nstart=40, size=20480\n"
GRUB = "printf GRUB | dd of=/dev/sda conv=notrunc bs=1 seek=100 2>/dev/null"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    with Root(folder) as found:
        found.program("resize2fs", "cat /sys/class/block/sda1/size >/grown")
        yield found


def larger(root, text, firmware=Firmware.UEFI, made_with=0):
    """A disk of 128 MiB, whose table was made when it had `made_with`, with the root on sda1; no GRUB is installed."""
    (settled_disk.uefi if firmware is Firmware.UEFI else settled_disk.disk)(root)
    settled_disk.table(root, text, mib=128, made_with=made_with)
    root.path("/boot/efi/EFI/debian/grubx64.efi").unlink(missing_ok=True)
    root.path("/usr/lib/grub/i386-pc/modinfo.sh").unlink()
    root.path("/usr/lib/grub/i386-pc").rmdir()
    root.hide("grub-install")
    root.program("findmnt", (
        'case "$*" in *FSTYPE*) echo ext4 ;; *TARGET*) echo /boot/efi ;; *) echo /dev/sda1 ;; esac'
    ))  # fmt: skip
    return root


def came_to(done):
    return {one.name: one.outcome for one in outcomes("\n".join(done.report))}


def test_the_root_leaves_room_for_an_esp_that_is_made_later(root):
    """P6-18, P6-19: GRUB for UEFI is installed after the first start; a root that had grown would have made it useless
    for good."""
    larger(root, DOS)
    before = settled_disk.ends(root)
    first = root.run(UEFI, CHOICE, "settle")
    assert came_to(first) == {"loader": "left", "grow": "left"} and settled_disk.ends(root) == before, first
    assert any("may need the room behind /dev/sda1 for an EFI system partition" in line for line in first.report)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    root.program("grub-install", "mkdir -p /boot/efi/EFI/BOOT; echo grub >/boot/efi/EFI/BOOT/BOOTX64.EFI")
    root.program("mkfs.vfat", "")
    again = root.run(UEFI, CHOICE, "settle")
    assert came_to(again) == {"loader": "done", "grow": "done"}, again
    assert ",type=ef" in root.inside("sfdisk", "-d", "/dev/sda").replace(" ", "")
    assert 90_000 < int(root.read("/grown")) < (128 << 11) - 131072


def test_a_loader_that_failed_keeps_its_room(root):
    """P6-18, P6-19: it is tried again, too."""
    larger(root, DOS)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    root.program("grub-install", "")
    root.program("mkfs.vfat", "exit 1")
    assert came_to(root.run(UEFI, CHOICE, "settle")) == {"loader": "failed", "grow": "left"}
    assert not root.path("/grown").exists()


def test_the_root_leaves_room_for_a_bios_boot_partition(root):
    """P6-18, P6-19: of a GPT whose first partition begins right behind the table."""
    larger(root, GPT, Firmware.BIOS)
    assert came_to(root.run(plan(), CHOICE, "settle")) == {"loader": "left", "grow": "left"}
    root.write("/usr/lib/grub/i386-pc/modinfo.sh", "")
    root.program("grub-install", GRUB)
    again = root.run(plan(), CHOICE, "settle")
    assert came_to(again) == {"loader": "done", "grow": "done"}, again
    assert BIOS_BOOT in root.inside("sfdisk", "-d", "/dev/sda") and root.path("/grown").exists()


@pytest.mark.parametrize("firmware", list(Firmware))
def test_the_room_of_a_disk_that_has_become_larger_counts(root, firmware):
    """P6-18, P6-19: the second table of a GPT lies where the disk ended, and sfdisk knows of no room behind it."""
    larger(root, GPT, firmware, made_with=11)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    root.write("/usr/lib/grub/i386-pc/modinfo.sh", "")
    root.program("mkfs.vfat", "")
    root.program("grub-install", GRUB if firmware is Firmware.BIOS else (
        "mkdir -p /boot/efi/EFI/BOOT; echo grub >/boot/efi/EFI/BOOT/BOOTX64.EFI"
    ))  # fmt: skip
    done = root.run(plan(firmware=firmware), CHOICE, "settle")
    assert came_to(done) == {"loader": "done", "grow": "done"}, done
    found = root.inside("sfdisk", "-d", "/dev/sda")
    root.inside("sfdisk", "-q", "--verify", "/dev/sda")
    assert "start=          40," in found and (BIOS_BOOT if firmware is Firmware.BIOS else ESP) in found, found
    assert int(root.read("/grown")) > 100_000


BY_NAME = replace(UEFI, client=replace(UEFI.client, command_line="root=/dev/vda1 ro"))
SECURE = replace(UEFI, inventory=UEFI.inventory.model_copy(update={"secure_boot": True}))


@pytest.mark.parametrize(
    ("made", "text", "files"),
    [
        (plan(), DOS, {}),
        (plan(), GPT.replace("start=40", "start=2048"), {}),
        (plan(), f"{GPT}start=250000, size=2048, type={BIOS_BOOT}\n", {}),
        (UEFI, f"{DOS}start=250000, size=2048, type=ef\n", {}),
        (UEFI, f"{GPT}start=250000, size=2048, type={ESP}\n", {}),
        (SECURE, DOS, {}),
        (BY_NAME, DOS, {}),
        (UEFI, DOS, {"/sys/class/block/sda/queue/logical_block_size": "4096\n"}),
    ],
    ids=["MBR", "gap", "has one", "MBR with an ESP", "GPT with an ESP", "Secure Boot", "name", "sectors"],
)
def test_a_medium_that_stays_for_good_does_not_keep_the_root_small(root, made, text, files):
    """P6-18: where no room is needed, or none could be used."""
    larger(root, text, made.inventory.firmware)
    for path, content in files.items():
        root.write(path, content)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    if files:
        root.program("grub-install", "")
        root.program("mkfs.vfat", "")
    done = root.run(made, CHOICE, "settle")
    assert came_to(done) == {"loader": "left", "grow": "done"}, done


@pytest.mark.parametrize("last", ["start=6144, size=2048", "start=6144, size=8192, type=5\nstart=8192, size=2048"])
def test_a_table_that_takes_no_further_partition_does_not_keep_the_root_small(root, last):
    """P6-18: an MBR has four, and what is within one of them is no room behind the root."""
    full = f"label: dos\nstart=20480, size=20480\nstart=2048, size=2048\nstart=4096, size=2048\n{last}\n"
    larger(root, full)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    root.program("grub-install", "")
    root.program("mkfs.vfat", "")
    done = root.run(UEFI, CHOICE, "settle")
    assert came_to(done) == {"loader": "left", "grow": "done"}, done
    assert "its table takes no further one" in done.report[0] and int(root.read("/grown")) > 200_000


@pytest.mark.parametrize(("generator", "outcome"), [(Generator.UNKNOWN, "done"), (Generator.DRACUT, "left")])
def test_without_an_initramfs_room_is_kept_for_what_can_be_installed(root, generator, outcome):
    """P6-18, P6-19: the loader waits for it."""
    larger(root, DOS)
    root.hide("dracut")
    made = plan(generator, Firmware.UEFI)
    found = came_to(root.run(made, {"initramfs": {}, **CHOICE}, "settle"))
    assert found == {"initramfs": "left", "loader": "left", "grow": outcome}
