"""What a plan says besides drivers: the command line, names of cards, the mode, and what an admin should know."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import images
from appliance.errors import DriversMissing
from images.drivers.needs import keys_in_initrd
from images.drivers.plan import Options, make_plan, refuse_if_missing
from images.drivers.tables import parse
from images.model import Client, Device, Firmware, Generator, Inventory, Layer, Mount, Nic, Role, Root, Verdict

RELEASE = "6.1.0-1-amd64"
NVME = "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02"
VIRTIO_DISK = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00"
CARD = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
TABLES = parse(
    RELEASE,
    {
        "modules.dep": b"k/nvme.ko: k/nvme-core.ko\nk/nvme-core.ko:\nk/e1000e.ko:\nk/ext4.ko:\nk/dm_crypt.ko:\n"
        b"k/virtio_pci.ko:\nk/virtio_blk.ko:\nupdates/dkms/odd.ko:\n",
        "modules.alias": b"alias pci:v*d*sv*sd*bc01sc08i02* nvme\nalias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n"
        b"alias fs-ext4 ext4\nalias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci\nalias virtio:d00000002v* virtio_blk\n"
        b"alias pci:v0000ABCDd*sv*sd*bc*sc*i* odd\n",
        "modules.builtin": b"k/drivers/tty/serial/8250/8250.ko\n",
    },
)
ROOT = Root("UUID=11-22", "ext4", "11-22", ("vda",), (Layer.PARTITION,))
CLIENT = Client(
    host="web1", os_id="debian", os_name="Debian", release=RELEASE, kernel="/boot/vmlinuz", initrd="/boot/initrd.img",
    modules=f"/lib/modules/{RELEASE}", command_line="root=UUID=11-22 ro client.setting=42", root=ROOT,
    generator=Generator.INITRAMFS_TOOLS, firmware=Firmware.BIOS,
)  # fmt: skip


def target(disk=NVME, macs=(), **changes):
    nics = tuple(Nic(modalias=CARD, mac=mac, slot=f"0000:01:0{n}.0") for n, mac in enumerate(macs))
    devices = (Device(modalias=disk, slot="0000:02:00.0", carries=("vda",)),)
    devices += tuple(Device(modalias=nic.modalias, slot=nic.slot) for nic in nics)
    fields = {"name": "t1", "source": "qemu", "firmware": Firmware.BIOS, "devices": devices, "nics": nics}
    return Inventory(**{**fields, **changes})


def plan(inventory=None, options=None, tables=TABLES, **changes):
    return make_plan(replace(CLIENT, **changes), tables, inventory or target(), TABLES, options=options)


def warned(one, words):
    return any(words in warning for warning in one.warnings)


def test_a_plain_client_has_nothing_to_be_told():
    one = plan()
    assert one.warnings == () and one.mode == "template" and one.load == ("k/nvme-core.ko", "k/nvme.ko", "k/ext4.ko")
    assert one.command_line == CLIENT.command_line and one.rename == {}


def test_tables_of_another_kernel_are_a_mistake():
    with pytest.raises(ValueError, match="for a client with 5"):
        plan(release="5")


def test_the_refusal_lists_every_device():
    """P6-22"""
    with pytest.raises(DriversMissing, match=r"kernel 6\.1\.0-1-amd64 of 'web1' has no driver for pci:v00001000.*t1"):
        refuse_if_missing(plan(target("pci:v00001000d00000060sv00000000sd00000000bc01sc04i00")))


def test_of_several_aliases_of_one_slot_one_driver_is_enough():
    devices = tuple(
        Device(modalias=f"pci:v00001234d00000001sv00000000sd00000000bc01sc08i0{n}", slot="a", carries=("vda",))
        for n in (1, 2)
    )
    assert not plan(target(devices=devices)).missing


def test_a_module_asked_for_by_name_must_be_there():
    (one,) = plan(options=Options(extra=("wireguard",))).missing
    assert one.module == "wireguard" and one.reason == "asked for by name"
    assert "k/dm_crypt.ko" in plan(options=Options(extra=("dm-crypt",))).load


def test_a_console_without_a_driver_is_told_and_refuses_nothing():
    one = plan(target(console="hvc0"))
    assert not one.missing and warned(one, "no driver virtio_console for the console hvc0")
    (serial,) = [d for d in plan(target(console="ttyS0")).decisions if d.role is Role.CONSOLE]
    assert serial.verdict is Verdict.BUILT_IN


def test_a_driver_that_both_kernels_have_built_in_is_recognised():
    """Debian 13 has virtio_pci built in everywhere: no kernel's aliases name it, the list of known drivers does."""
    tables = parse(RELEASE, {
        "modules.dep": b"k/virtio_blk.ko:\nk/ext4.ko:\n", "modules.alias": b"alias virtio:d00000002v* virtio_blk\n",
        "modules.builtin": b"k/virtio_pci.ko\n",
    })  # fmt: skip
    one = make_plan(CLIENT, tables, target(VIRTIO_DISK), tables)
    made = {decision.module: decision.verdict for decision in one.decisions}
    assert made["virtio_pci"] is Verdict.BUILT_IN and made["virtio_blk"] is Verdict.IN and not one.missing
    # A name alone is no driver: here nobody has NVMe.
    assert make_plan(CLIENT, tables, target(NVME), tables).missing[0].module == NVME


_LEVELS = {"raid0", "raid1", "raid10", "raid456"}
_KINDS = {
    "dm_mod", "dm_raid", "dm_mirror", "dm_snapshot", "dm_thin_pool", "dm_cache", "dm_cache_smq", "dm_writecache",
    "dm_integrity", *_LEVELS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "names"), [(Layer.LVM, _KINDS), (Layer.MD, {"md_mod", "linear", *_LEVELS})], ids=["lvm", "md"]
)
def test_what_the_kernel_would_ask_modprobe_for_is_loaded_beforehand(layer, names):
    """P6-07: dm-raid depends on raid456 alone, levels and policies come by request_module, and our init has no
    modprobe. A level that the kernel has not is none that it could have used."""
    for there in (names, names - {"raid10", "raid0", "dm_cache", "dm_cache_smq", "dm_writecache", "dm_integrity"}):
        files = "".join(f"k/{name}.ko:\n" for name in ("nvme", "ext4", *sorted(there)))
        aliases = b"alias pci:v*d*sv*sd*bc01sc08i02* nvme\nalias fs-ext4 ext4\n"
        tables = parse(RELEASE, {"modules.dep": files.encode(), "modules.alias": aliases})
        one = plan(tables=tables, root=replace(ROOT, layers=(Layer.PARTITION, layer), volume="vg/root"))
        assert {f"k/{name}.ko" for name in there} <= set(one.load) and not one.missing


# --- command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "console", "expected"),
    [
        ("root=/dev/vda1 ro", "", "root=UUID=11-22 ro"),
        ("root=/dev/mapper/vg-root ro", "", "root=/dev/mapper/vg-root ro"),
        ("ro quiet", "", "ro quiet root=UUID=11-22"),
        ('root=UUID=11-22 a="b c" ro', "", 'root=UUID=11-22 a="b c" ro'),
        ("root=UUID=11-22", "ttyS0", "root=UUID=11-22 console=ttyS0,115200 console=tty0"),
        ("console=tty0 root=UUID=11-22", "ttyS0", "console=ttyS0,115200 console=tty0 root=UUID=11-22"),
        ("root=UUID=11-22 console=ttyS0,9600n8", "ttyS0", "root=UUID=11-22 console=ttyS0,9600n8"),
        ("root=UUID=11-22 resume=/dev/vda5", "", "root=UUID=11-22 noresume"),
        ("root=UUID=11-22 resume=UUID=55", "", "root=UUID=11-22 resume=UUID=55"),
    ],
)
def test_the_clients_command_line_stays_but_for_what_cannot(line, console, expected):
    """P6-04: its own settings in their order, and the console that is /dev/console stays the client's choice."""
    assert plan(target(console=console), command_line=line).command_line == expected


def test_a_resume_device_that_is_on_no_restored_disk_is_left_out():
    one = plan(options=Options(identifiers={"UUID=11-22"}), command_line="root=UUID=11-22 resume=UUID=55")
    assert one.command_line == "root=UUID=11-22 noresume" and warned(one, "resume=UUID=55 is no device")


def test_flags_that_the_root_needs_are_added_once():
    root = replace(ROOT, flags="subvol=@")
    assert plan(root=root).command_line.endswith(" rootflags=subvol=@")
    line = "root=UUID=11-22 rootflags=subvol=@"
    assert plan(root=root, command_line=line).command_line == line


# --- cards ----------------------------------------------------------------------------------------------------------


def test_cards_get_the_names_that_the_client_expects():
    """In their order; one with the very address keeps its name."""
    macs = ("52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03")
    one = plan(target(macs=macs), nics={"ens3": "", "ens4": macs[0], "ens5": ""})
    assert one.rename == {macs[0]: "ens4", macs[1]: "ens3", macs[2]: "ens5"}
    assert one.warnings == ()


def test_what_cannot_be_named_is_told():
    one = plan(target(macs=("52:54:00:00:00:01",)), nics={"ens3": "52:54:00:00:00:99", "ens4": ""})
    assert one.rename == {"52:54:00:00:00:01": "ens3"}
    assert warned(one, "knows ens3 by 52:54:00:00:00:99; the card that gets this name has 52:54:00:00:00:01")
    assert warned(one, "expects ens4, for which the target has no card")
    assert warned(plan(target(macs=("",)), nics={"ens3": ""}), "cannot be given the name ens3")
    assert not warned(plan(target(macs=("",)), nics={"ens3": ""}), "for which the target has no card")
    assert warned(plan(nics={"ens3": ""}), "no network card that is wanted; the guest expects ens3")


# --- mode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"root": replace(ROOT, layers=(Layer.LUKS,)), "crypttab": ("root UUID=1 none luks,tpm2-device=auto",)},
        {"root": replace(ROOT, layers=(Layer.LUKS,)), "crypttab": ("root UUID=1 none luks,keyscript=/x",)},
        {"command_line": "root=/dev/mapper/mpatha-part1"},
        {"command_line": "root=ZFS=rpool/ROOT boot=zfs"},
        {"command_line": "root=/dev/nfs nfsroot=10.0.0.1:/x"},
        {"command_line": "root=UUID=1 netroot=iscsi:10.0.0.1::::x"},
        {"root": replace(ROOT, fs="btrfs", disks=("vda", "vdb"))},
    ],
)
def test_roots_that_our_init_does_not_know_keep_the_clients_initrd(changes):
    one = plan(**changes)
    assert one.mode == "append" and warned(one, "the guest's own initrd stays in use")
    assert warned(plan(initrd="", **changes), "no initrd that could be kept")


@pytest.mark.parametrize("layers", [(Layer.LVM,), (Layer.MD, Layer.LVM), (Layer.LUKS, Layer.LVM)])
def test_roots_that_our_init_knows(layers):
    containers = (("root", "22-33"),) if Layer.LUKS in layers else ()
    assert plan(root=replace(ROOT, layers=layers, containers=containers)).mode == "template"


def test_a_container_that_crypttab_does_not_name_keeps_the_clients_initrd():
    """dracut opens by rd.luks.uuid alone; nothing was opened and nothing was said."""
    line = "root=UUID=11-22 rd.luks.uuid=luks-22-33"
    one = plan(root=replace(ROOT, layers=(Layer.LUKS,)), command_line=line, crypttab=("data UUID=9 /key luks",))
    assert one.mode == "append" and warned(one, "no line of crypttab names the encrypted container below the root")


def test_a_usr_on_layers_that_the_root_has_not_keeps_the_clients_initrd():
    one = plan(usr_layers=(Layer.PARTITION, Layer.LVM))
    assert one.mode == "append" and warned(one, "/usr is on lvm and the root is not")
    assert plan(usr_layers=(Layer.PARTITION,)).mode == "template"
    assert plan(usr_layers=(Layer.LVM,), root=replace(ROOT, layers=(Layer.LVM,))).mode == "template"


def test_people_read_of_the_guest():
    """The code's word for the system in a point is another one: who reads a plan does not know it."""
    found = []
    for path in sorted(Path(images.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        texts = [one.value for one in ast.walk(tree) if isinstance(one, ast.Expr)]  # docstrings
        for one in ast.walk(tree):
            if isinstance(one, ast.Constant) and isinstance(one.value, str) and one not in texts:
                found += [(path.name, one.value)] if re.search(r"\bthe client\b", one.value) else []
    assert found == []


# --- warnings -------------------------------------------------------------------------------------------------------


def test_secure_boot_is_reported():
    """P6-26"""
    secure, own = target(secure_boot=True, firmware=Firmware.UEFI), {"shim": "/s", "grub": "/g"}

    def told(**changes):
        """Without what they all begin with."""
        return [one.removeprefix("Secure Boot is on") for one in plan(secure, **changes).warnings if "Secure" in one]

    assert told() == [f", and kernel {RELEASE} is not signed: no image is built"]
    way = ": the image starts the guest's signed kernel by shim and GRUB of the "
    assert told(signed_kernel=True, **own) == told(signed_kernel=True, os_id="other", **own) == [f"{way}guest"]
    # Debian's are in the template: what the guest lacks of them hinders nothing.
    assert told(signed_kernel=True) == told(signed_kernel=True, shim="/s") == [f"{way}template"]
    lacks = [f", and the guest has no signed {what}: no image is built" for what in ("shim", "GRUB")]
    assert told(signed_kernel=True, os_id="other") == lacks
    assert told(signed_kernel=True, os_id="other", shim="/s") == lacks[1:]
    odd = target("pci:v0000ABCDd00000001sv00000000sd00000000bc01sc08i00", secure_boot=True)
    assert warned(plan(odd), "module updates/dkms/odd.ko loads only if the target trusts the key")


def test_keys_sealed_to_the_old_machine_are_told():
    line = ("root UUID=1 none luks,tpm2-device=auto",)
    assert warned(plan(crypttab=line), "the target has no TPM")
    assert warned(plan(target(tpm=True), crypttab=line), "the target has another TPM")
    assert warned(plan(crypttab=("root UUID=1 none clevis",)), "gets a key by clevis")
    assert warned(plan(root=replace(ROOT, layers=(Layer.LUKS,))), "its passphrase is asked for")


@pytest.mark.parametrize(("crypttab", "line", "keys"), [
    (("root UUID=1 /etc/keys/root.key luks,keyscript=/bin/cat",), "", ("/etc/keys/root.key",)),
    ((), "root=/dev/mapper/x rd.luks.key=UUID=1=/keys/root.key:UUID=2", ("/keys/root.key",)),
    ((), "root=/dev/mapper/x rd.luks.key=/root.key", ("/root.key",)),
    (("root UUID=1 none luks,tpm2-device=auto",), "", ()), (("root UUID=1 /dev/urandom luks,_netdev",), "", ()),
    (("root UUID=1",), "", ()),
])  # fmt: skip
def test_keys_that_the_own_initrd_may_hold(crypttab, line, keys):
    """I7: they would be in the image."""
    root = replace(ROOT, layers=(Layer.PARTITION, Layer.LUKS))
    one = plan(root=root, crypttab=crypttab, **({"command_line": line} if line else {}))
    assert keys_in_initrd(one.client) == keys
    for path in keys:
        assert one.mode == "append"
        assert warned(one, f"may hold the key {path}: such an image is not built")
    assert keys_in_initrd(replace(one.client, root=ROOT)) == ()


@pytest.mark.parametrize(
    ("mount", "disk", "words"),
    [
        (Mount("/dev/vda1", "/", "ext4", ("defaults",)), NVME, "may not be remounted"),
        (Mount("/dev/vdb1", "/data", "ext4", ("defaults",)), NVME, "named nvme…: the system stops there (no nofail)"),
        (Mount("/dev/vdb1", "/data", "ext4", ("nofail",)), NVME, "the system starts without it"),
        (Mount("/dev/vda5", "none", "swap", ("sw",)), NVME, "uses swap on /dev/vda5"),
        (Mount("/dev/vdb1", "/data", "ext4", ()), VIRTIO_DISK, "which is not among the restored disks"),
        (Mount("/dev/vda2", "/data", "ext4", ()), VIRTIO_DISK, ""),
        (Mount("UUID=11-22", "/", "ext4", ()), NVME, ""),
        (Mount("UUID=99", "/data", "ext4", ()), NVME, "which is on none of the restored disks"),
        (Mount('LABEL="x"', "/data", "ext4", ("nofail",)), NVME, "the system starts without it"),
        (Mount("/dev/disk/by-uuid/AB-22", "/data", "ext4", ()), NVME, ""),
        (Mount("/dev/disk/by-uuid/99", "/data", "ext4", ()), NVME, "which is on none of the restored disks"),
        (Mount("tmpfs", "/tmp", "tmpfs", ()), NVME, ""),
        (Mount("//server/share=1", "/mnt", "cifs", ()), NVME, ""),
        (Mount("/dev/mapper/vg-x", "/x", "ext4", ()), NVME, ""),
    ],
)
def test_fstab_lines_that_will_not_work_are_told(mount, disk, words):
    one = plan(target(disk), Options(identifiers={"UUID=11-22", "UUID=ab-22"}), fstab=(mount,))
    found = [warning for warning in one.warnings if warning.startswith("fstab")]
    assert len(found) == bool(words) and all(words in warning for warning in found)


def test_disks_that_the_target_has_no_place_for_are_told():
    one = plan(root=replace(ROOT, disks=("vda", "vdb"), layers=(Layer.LVM,)))
    assert warned(one, "the root lies on vda and vdb, and the target has a place for vda only")


def test_consoles_and_firmware_that_the_target_does_not_have():
    line = "root=UUID=11-22 console=tty0 console=ttyS1,115200"
    one = plan(target(console="ttyS0", firmware=Firmware.UEFI), command_line=line)
    assert warned(one, "has console=ttyS1, and of the target ttyS0 is known")
    assert not warned(one, "console=tty0,")
    assert warned(one, "set up for BIOS and the target has UEFI")
