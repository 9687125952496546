"""A disk that starts by itself on the firmware it has come to: the settling step `loader`."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from appliance.service.image.settling import outcomes
from images.model import Firmware
from tests.support import settled_disk
from tests.support.settled_disk import BIOS_BOOT, ESP, HEAD
from tests.support.settling import Root, plan


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    with Root(folder) as found:
        yield found


@pytest.fixture
def disk(root):
    return settled_disk.disk(root)


@pytest.fixture
def uefi(root):
    return settled_disk.uefi(root)


def dumped(root):
    """Start, size and kind of each partition; sfdisk finds nothing wrong with the table."""
    subprocess.run(["sfdisk", "-q", "--verify", root.path("/dev/sda")], check=True)
    lines = root.inside("sfdisk", "-d", "/dev/sda").splitlines()
    rows = [line.partition(":")[2].split(",") for line in lines if line.startswith("/dev/sda")]
    return [tuple(field.partition("=")[2].strip() for field in row[:3]) for row in rows]


# --- BIOS -----------------------------------------------------------------------------------------------------------


def loaded(root, firmware=Firmware.BIOS):
    return root.run(plan(firmware=firmware), {"loader": {}}, "settle")


def test_a_disk_that_has_grub_is_left_alone(disk):
    disk.write("/dev/sda", HEAD[:100] + b"GRUB " + bytes(4 << 20))
    disk.program("grub-install", "echo x >/calls")
    done = loaded(disk)
    assert done.code == 0 and "it starts by itself" in done.report[0] and not disk.path("/calls").exists()


def test_grub_is_installed_where_there_is_room(disk):
    """P6-19: a client of UEFI gets what a BIOS starts, from its own packages."""
    disk.program("grub-install", 'echo "$*" >/calls; printf GRUB | dd of=/dev/sda conv=notrunc bs=1 seek=100')
    done = loaded(disk)
    assert done.code == 0 and "loader: done" in done.report, done
    assert disk.read("/calls") == "--target=i386-pc /dev/sda\n"
    assert disk.path("/var/lib/rewind/before/sda.head").read_bytes()[:512] == HEAD


def test_an_installation_that_fails_leaves_the_disk_as_it_was(disk):
    before = disk.path("/dev/sda").read_bytes()
    disk.program("grub-install", "dd if=/dev/zero of=/dev/sda conv=notrunc count=100; echo out of luck >&2; exit 1")
    done = loaded(disk)
    assert done.code == 1 and disk.path("/dev/sda").read_bytes() == before, done
    assert any("out of luck" in line for line in done.report)
    assert any("the boot volume has to stay attached" in line for line in done.report)


def test_without_a_gap_the_boot_volume_stays(disk):
    disk.write("/sys/class/block/sda/sda1/start", "63\n")
    disk.program("grub-install", "echo x >/calls")
    done = loaded(disk)
    assert done.code == 0 and "loader: left as it was" in done.report
    assert "the boot volume has to stay attached: /dev/sda has no room" in done.report[0]
    assert not disk.path("/calls").exists()


def test_without_an_initramfs_for_this_hardware_the_boot_volume_stays(uefi):
    """P6-19: a disk that starts and does not find its root would be worse than one that does not start."""
    uefi.program("update-initramfs", "exit 1")
    done = uefi.run(plan(firmware=Firmware.UEFI), {"initramfs": {}, "loader": {}}, "settle")
    assert "loader: the boot volume has to stay attached: no initramfs could be made for this hardware" in done.report
    assert not uefi.path("/boot/efi/EFI/BOOT").exists()


@pytest.mark.parametrize(("name", "outcome"), [("/dev/vda1", "left as it was"), ("/dev/sda1", "done")])
def test_a_root_that_is_named_by_the_order_of_hardware(disk, name, outcome):
    """P6-19: GRUB's menu would look for a disk that has another name here."""
    disk.program("grub-install", GRUB)
    made = plan()
    made = replace(made, client=replace(made.client, command_line=f"root=UUID=1 root={name} ro"))
    done = disk.run(made, {"loader": {}}, "settle")
    assert f"loader: {outcome}" in done.report, done
    assert (name in done.report[0]) == (outcome != "done")


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_no_partition_is_made_where_sectors_are_others(uefi, label):
    """P6-18: all our numbers are of sectors of 512 bytes."""
    without_an_esp(uefi, label)
    uefi.write("/sys/class/block/sda/queue/logical_block_size", "4096\n")
    before = settled_disk.ends(uefi)
    done = loaded(uefi, Firmware.UEFI)
    assert "its sectors are not of 512 bytes" in done.report[0] and settled_disk.ends(uefi) == before, done


# --- a GPT on a BIOS ------------------------------------------------------------------------------------------------

GRUB = 'echo "$*" >/calls; printf GRUB | dd of=/dev/sda conv=notrunc bs=1 seek=100 2>/dev/null'
# As a Debian that was installed for UEFI has it: made by sfdisk, whose first usable sector is 2048.
GPT = f"label: gpt\nstart=2048, size=20480, type={ESP}\nsize=65536, name=root\n"


def test_a_gpt_without_a_bios_boot_partition_gets_one(disk):
    """P6-17, P6-19: in the room before its first partition; all others stay where they are, with their identities."""
    settled_disk.table(disk, GPT)
    before = disk.inside("sfdisk", "-d", "/dev/sda").splitlines()
    disk.program("grub-install", GRUB)
    done = loaded(disk)
    assert done.code == 0 and "loader: done" in done.report, done
    assert dumped(disk)[2] == ("34", "2014", BIOS_BOOT) and disk.read("/calls") == "--target=i386-pc /dev/sda\n"
    after = disk.inside("sfdisk", "-d", "/dev/sda").splitlines()
    assert [line for line in before if line.startswith(("/dev", "label-id"))] == [
        line for line in after if line.startswith(("/dev", "label-id")) and "BIOS boot" not in line
    ]


def test_a_gpt_without_room_for_one_keeps_the_boot_volume(disk):
    """P6-18: refused by name, and nothing was written."""
    settled_disk.table(disk, "label: gpt\nfirst-lba: 34\nstart=40, size=196000\n")
    before = settled_disk.ends(disk)
    disk.program("grub-install", GRUB)
    done = loaded(disk)
    assert "loader: left as it was" in done.report, done
    assert "/dev/sda has no BIOS boot partition and no room for one" in done.report[0]
    assert settled_disk.ends(disk) == before and not disk.path("/calls").exists()


def test_a_client_without_grub_for_a_bios_is_named(disk):
    """P6-19: a Debian that was installed for UEFI has no grub-pc-bin."""
    disk.hide("grub-install")
    settled_disk.table(disk, GPT)
    before = settled_disk.ends(disk)
    done = loaded(disk)
    assert "the guest has no GRUB for a BIOS (grub-pc-bin)" in done.report[0], done
    assert settled_disk.ends(disk) == before


def test_what_was_left_for_want_of_a_package_is_done_once_it_is_there(disk):
    """P6-19: the next start from the boot volume tries again, and tells again who the machine is."""
    disk.hide("grub-install")
    disk.write("/etc/hostname", "ledger\n")
    choice = {"host-name": {"name": "twin"}, "loader": {}}
    first = disk.run(plan(), choice, "identity", "settle")
    assert first.code == 0 and "loader: left as it was" in first.report and "tried again" in first.report[-1], first
    disk.program("grub-install", GRUB)
    (left,) = disk.path("/var/lib/rewind").glob("settle-*.failed")
    assert disk.run(plan(), choice, "identity", "settle").code == 0 and not left.exists()
    told = {one.name: one.outcome for one in outcomes(left.with_suffix("").read_text())}
    assert told == {"host-name": "done", "loader": "done"}


# --- UEFI -----------------------------------------------------------------------------------------------------------


def test_the_clients_own_loader_is_put_where_any_firmware_looks(uefi):
    """P6-19: firmware of another machine has forgotten the name under which the old one knew it."""
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "grub", done


def test_shim_brings_grub_along(uefi):
    uefi.write("/boot/efi/EFI/debian/shimx64.efi", "shim")
    uefi.write("/boot/efi/EFI/debian/mmx64.efi", "keys")
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "shim", done
    assert uefi.read("/boot/efi/EFI/BOOT/grubx64.efi") == "grub"


def test_an_esp_that_firmware_starts_is_left_alone(uefi):
    uefi.write("/boot/efi/EFI/BOOT/BOOTX64.EFI", "grub")
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and not uefi.path("/var/lib/rewind/before/boot").exists()
    assert "loader: nothing to do" in done.report


def test_shim_without_grub_is_not_copied_alone(uefi):
    """P6-26: half of a chain starts nothing, and would be found before anything that does."""
    uefi.write("/boot/efi/EFI/debian/shimx64.efi", "shim")
    uefi.path("/boot/efi/EFI/debian/grubx64.efi").unlink()
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 1 and not uefi.path("/boot/efi/EFI/BOOT/BOOTX64.EFI").exists(), done


def test_shim_that_lacks_its_grub_gets_it(uefi):
    """P6-26: it is there, and would start nothing."""
    uefi.write("/boot/efi/EFI/debian/shimx64.efi", "shim")
    uefi.write("/boot/efi/EFI/BOOT/BOOTX64.EFI", "shim")
    done = loaded(uefi, Firmware.UEFI)
    assert "loader: done" in done.report and uefi.read("/boot/efi/EFI/BOOT/grubx64.efi") == "grub", done


def test_of_several_systems_the_clients_own_loader_is_taken(uefi):
    uefi.write("/boot/efi/EFI/arch/grubx64.efi", "another")
    assert loaded(uefi, Firmware.UEFI).code == 0
    assert uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "grub"


def secured():
    made = plan(firmware=Firmware.UEFI)
    return replace(made, inventory=made.inventory.model_copy(update={"secure_boot": True}))


SHIM = "MZ\0sbat,1,SBAT Version\nshim,4,UEFI shim,shim,1,https://github.com/rhboot/shim\n"


@pytest.mark.parametrize(
    ("files", "outcome"),
    [
        ({"debian/grubx64.efi": "grub"}, "left as it was"),
        ({"debian/grubx64.efi": "grub", "BOOT/BOOTX64.EFI": "grub"}, "left as it was"),
        ({"BOOT/BOOTX64.EFI": "grub"}, "left as it was"),
        ({"debian/grubx64.efi": "grub", "arch/grubx64.efi": "x", "BOOT/BOOTX64.EFI": SHIM}, "left as it was"),
        ({"BOOT/BOOTX64.EFI": SHIM, "BOOT/grubx64.efi": "grub"}, "nothing to do"),
        ({"debian/grubx64.efi": "grub", "debian/shimx64.efi": SHIM}, "done"),
        ({"debian/grubx64.efi": "grub", "debian/shimx64.efi": SHIM, "BOOT/BOOTX64.EFI": "windows"}, "left as it was"),
    ],
)  # fmt: skip
def test_what_is_not_signed_is_not_taken_for_a_loader(uefi, files, outcome):
    """P6-26: with Secure Boot firmware refuses all but shim, so the boot volume stays."""
    uefi.path("/boot/efi/EFI/debian/grubx64.efi").unlink()
    for name, text in files.items():
        uefi.write(f"/boot/efi/EFI/{name}", text)
    uefi.hide("efibootmgr")
    done = uefi.run(secured(), {"loader": {}}, "settle")
    assert f"loader: {outcome}" in done.report, done
    if outcome == "left as it was":
        assert "the boot volume has to stay attached" in "\n".join(done.report)
        assert uefi.path("/boot/efi/EFI/BOOT/BOOTX64.EFI").exists() == ("BOOT/BOOTX64.EFI" in files)


def test_no_partition_is_made_for_what_would_be_refused(uefi):
    """P6-26: what GRUB makes is not signed."""
    without_an_esp(uefi, "gpt")
    before = settled_disk.ends(uefi)
    done = uefi.run(secured(), {"loader": {}}, "settle")
    assert "loader: left as it was" in done.report and "not signed" in done.report[0], done
    assert settled_disk.ends(uefi) == before


LIST = "BootCurrent: 0001\nBootOrder: 0001,0000\nBoot0000* UiApp\nBoot0001* UEFI QEMU DVD-ROM\n"


@pytest.mark.parametrize("table", [GPT, "label: dos\nlabel-id: 0x00c0ffee\nstart=2048, size=20480, type=ef\n"])
def test_the_firmware_gets_an_entry(uefi, table):
    """P6-19: behind those that are there, which stay; a second time there is nothing to add."""
    settled_disk.table(uefi, table)
    settled_disk.entries(uefi, LIST)
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and any(r"a new entry for \EFI\debian\grubx64.efi" in line for line in done.report), done
    found = uefi.read("/sys/firmware/efi/list")
    assert "BootOrder: 0001,0000,0007\n" in found and "Boot0007* debian" in found and "Boot0000* UiApp" in found
    again = uefi.run(plan(firmware=Firmware.UEFI), {"loader": {}}, "settle", seed="another image")
    assert "loader: nothing to do" in again.report and uefi.read("/sys/firmware/efi/list") == found, again


def test_another_systems_fallback_stays(uefi):
    """P6-19: a second system on the disk keeps what starts it; the firmware's list knows ours."""
    uefi.write("/boot/efi/EFI/BOOT/BOOTX64.EFI", "windows")
    uefi.hide("efibootmgr")
    done = loaded(uefi, Firmware.UEFI)
    assert "the boot volume has to stay attached" in done.report[0] and "loader: left as it was" in done.report, done
    settled_disk.table(uefi, GPT)
    settled_disk.entries(uefi)
    done = uefi.run(plan(firmware=Firmware.UEFI), {"loader": {}}, "settle", seed="another image")
    assert "loader: done" in done.report and "Boot0007" in uefi.read("/sys/firmware/efi/list"), done
    assert uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "windows"


def test_what_was_cut_off_on_a_bios_is_nothing_to_uefi(uefi):
    """P6-19: an image starts on both. Another system's loader would be taken for what is left of our own."""
    uefi.write("/boot/efi/EFI/BOOT/BOOTX64.EFI", "windows")
    uefi.program("lsblk", uefi.read("/usr/local/sbin/lsblk").partition("\n")[2].replace("echo gpt", "echo dos"))
    uefi.hide("efibootmgr")
    efi = uefi.path("/sys/firmware/efi")
    efi.rename(efi.with_name("none"))
    uefi.program("grub-install", "kill -KILL -1")
    uefi.cut(plan(), {"loader": {}}, "settle", 1 << 20)
    efi.with_name("none").rename(efi)
    uefi.program("grub-install", "")
    done = loaded(uefi, Firmware.UEFI)
    assert "loader: left as it was" in done.report, done
    assert uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "windows"
    efi.rename(efi.with_name("none"))
    uefi.program("grub-install", GRUB)
    assert "loader: done" in loaded(uefi).report and uefi.path("/calls").exists()


def without_an_esp(root, label, mib=96):
    settled_disk.table(root, f"label: {label}\nstart=2048, size=20480\n", mib)
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    root.path("/boot/efi/EFI/debian/grubx64.efi").unlink()
    root.program("mkfs.vfat", "echo $* >/made")
    root.program("grub-install", "mkdir -p /boot/efi/EFI/BOOT; echo grub >/boot/efi/EFI/BOOT/BOOTX64.EFI")


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_an_esp_is_made_where_there_is_room(uefi, label):
    """P6-18, P6-19: at the end, so that what lies before it can grow."""
    without_an_esp(uefi, label)
    before = dumped(uefi)
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and "loader: done" in done.report, done
    after = dumped(uefi)
    assert after[:1] == before and after[1][1:] == ("131072", "ef" if label == "dos" else ESP)
    assert int(after[1][0]) > 60_000 and uefi.read("/made").endswith("/dev/sda2\n")


def test_without_an_esp_and_room_the_boot_volume_stays(uefi):
    without_an_esp(uefi, "dos", 50)
    before = settled_disk.ends(uefi)
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and "no EFI system partition and no room for one" in done.report[0], done
    assert settled_disk.ends(uefi) == before


def test_a_partition_that_cannot_be_used_leaves_the_table_as_it_was(uefi):
    """P6-18: the new ESP has no file system in the end: nobody must find it."""
    without_an_esp(uefi, "dos")
    uefi.program("mkfs.vfat", "exit 1")
    before = settled_disk.ends(uefi)[:512]
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 1 and any("the partition table of /dev/sda is as before" in line for line in done.report), done
    assert settled_disk.ends(uefi)[:512] == before
    assert not uefi.path("/var/lib/rewind/before/sda.esp").exists()


@pytest.mark.parametrize("ours", [True, False])
def test_only_our_own_partition_is_taken_for_half_made(uefi, ours):
    """P6-18: what lies where ours would have been may be somebody else's, with files in it."""
    without_an_esp(uefi, "gpt")
    settled_disk.table(uefi, f"label: gpt\nstart=2048, size=20480\nstart=63488, size=131072, type={ESP}\n")
    uuid = uefi.inside("lsblk", "-ndo", "PARTUUID", "/dev/sda2").strip()
    uefi.write("/var/lib/rewind/before/sda.esp", f"63488 131072 {uuid if ours else uuid[::-1]}\n")
    uefi.program("findmnt", 'case "$*" in *TARGET*) exit 1 ;; *) echo /dev/sda1 ;; esac')
    uefi.program("mount", "")
    uefi.program("mkfs.vfat", "echo x >>/made")
    loaded(uefi, Firmware.UEFI)
    assert uefi.path("/made").exists() == ours
