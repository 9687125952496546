"""An image boots a client on a machine it has never seen: one kernel, the client's own, and its disk as it was."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.process import run
from images.build import build_image
from images.model import Firmware, Layer, Mount
from images.template.settings import Settings
from tests.support import imagekit
from tests.support.limits import limit
from tests.support.typist import answering, console_arguments

_OVMF = Path("/usr/share/OVMF")
_NIC = ["-netdev", "user,id=net,restrict=on", "-device", f"e1000e,netdev=net,mac={imagekit.MAC}"]


@pytest.fixture(scope="module")
def template():
    return imagekit.template()


@pytest.fixture(scope="module")
def client():
    return imagekit.client()


class Machine:
    """A machine of software that boots once; what it said on its console and by its proof."""

    def __init__(self, folder: Path, client, *arguments: str, uefi: str = "", smm: str = "off", answer=("", "")):
        self.disk = shutil.copy(client.disk, folder / "root.img")
        self.before = hashlib.sha256(self.disk.read_bytes()).hexdigest()
        self.proof_file, self.console_file = folder / "proof.log", folder / "console.log"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-machine", f"q35,smm={smm}", "-cpu", "max", "-m", "512"]
        command += ["-nodefaults", "-display", "none", "-no-reboot"]
        command += [*console_arguments(folder / "console", self.console_file), "-serial", f"file:{self.proof_file}"]
        if uefi:
            variables = shutil.copy(_OVMF / f"OVMF_VARS_4M{uefi}", folder / "vars.fd")
            command += ["-drive", f"if=pflash,format=raw,readonly=on,file={_OVMF / f'OVMF_CODE_4M{uefi}'}"]
            command += ["-drive", f"if=pflash,format=raw,file={variables}"]
        command += ["-drive", f"if=none,id=root,format=raw,file={self.disk}", *_NIC, *arguments]
        with answering(folder / "console", self.console_file, *answer):
            run(command, timeout=limit(120))
        self.console = self.console_file.read_text(errors="replace")
        self.proof = self.proof_file.read_text(errors="replace").replace("\r", "")

    def has_booted(self, client) -> None:
        """One kernel, and it is the client's; its command line, its card's old name; the root as the client has it."""
        assert "\nend\n" in self.proof, self.console[-4000:]
        assert len(re.findall(r"Linux version", self.console)) == 1, self.console
        assert f"release: {client.release}\n" in self.proof
        assert "client.setting=42" in self.proof
        assert f"nic: lan7 {imagekit.MAC}" in self.proof
        assert "run: /run/systemd/network/10-rewind-lan7.link" in self.proof
        assert re.search(r"root: /dev/\S+ / ext4 ro", self.proof)
        assert "pid: 1\n" in self.proof


def attached(file: Path, *device: str) -> list[str]:
    return ["-drive", f"if=none,id=boot,format=raw,readonly=on,file={file}", *device]


STICK = ["-device", "qemu-xhci", "-device", "usb-storage,drive=boot,bootindex=0"]
CD = ["-device", "ide-cd,drive=boot,bus=ide.1,bootindex=0"]
NVME = ["-device", "nvme,drive=root,serial=1"]
AHCI = ["-device", "ide-hd,drive=root,bus=ide.0"]


@pytest.mark.timeout(200)
def test_esp_disk_on_uefi_and_nvme(template, client, tmp_path):
    """P6-07, P6-12, P6-19: firmware, controller and card are new; one kernel boots, the client's, not the template's.

    The disk was never set up for UEFI and has no driver for NVMe in an initramfs: it has none at all."""
    plan = imagekit.plan(client, imagekit.inventory(), "nvme", "e1000e")
    built = build_image(plan, client.tree(), template, media=["esp"], folder=tmp_path / "image")
    assert template.release != client.release
    machine = Machine(tmp_path, client, *NVME, *attached(built.files["esp"], *STICK), uefi=".fd")
    machine.has_booted(client)
    # Mounted read-only and clean, it is what it was to the last byte.
    assert hashlib.sha256(machine.disk.read_bytes()).hexdigest() == machine.before


@pytest.mark.timeout(200)
def test_iso_on_bios_and_ahci(template, client, tmp_path):
    """P6-07, P6-19: the same client by a CD on BIOS, where GRUB starts its kernel."""
    plan = imagekit.plan(client, imagekit.inventory(Firmware.BIOS), "ahci", "e1000e")
    built = build_image(plan, client.tree(), template, media=["iso"], folder=tmp_path / "image")
    machine = Machine(tmp_path, client, *AHCI, *attached(built.files["iso"], *CD))
    machine.has_booted(client)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "medium, firmware, device, uefi",
    [
        ("disk", Firmware.BIOS, STICK, ""),
        ("disk", Firmware.UEFI, STICK, ".fd"),
        ("usb", Firmware.BIOS, STICK, ""),
        ("usb", Firmware.UEFI, STICK, ".fd"),
        ("iso", Firmware.UEFI, CD, ".fd"),
    ],
)
def test_every_medium_on_every_firmware(medium, firmware, device, uefi, template, client, tmp_path):
    """P6-19: one build, all media."""
    plan = imagekit.plan(client, imagekit.inventory(firmware), "nvme", "e1000e")
    built = build_image(plan, client.tree(), template, media=[medium], folder=tmp_path / "image")
    Machine(tmp_path, client, *NVME, *attached(built.files[medium], *device), uefi=uefi).has_booted(client)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("medium, device", [("esp", STICK), ("iso", CD), ("disk", STICK)])
def test_secure_boot(medium, device, template, client, tmp_path):
    """P6-26: firmware that starts only what is signed starts shim, GRUB and the client's kernel."""
    plan = imagekit.plan(client, imagekit.inventory(secure_boot=True), "nvme", "e1000e")
    built = build_image(plan, client.tree(), template, media=[medium], folder=tmp_path / "image")
    machine = Machine(tmp_path, client, *NVME, *attached(built.files[medium], *device), uefi=".ms.fd", smm="on")
    machine.has_booted(client)
    assert "Secure boot enabled" in machine.console


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_uki_is_refused_by_secure_boot_itself(template, client, tmp_path):
    """P6-26, control: what we refuse to build for such a target would not start there."""
    plan = imagekit.plan(client, imagekit.inventory(), "nvme", "e1000e")
    built = build_image(plan, client.tree(), template, media=["esp"], folder=tmp_path / "image")
    with pytest.raises(Exception, match="no end after"):
        Machine(tmp_path, client, *NVME, *attached(built.files["esp"], *STICK), uefi=".ms.fd", smm="on")
    assert "Linux version" not in (tmp_path / "console.log").read_text(errors="replace")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_missing_root_is_told_and_ends(template, client, tmp_path):
    """P6-20: no silent hang: the console says what is missing and which disks there are, and the machine goes off."""
    plan = imagekit.plan(client, imagekit.inventory(Firmware.BIOS), "ahci")
    patient = Settings(wait_seconds=4, linger_seconds=2)
    built = build_image(plan, client.tree(), template, media=["iso"], folder=tmp_path / "image", settings=patient)
    machine = Machine(tmp_path, client, *NVME, *attached(built.files["iso"], *CD))
    assert machine.proof == ""
    assert f"CANNOT GO ON: the root file system UUID={imagekit.UUID} is not there" in machine.console
    assert re.search(r"disks of this machine: .*sr0", machine.console)
    assert "nothing was written" in machine.console


_SEALED = "0b5e9f3c-2d41-4c7a-9a55-6e0d7c1b2a39"
# Run by our init in the place of a stream: makes the layers on two empty disks and copies the client's root there.
_MAKE_LAYERS = """
set -x
# Disks are named in the order in which they answer.
client=$(device_of "$ROOT")
set --
for one in /dev/sd?; do [ "$one" = "$client" ] || set -- "$@" "$one"; done
seal() {
    x cryptsetup luksFormat --batch-mode --uuid=@SEALED@ --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$1" /rw/key
    x cryptsetup open --key-file /rw/key "$1" sealed
    below=/dev/mapper/sealed
}
case $LAYERS in
    luks*) seal "$1" ;;
    lvm*) below=$1 ;;
    *)
        x mdadm --create /dev/md0 --run --level=1 --metadata=1.2 --raid-devices=2 "$@"
        below=/dev/md0 ;;
esac
x lvm pvcreate --config "$LVM" $below && x lvm vgcreate --config "$LVM" vg $below
x lvm lvcreate --config "$LVM" --wipesignatures n -l 2 -n usr vg && mke2fs -L own-usr /dev/mapper/vg-usr
x lvm lvcreate --config "$LVM" --wipesignatures n -l 100%FREE -n root vg
root=/dev/mapper/vg-root
case $LAYERS in lvm*) seal $root && root=$below ;; esac
mke2fs $root
mkdir /tmp/new && mount "$client" -o ro /root && mount -t ext4 $root /tmp/new && cp -a /root/. /tmp/new/
mkdir -p /tmp/new/usr
umount /tmp/new
case $LAYERS in lvm*) x cryptsetup close sealed ;; esac
x lvm vgchange --config "$LVM" -an vg && echo made >/dev/ttyS1
poweroff -f
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layers", "usr"),
    [
        ((Layer.MD, Layer.LVM), "LABEL=own-usr"),
        ((Layer.LUKS, Layer.LVM), ""),
        ((Layer.LVM, Layer.LUKS), "/dev/mapper/vg-usr"),
    ],
    ids=["md", "luks", "luks on lvm"],
)
def test_root_on_layers(layers, usr, template, client, tmp_path):
    """P6-07: our own init brings up arrays, keys (by the console) and volumes, that of a /usr too; its hook runs before
    the root is looked for. The passphrase is in no file of the image that boots."""
    secret = "correct horse battery"
    target = imagekit.inventory(Firmware.BIOS)
    drivers = ("ahci", "raid1", "dm_mod", "dm_crypt", "ecb", "xts", "aes_generic", "sha256_generic")
    disks = []
    for number in (2, 3):
        blank = tmp_path / f"disk{number}"
        blank.touch()
        blank.open("r+b").truncate(96 << 20)
        disks += ["-drive", f"if=none,id=d{number},format=raw,file={blank}"]
        disks += ["-device", f"ide-hd,drive=d{number},bus=ide.{number}"]
    plan = imagekit.plan(client, target, *drivers, "e1000e")
    hook = f"LAYERS={layers[0].value}\n{_MAKE_LAYERS}".replace("@SEALED@", _SEALED).encode()
    tools = ("mdadm", "lvm", "cryptsetup", "dmsetup")
    making = Settings(extra={"rw/stream": hook, "rw/key": secret.encode()}, tools=tools)
    first = build_image(plan, client.tree(), template, media=["iso"], folder=tmp_path / "make", settings=making)
    made = Machine(tmp_path, client, *AHCI, *disks, *attached(first.files["iso"], *CD))
    assert made.proof.endswith("made\n"), made.console[-4000:]

    volume = "vg/root" if layers[-1] is Layer.LVM else ""
    name = "/dev/mapper/vg-root" if volume else "/dev/mapper/sealed"
    sealed = (("sealed", _SEALED),) if Layer.LUKS in layers else ()
    root = replace(
        plan.client.root, spec=name, layers=(Layer.PARTITION, *layers), volume=volume, containers=sealed
    )  # fmt: skip
    fstab = (Mount(usr, "/usr", "ext4", ("defaults",)),) if usr else ()
    line = plan.command_line.replace(f"UUID={imagekit.UUID}", root.spec)
    plan = replace(plan, client=replace(plan.client, root=root, fstab=fstab), command_line=line)
    second = build_image(plan, client.tree(), template, media=["iso"], folder=tmp_path / "image")
    assert secret.encode() not in second.files["iso"].read_bytes()
    question = ("Enter passphrase", secret + "\n") if sealed else ("", "")
    machine = Machine(tmp_path, client, *AHCI, *disks, *attached(second.files["iso"], *CD), answer=question)
    machine.has_booted(client)
    assert f"root: {name} / ext4 ro" in machine.proof
    # The ext4 with the client's files has no /usr that is a file system.
    assert ("mounted: /usr" in machine.proof) == bool(usr)
