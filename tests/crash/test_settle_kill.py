"""A client that settles is killed at each command of its steps. Each part of its disk is then as it was or as it is to
be; the next start ends what was begun, with the same result as if nobody had been killed.

What is cut off here are processes; what a power cut takes from memory is for the tests that boot
(tests/integration/test_image_settle.py).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

from appliance.service.image.settling import outcomes
from images.model import Firmware, Generator
from images.settle.choice import After
from tests.support import settled_disk
from tests.support.settled_disk import ESP
from tests.support.settling import INITRD, Root, plan

OLD, NEW = "kernel/virtio_blk.ko\n", "kernel/ahci.ko\nkernel/sd_mod.ko\n"
UUID = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
MACS = [f"52:54:00:00:00:0{number}" for number in range(3)]
KEY = "/etc/ssh/ssh_host_ed25519_key"
PARTS = f"label: gpt\nstart=2048, size=20480, type={ESP}, uuid={UUID}\nsize=20480, name=root\n"
# Each writes in pieces, as the real one does: update-initramfs beside the old file, dracut and GRUB into it.
UPDATE_INITRAMFS = f"echo kernel/ahci.ko >{INITRD}.new\necho kernel/sd_mod.ko >>{INITRD}.new\nmv {INITRD}.new {INITRD}"
DRACUT = 'echo kernel/ahci.ko >"$2"\necho kernel/sd_mod.ko >>"$2"'
GRUB_EFI = 'f=$(echo "$*" | sed "s/.*directory=\\([^ ]*\\).*/\\1/")/EFI/BOOT/BOOTX64.EFI\nmkdir -p ${f%/*}\n'
GRUB_EFI += "printf GRUB >$f\necho ', whole' >>$f"
GRUB_BIOS = "printf GRUB | dd of=/dev/sda conv=notrunc bs=1 seek=100 2>/dev/null\nprintf core >/boot/core"
# Of a file system there is only that it was made, and where.
MKFS = "eval last=\\${$#}\ncat /sys/class/block/${last##*/}/start >/made.new\nmv /made.new /made"


def initramfs(root, generator):
    settled_disk.machine(root)
    root.write(INITRD, OLD)
    root.program("update-initramfs", UPDATE_INITRAMFS, "bash")
    root.program("dracut", DRACUT, "bash")
    root.program("lsinitrd", "cat $1")
    return plan(generator), {"initramfs": {}}, "settle"


def on_gpt(root):
    settled_disk.disk(root)
    settled_disk.table(root, PARTS)
    root.program("grub-install", GRUB_BIOS, "bash")
    return plan(), {"loader": {}}, "settle"


def new_esp(root):
    settled_disk.uefi(root)
    settled_disk.table(root, "label: dos\nstart=2048, size=20480\n")
    root.write("/usr/lib/grub/x86_64-efi/modinfo.sh", "")
    shutil.rmtree(root.path("/boot/efi/EFI"))
    # Mounted by us below /run: then it is a folder of the disk, which has a file system only if it was made.
    root.program("findmnt", 'case "$*" in *TARGET*) ;; *) echo /dev/sda1 ;; esac')
    root.program("mount", "eval last=\\${$#}\n[ -e /made ] && mkdir -p /esp && rmdir $last && ln -s /esp $last", "bash")
    root.program("mkfs.vfat", MKFS, "bash")
    root.program("grub-install", GRUB_EFI, "bash")
    return plan(firmware=Firmware.UEFI), {"loader": {}}, "settle"


def shim(root):
    settled_disk.uefi(root)
    settled_disk.table(root, PARTS)
    settled_disk.entries(root)
    root.write("/boot/efi/EFI/debian/shimx64.efi", "shim")
    return plan(firmware=Firmware.UEFI), {"loader": {}}, "settle"


def grow(root):
    settled_disk.disk(root)
    settled_disk.table(root, "label: gpt\nstart=2048, size=20480\n", mib=96, made_with=32)
    root.program("findmnt", 'case "$*" in *FSTYPE*) echo ext4 ;; *) echo /dev/sda1 ;; esac')
    root.program("resize2fs", "cat /sys/class/block/sda1/size >/grown", "bash")
    return plan(), {"grow": {}}, "settle"


def identity(root):
    for path, text in {
        "/etc/hostname": "ledger\n", "/etc/hosts": "127.0.1.1 ledger.example.org ledger\n", "/etc/mailname": "ledger\n",
        "/etc/machine-id": "0" * 32 + "\n", "/var/lib/dbus/machine-id": "0" * 32 + "\n",
        "/etc/systemd/network/a.network": f"[Match]\nMACAddress={MACS[0]}\n[Network]\nAddress=10.0.0.5/24\n",
        "/etc/systemd/network/b.network": f"[Match]\nMACAddress={MACS[0]} {MACS[1]}\n",
        "/etc/cloud/cloud.cfg.d/x": "", KEY: "old", f"{KEY}.pub": "old",
    }.items():  # fmt: skip
        root.write(path, text)
    # One that does not cost a real key each time.
    root.program("ssh-keygen", f'echo new >"$3{KEY}"\necho new >"$3{KEY}.pub"', "bash")
    # What is the new address of one card is the old one of the other.
    made = plan(rename={MACS[1]: "lan0", MACS[2]: "lan1"})
    made = replace(made, client=replace(made.client, nics={"lan0": MACS[0], "lan1": MACS[1]}))
    return made, After(identity="new", host_name="twin").choice(made, "s"), "identity"


CASES = {
    "initramfs-tools": lambda root: initramfs(root, Generator.INITRAMFS_TOOLS),
    "dracut": lambda root: initramfs(root, Generator.DRACUT),
    "a GPT on a BIOS": on_gpt, "a new ESP": new_esp, "shim": shim, "grow": grow, "identity": identity,
}  # fmt: skip


def unharmed(root, name):
    """The machine starts by the medium, which needs table and root; what else there is, is whole."""
    if root.path("/dev/sda").exists() and name not in ("initramfs-tools", "dracut"):
        lines = root.inside("sfdisk", "-d", "/dev/sda").splitlines()
        root_row = [line for line in lines if "start=" in line and "EFI" not in line and "21686148" not in line]
        where = 22528 if "sda2" in "".join(root_row) and name in ("a GPT on a BIOS", "shim") else 2048
        assert any(re.search(rf"start= *{where},", line) for line in root_row), lines
    if root.path(INITRD).exists() and name in ("initramfs-tools", "dracut"):
        assert root.read(INITRD) in (OLD, NEW)
    fallback = root.path("/boot/efi/EFI/BOOT/BOOTX64.EFI")
    if name == "shim" and fallback.exists():
        assert fallback.read_text() == "shim" and root.read("/boot/efi/EFI/BOOT/grubx64.efi") == "grub"
    for path in ("/etc/hostname", "/etc/machine-id", KEY):
        if name == "identity":
            assert root.read(path).strip()


def state(root):
    """All that a start by itself depends on, and that nothing of ours is left in the way."""
    found = {}
    for folder in ("/boot", "/esp", "/etc", "/var/lib/dbus"):
        for path in sorted(root.path(folder).rglob("*")):
            if path.is_file() and "/efi/list" not in str(path):
                found[str(path)[len(str(root.path("/"))) :]] = path.read_bytes()
    for path in ("/made", "/grown", "/sys/firmware/efi/list"):
        if root.path(path).exists():
            found[path] = root.path(path).read_bytes()
    if root.path("/dev/sda").exists():
        dump = root.inside("sh", "-c", "sfdisk -d /dev/sda 2>/dev/null || :")
        found["table"] = re.sub(r"(label-id|uuid)[:=] *[-0-9A-Fa-fx]+", "", dump)
        with root.path("/dev/sda").open("rb") as file:
            found["code"] = file.read(440)
    return found


def killed_at(folder, name, at):
    """The command that it was killed at, "" if there is none with that number; and what the next start made of it."""
    folder.mkdir()
    with Root(folder) as root:
        made, choice, phase = CASES[name](root)
        cut = root.cut(made, choice, phase, at)
        unharmed(root, name)
        done = root.run(made, choice, phase)
        assert done.code == 0, (at, cut, done)
        return cut, state(root) | {"told": told(root, phase)}, done


def told(root, phase):
    """Step by step what `rewind image settle` makes of it; whether a start had anything left to do is no matter."""
    (report,) = root.path("/var/lib/rewind").glob(f"{phase}-*")
    return {one.name: one.outcome.replace("nothing", "done") for one in outcomes(report.read_text())}


def check(tmp_path, name, numbers):
    _, wanted, whole = killed_at(tmp_path / "whole", name, 1 << 20)
    assert not any("failed" in line or "left as it was" in line for line in whole.report), whole
    for at in numbers:
        cut, found, done = killed_at(tmp_path / str(at), name, at)
        assert found == wanted, (at, cut, done, {key for key in found | wanted if found.get(key) != wanted.get(key)})
        if not cut:
            return at - 1
    return None


@pytest.mark.parametrize(("name", "numbers"), [("dracut", (77,)), ("a new ESP", (160,))])
def test_some_places(tmp_path, name, numbers):
    """P6-18, P6-19: the test of all places takes minutes and is `test_each_place`."""
    check(tmp_path, name, numbers)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(CASES))
def test_each_place(tmp_path, name):
    """P6-18, P6-19, P6-24: killed at each command of each step, the machine starts by the medium or by itself, and the
    next start ends the same as one that nobody has killed."""
    count = check(tmp_path, name, range(1, 1 << 16))
    print(f"{name}: killed at {count} places")
    assert count > 20
