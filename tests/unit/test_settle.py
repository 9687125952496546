"""The steps of a client after its first start on new hardware, each run in a root of its own."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace

import pytest

from appliance.errors import ImageError
from images.model import Client, Firmware, Generator, Inventory, Layer, Plan
from images.model import Root as RootFs
from images.settle.choice import After, with_steps
from images.settle.lay import lay
from images.settle.step import steps, validated
from tests.support.settling import Root

RELEASE = os.uname().release
INITRD = f"/boot/initrd.img-{RELEASE}"
ROOT = RootFs("UUID=1", "ext4", "1", ("vda",), (Layer.PARTITION,))


def plan(generator=Generator.INITRAMFS_TOOLS, firmware=Firmware.BIOS):
    client = Client(
        host="ledger.example.org", os_id="debian", os_name="Debian", release=RELEASE, kernel=f"/boot/vmlinuz-{RELEASE}",
        initrd=INITRD, modules=f"/lib/modules/{RELEASE}", command_line="root=UUID=1 ro", root=ROOT, generator=generator,
        firmware=Firmware.BIOS,
    )  # fmt: skip
    target = Inventory(name="rack", source="script", firmware=firmware, devices=())
    return Plan(client=client, inventory=target, decisions=(), load=(), command_line="root=UUID=1 ro")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    with Root(folder) as found:
        yield found


# --- what a step is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(steps()))
def test_a_step_has_a_schema_a_description_and_a_script(name):
    """A new step is a module and a script."""
    one = steps()[name]
    assert one.name == name and one.description and one.script.startswith("#!/bin/sh")
    assert one.schema.model_config["extra"] == "forbid"
    with pytest.raises(ImageError, match=f"step '{name}'"):
        validated(name, {"nonsense": 1})


def test_an_unknown_step_is_refused():
    with pytest.raises(ImageError, match="there is no step 'magic'") as caught:
        validated("magic", {})
    assert "host-name" in caught.value.hint


def test_without_a_choice_nothing_is_laid():
    """P6-24: the same host name, keys and addresses unless others are asked for."""
    found, settings = with_steps(plan(), After(), "seed")
    assert found == plan() and dict(settings.run) == {}


def test_a_choice_becomes_files_for_run_and_words():
    """Equal for equal arguments; units for the phases that are used and no others."""
    first = with_steps(plan(), After(identity="new"), "seed")
    assert first == with_steps(plan(), After(identity="new"), "seed")
    other = with_steps(plan(), After(identity="new"), "seed2")
    assert first[0].command_line != other[0].command_line
    names = set(first[1].run)
    assert "systemd/system/rewind-identity.service" in names
    assert not any("rewind-settle" in name for name in names)
    assert {name.rpartition("/")[2] for name in names if "/steps/" in name} == {
        "10-host-name", "20-machine-id", "30-ssh-keys", "40-addresses",
    }  # fmt: skip
    settled = with_steps(plan(), After(settle=True), "seed")
    assert settled[0] == plan() and "systemd/system/multi-user.target.d/rewind-settle.conf" in settled[1].run


@pytest.mark.parametrize("name", ["-x", "a b", "x" * 64, "a;reboot", "", "ä"])
def test_a_host_name_that_is_none_is_refused(name):
    with pytest.raises(ImageError, match="host-name"):
        lay(plan(), {"host-name": {"name": name}}, "s")


# --- the runner -----------------------------------------------------------------------------------------------------


def test_a_phase_is_done_once_for_an_image(root):
    """The boot volume may stay attached: nobody changes the host's name back at the next start."""
    choice = {"host-name": {"name": "twin"}}
    root.write("/etc/hostname", "ledger\n")
    assert root.run(plan(), choice, "identity").code == 0
    root.write("/etc/hostname", "renamed-by-hand\n")
    again = root.run(plan(), choice, "identity")
    assert again.code == 0 and "done before" in again.report[0]
    assert root.read("/etc/hostname") == "renamed-by-hand\n"
    assert root.run(plan(), choice, "identity", seed="another image").code == 0
    assert root.read("/etc/hostname") == "twin\n"


def test_a_step_that_fails_does_not_hold_up_the_others(root):
    """And is tried again at the next start."""
    root.write("/etc/ssh/ssh_host_ed25519_key", "old")
    root.program("ssh-keygen", "echo no entropy >&2; exit 1")
    root.write("/etc/hostname", "ledger\n")
    choice = {"host-name": {"name": "twin"}, "ssh-keys": {}, "addresses": {}}
    done = root.run(plan(), choice, "identity")
    assert done.code == 1 and "ssh-keys: failed (1)" in done.report and "addresses: nothing to do" in done.report
    assert any("no entropy" in line for line in done.report)
    assert root.read("/etc/hostname") == "twin\n"
    assert root.read("/etc/ssh/ssh_host_ed25519_key") == "old"
    root.path("/usr/local/sbin/ssh-keygen").unlink()
    assert root.run(plan(), choice, "identity").code == 0
    assert root.read("/etc/ssh/ssh_host_ed25519_key") != "old"


def test_what_is_said_reaches_the_console(root):
    root.write("/etc/hostname", "ledger\n")
    done = root.run(plan(), {"host-name": {"name": "twin"}}, "identity")
    # Here it is a file, and has the last word only.
    assert root.read("/dev/console") == "rewind: identity: done\n"
    assert "host-name: it was called ledger and is called twin" in done.said


# --- identity -------------------------------------------------------------------------------------------------------


def test_host_name(root):
    """P6-24: whole words of the hosts file, nothing else; the old files are kept."""
    root.write("/etc/hostname", "ledger\n")
    hosts = "127.0.0.1\tlocalhost\n127.0.1.1 ledger.example.org   ledger\n# ledger\n10.0.0.1 ledger2 my-ledger\n"
    root.write("/etc/hosts", hosts)
    assert root.run(plan(), {"host-name": {"name": "twin"}}, "identity").code == 0
    assert root.read("/etc/hostname") == "twin\n"
    assert root.read("/etc/hosts") == hosts.replace(
        "127.0.1.1 ledger.example.org   ledger", "127.0.1.1 twin.example.org   twin"
    )
    assert root.read("/var/lib/rewind/before/etc/hosts") == hosts


def test_machine_id(root):
    """P6-24: what the command line said already stays on the disk, for D-Bus too."""
    root.write("/etc/machine-id", "0" * 32 + "\n", 0o444)
    root.write("/var/lib/dbus/machine-id", "0" * 32 + "\n")
    found, settings = with_steps(plan(), After(identity="new"), "seed")
    (word,) = [word for word in found.command_line.split() if word.startswith("systemd.machine_id=")]
    wanted = word.partition("=")[2]
    choice = {"machine-id": {"id": wanted}}
    assert root.run(plan(), choice, "identity").code == 0
    assert root.read("/etc/machine-id") == root.read("/var/lib/dbus/machine-id") == f"{wanted}\n"
    assert stat.S_IMODE(root.path("/etc/machine-id").stat().st_mode) == 0o444
    assert settings.run


def test_ssh_keys(root):
    """P6-24: made by the client; private parts are in no image, and the old ones in no copy."""
    for kind in ("ed25519", "rsa", "dsa"):
        root.write(f"/etc/ssh/ssh_host_{kind}_key", f"old {kind}", 0o600)
        root.write(f"/etc/ssh/ssh_host_{kind}_key.pub", f"old {kind}")
    root.write("/etc/ssh/ssh_host_rsa_key-cert.pub", "signed")
    done = root.run(plan(), {"ssh-keys": {}}, "identity")
    assert done.code == 0, done
    for kind in ("ed25519", "rsa"):
        assert "PRIVATE KEY" in root.read(f"/etc/ssh/ssh_host_{kind}_key")
        assert stat.S_IMODE(root.path(f"/etc/ssh/ssh_host_{kind}_key").stat().st_mode) == 0o600
        assert root.read(f"/etc/ssh/ssh_host_{kind}_key.pub").startswith("ssh-")
    assert not root.path("/etc/ssh/ssh_host_rsa_key-cert.pub").exists()
    assert not list(root.path("/var/lib/rewind").rglob("*key*"))


def test_addresses(root):
    """P6-24: fixed addresses become DHCP, and the rest of each file stays as it is."""
    root.program("dhclient", "")
    root.write("/etc/network/interfaces", (
        "auto lo ens3\niface lo inet loopback\n# static\niface ens3 inet static\n    address 10.0.2.15/24\n"
        "    gateway 10.0.2.2\n    mtu 1400\niface ens4 inet dhcp\n"
    ))  # fmt: skip
    root.write("/etc/systemd/network/10-lan.network", (
        "[Match]\nName=lan0\n\n[Network]\nAddress=10.1.1.1/24\nGateway=10.1.1.254\nDNS=9.9.9.9\n\n[Route]\nGateway=1.1.1.1\n"
    ))  # fmt: skip
    root.write("/etc/NetworkManager/system-connections/eth.nmconnection", (
        "[connection]\nid=eth\n\n[ipv4]\naddress1=10.2.2.2/24,10.2.2.1\ndns=9.9.9.9;\nmethod=manual\n\n[ipv6]\nmethod=auto\n"
    ), 0o600)  # fmt: skip
    done = root.run(plan(), {"addresses": {}}, "identity")
    assert done.code == 0, done
    assert root.read("/etc/network/interfaces") == (
        "auto lo ens3\niface lo inet loopback\n# static\niface ens3 inet dhcp\n    mtu 1400\niface ens4 inet dhcp\n"
    )
    assert root.read("/etc/systemd/network/10-lan.network") == (
        "[Match]\nName=lan0\n\n[Network]\nDHCP=yes\nDNS=9.9.9.9\n\n"
    )
    path = "/etc/NetworkManager/system-connections/eth.nmconnection"
    assert root.read(path) == (
        "[connection]\nid=eth\n\n[ipv4]\ndns=9.9.9.9;\nmethod=auto\n\n[ipv6]\nmethod=auto\n"
    )
    assert stat.S_IMODE(root.path(path).stat().st_mode) == 0o600


def test_addresses_stay_where_nobody_could_ask_for_others(root):
    """A machine with the old address is of more use than one without any."""
    text = "auto ens3\niface ens3 inet static\n    address 10.0.2.15/24\n"
    root.write("/etc/network/interfaces", text)
    root.hide("dhclient", "dhcpcd", "dhcpcd5", "udhcpc", "pump")
    done = root.run(plan(), {"addresses": {}}, "identity")
    assert done.code == 0 and "addresses: left as it was" in done.report, done
    assert root.read("/etc/network/interfaces") == text


def test_addresses_that_nobody_here_can_change_are_named(root):
    root.write("/etc/netplan/01.yaml", "network:\n  ethernets:\n    lan0:\n      addresses: [10.0.0.1/24]\n")
    done = root.run(plan(), {"addresses": {}}, "identity")
    assert done.code == 0 and "addresses: left as it was" in done.report
    assert any("/etc/netplan/01.yaml" in line for line in done.report)


# --- the names of network cards -------------------------------------------------------------------------------------


def test_names_that_the_image_gave_stay(root):
    """P6-24: started by itself the disk has no image to name its cards by."""
    text = "[Match]\nMACAddress=52:54:00:00:00:01\n\n[Link]\nName=ens3\n"
    root.write("/run/systemd/network/10-rewind-ens3.link", text)
    done = root.run(plan(), {"nics": {}}, "settle")
    assert done.code == 0 and root.read("/etc/systemd/network/10-rewind-ens3.link") == text, done
    assert "nics: the names are kept: ens3" in done.report
    again = root.run(plan(), {"nics": {}}, "settle", seed="another image")
    assert "nics: nothing to do" in again.report


# --- the initramfs --------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(root):
    """A disk sda behind an AHCI controller, whose drivers are modules; an initramfs that has neither of them."""
    slot = "/sys/devices/pci0000:00/0000:00:1f.2"
    root.link("/sys/class/block/sda/device", f"{slot}/ata1/host0/target0:0:0/0:0:0:0")
    for place, module in ((slot, "ahci"), (f"{slot}/ata1/host0/target0:0:0/0:0:0:0", "sd_mod")):
        root.write(f"/sys/module/{module}/initstate", "live")
        root.link(f"{place}/driver/module", f"/sys/module/{module}")
    root.program("findmnt", "echo /dev/sda1")
    root.program("lsblk", 'case "$*" in *NAME,TYPE*) echo sda1 part; echo sda disk ;; *PTTYPE*) echo dos ;; esac')
    root.program("lsinitramfs", "cat $1")
    root.write("/etc/initramfs-tools/modules", "# none\n")
    root.write(INITRD, "usr/lib/modules/x/kernel/drivers/block/virtio_blk.ko\n")
    return root


MAKES = f"""echo "$*" >>/calls
echo usr/lib/modules/x/kernel/drivers/ata/ahci.ko.xz >{INITRD}
echo usr/lib/modules/x/kernel/drivers/scsi/sd-mod.ko >>{INITRD}"""
# As one that finds no hardware by itself: only what its configuration names goes in.
TAKES_NAMED = f"echo x >>/calls; sed 's|^|kernel/|; s|$|.ko|' /etc/initramfs-tools/modules >{INITRD}"


def settled(root, **changes):
    return root.run(replace(plan(), **changes), {"initramfs": {}}, "settle")


def test_the_initramfs_is_made_by_the_clients_own_tool(machine):
    """P6-19: on the hardware that it is for, where `MODULES=dep` finds what this disk needs."""
    machine.program("update-initramfs", MAKES)
    done = settled(machine)
    assert done.code == 0 and "initramfs: done" in done.report, done
    assert machine.read("/calls") == f"-u -k {RELEASE}\n"
    assert "the disk needs ahci sd_mod" in done.report[0]
    assert not machine.path(f"{INITRD}.rewind-before").exists()
    assert machine.read("/etc/initramfs-tools/modules") == "# none\n"


def test_a_driver_that_it_leaves_out_is_named_for_it(machine):
    machine.program("update-initramfs", TAKES_NAMED)
    done = settled(machine)
    assert done.code == 0, done
    assert machine.read("/calls") == "x\nx\n"
    assert machine.read("/etc/initramfs-tools/modules") == "# none\nahci\nsd_mod\n"


@pytest.mark.parametrize(
    "program",
    [f"echo rubbish >{INITRD}; exit 1", f"echo kernel/other.ko >{INITRD}", f": >{INITRD}"],
    ids=["fails", "lacks the driver", "makes nothing"],
)
def test_an_initramfs_that_is_of_no_use_is_not_kept(machine, program):
    """P6-19: the disk is never less bootable than it was."""
    before = machine.read(INITRD)
    machine.program("update-initramfs", program)
    done = settled(machine)
    assert done.code == 1 and machine.read(INITRD) == before, done
    assert any("the old initramfs is back" in line for line in done.report)
    assert not machine.path(f"{INITRD}.rewind-before").exists()


def test_dracut(machine):
    machine.program("dracut", f'echo "$*" >/calls; echo kernel/ahci.ko >{INITRD}; echo kernel/sd_mod.ko >>{INITRD}')
    machine.program("lsinitrd", "cat $1")
    done = machine.run(plan(Generator.DRACUT), {"initramfs": {}}, "settle")
    assert done.code == 0 and machine.read("/calls") == f"--force {INITRD} {RELEASE}\n", done


def test_another_kernel_than_the_images_own_is_left_alone(machine):
    machine.program("update-initramfs", MAKES)
    done = settled(machine, client=replace(plan().client, release="5.10.0-1"))
    assert done.code == 0 and "initramfs: left as it was" in done.report
    assert not machine.path("/calls").exists()


# --- the boot loader ------------------------------------------------------------------------------------------------

HEAD = bytes(range(256)) * 2


@pytest.fixture
def disk(machine):
    """Behind it 4 MiB, the first partition at sector 2048, GRUB's menu is there."""
    machine.write("/dev/sda", HEAD + bytes((4 << 20) - len(HEAD)))
    machine.write("/sys/class/block/sda/sda1/start", "2048\n")
    machine.write("/boot/grub/grub.cfg", "menu")
    machine.write("/usr/lib/grub/i386-pc/modinfo.sh", "")
    return machine


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


@pytest.fixture
def uefi(disk):
    """Started by UEFI; sda1 is an ESP that is mounted at /boot/efi."""
    disk.write("/sys/firmware/efi/fw_platform_size", "64")
    disk.write("/boot/efi/EFI/debian/grubx64.efi", "grub")
    disk.program("findmnt", 'case "$*" in *TARGET*) echo /boot/efi ;; *) echo /dev/sda1 ;; esac')
    disk.program("lsblk", (
        'case "$*" in *NAME,PARTTYPE*) echo /dev/sda1 c12a7328-f81f-11d2-ba4b-00a0c93ec93b ;; '
        "*NAME,TYPE*) echo sda1 part; echo sda disk ;; *PTTYPE*) echo gpt ;; esac"
    ))  # fmt: skip
    return disk


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
    uefi.write("/boot/efi/EFI/BOOT/BOOTX64.EFI", "there")
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and uefi.read("/boot/efi/EFI/BOOT/BOOTX64.EFI") == "there"
    assert "loader: nothing to do" in done.report


def test_without_an_esp_and_room_the_boot_volume_stays(uefi):
    uefi.program("lsblk", 'case "$*" in *NAME,PARTTYPE*) ;; *NAME,TYPE*) echo sda disk ;; *) echo dos ;; esac')
    uefi.program("sfdisk", "echo Start End Sectors Size; echo 4194304 4196303 2000 1M")
    uefi.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 0 and "no EFI system partition and no room for one" in done.report[0], done


def test_a_partition_that_cannot_be_used_leaves_the_table_as_it_was(uefi):
    """P6-18: the new ESP has no file system in the end: nobody must find it."""
    uefi.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    uefi.path("/boot/efi/EFI/debian/grubx64.efi").unlink()
    device = uefi.path("/dev/sda")
    with device.open("r+b") as file:
        file.truncate(160 << 20)
    table = "label: dos\nstart=2048, size=20480, type=83, bootable\n"
    subprocess.run(["sfdisk", "-q", device], input=table, text=True, check=True)
    before = device.read_bytes()[:512]
    uefi.program("lsblk", (
        'case "$*" in *NAME,PARTTYPE*) ;; *-nrso*) echo sda1 part; echo sda disk ;; '
        "*NAME,TYPE*) echo /dev/sda1 part ;; *PTTYPE*) echo dos ;; esac"
    ))  # fmt: skip
    uefi.program("partx", "")
    done = loaded(uefi, Firmware.UEFI)
    assert done.code == 1 and "the partition table of /dev/sda is as before" in done.report[0], done
    assert device.read_bytes()[:512] == before


# --- a larger disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def larger(disk):
    """sda is 64 MiB, and sda1, the root, the first 10 of them. The kernel takes what partx tells it."""
    device = disk.path("/dev/sda")
    with device.open("r+b") as file:
        file.truncate(64 << 20)
    table = "label: gpt\nstart=2048, size=20480\n"
    subprocess.run(["sfdisk", "-q", device], input=table, text=True, check=True)
    with device.open("r+b") as file:
        file.truncate(128 << 20)
    for name, text in (("sda1/size", "20480"), ("sda1/partition", "1"), ("sda/size", str(2 * 128 << 10))):
        disk.write(f"/sys/class/block/{name}", f"{text}\n")
    disk.write("/sys/class/block/sda1/start", "2048\n")
    disk.program("lsblk", (
        'case "$*" in *NAME,TYPE*) echo sda1 part; echo sda disk ;; *TYPE*) '
        'case "$*" in *PTTYPE*) echo gpt ;; *) echo part; echo disk ;; esac ;; esac'
    ))  # fmt: skip
    disk.program("findmnt", 'case "$*" in *FSTYPE*) echo ext4 ;; *) echo /dev/sda1 ;; esac')
    disk.program("partx", "sfdisk -d /dev/sda | sed -n 's/.*size= *\\([0-9]*\\).*/\\1/p' >/sys/class/block/sda1/size")
    disk.program("resize2fs", "echo $* >/calls")
    return disk


def grown(root):
    return root.run(plan(), {"grow": {}}, "settle")


def test_the_root_takes_the_room_of_a_larger_disk(larger):
    """P6-18: of a GPT too, whose second table lies where the smaller disk ended."""
    done = grown(larger)
    assert done.code == 0 and larger.read("/calls") == "/dev/sda1\n", done
    assert int(larger.read("/sys/class/block/sda1/size")) > 250_000
    assert any("MiB more" in line for line in done.report)
    subprocess.run(["sfdisk", "-q", "--verify", larger.path("/dev/sda")], check=True)


def test_a_table_that_the_kernel_does_not_take_is_put_back(larger):
    larger.program("partx", "exit 1")
    before = subprocess.run(["sfdisk", "-d", larger.path("/dev/sda")], capture_output=True, check=True).stdout
    done = grown(larger)
    assert done.code == 1 and "the partition table of /dev/sda is as before" in done.report[0], done
    after = subprocess.run(["sfdisk", "-d", larger.path("/dev/sda")], capture_output=True, check=True).stdout
    assert [line for line in after.splitlines() if b"start=" in line] == [
        line for line in before.splitlines() if b"start=" in line
    ]
    assert not larger.path("/calls").exists()


def test_a_disk_that_is_full_has_no_room(larger):
    larger.write("/sys/class/block/sda/size", "30000\n")
    done = grown(larger)
    assert done.code == 0 and "grow: nothing to do" in done.report


def test_a_root_grows_as_far_as_the_next_partition(larger):
    larger.write("/sys/class/block/sda/sda2/start", "24000\n")
    done = grown(larger)
    assert done.code == 0 and "grow: nothing to do" in done.report, done
    assert not larger.path("/calls").exists()
