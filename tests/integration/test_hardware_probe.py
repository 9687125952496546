"""Real QEMU and real libvirt: what a target has is found with nothing booted on it (P6-09, P6-14, P6-17, P6-21, P6-25).

libvirt only completes definitions and translates them; QEMU is asked while it stands still. One guest is started, to
see that a kernel finds the same.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance import process
from appliance.errors import BadInventory, ToolFailed
from images import hardware
from images.hardware import command_line, expand, qemu
from images.model import Firmware, Inventory
from tests.guests import initramfs, packages
from tests.guests.initramfs import Archive, add_busybox, add_modules
from tests.support import libvirt

MAC = "52:54:00:0a:0b:0c"


@dataclass(frozen=True)
class Case:
    """A machine: vendor and device of its disk controller and NIC, and how a disk `target` hangs on it."""

    name: str
    machine: str
    controllers: str
    bus: str
    nic: str
    controller_ids: tuple[int, int]
    nic_ids: tuple[int, int]
    target: str = "sda"
    behind_port: bool = False
    uefi: bool = False


XHCI = "<controller type='usb' model='qemu-xhci'/>"
SCSI = "<controller type='scsi' model='{}'/>"
CASES = [
    Case("ide", "pc", "", "ide", "e1000", (0x8086, 0x7010), (0x8086, 0x100E), target="hda"),
    Case("ahci", "q35", "", "sata", "e1000e", (0x8086, 0x2922), (0x8086, 0x10D3)),
    Case("ahci-on-pc", "pc", "", "sata", "pcnet", (0x8086, 0x2922), (0x1022, 0x2000)),
    Case("virtio", "pc", "", "virtio", "virtio", (0x1AF4, 0x1001), (0x1AF4, 0x1000), target="vda"),
    Case("virtio-q35", "q35", "", "virtio", "virtio", (0x1AF4, 0x1042), (0x1AF4, 0x1041), "vda", behind_port=True),
    Case("virtio-scsi", "q35", SCSI.format("virtio-scsi"), "scsi", "virtio", (0x1AF4, 0x1048), (0x1AF4, 0x1041)),
    Case("lsilogic", "pc", SCSI.format("lsilogic"), "scsi", "rtl8139", (0x1000, 0x0012), (0x10EC, 0x8139)),
    Case("mptsas", "pc", SCSI.format("lsisas1068"), "scsi", "e1000", (0x1000, 0x0054), (0x8086, 0x100E)),
    Case("megasas", "q35", SCSI.format("lsisas1078"), "scsi", "rtl8139", (0x1000, 0x0060), (0x10EC, 0x8139)),
    Case("pvscsi", "q35", SCSI.format("vmpvscsi"), "scsi", "vmxnet3", (0x15AD, 0x07C0), (0x15AD, 0x07B0)),
    Case("uefi", "q35", "", "virtio", "virtio", (0x1AF4, 0x1042), (0x1AF4, 0x1041), "vda", behind_port=True, uefi=True),
    Case("nvme", "q35", "", "nvme-by-arguments", "e1000e", (0x1B36, 0x0010), (0x8086, 0x10D3), "nvm", uefi=True),
    Case("usb", "q35", XHCI, "usb", "e1000e", (0x1B36, 0x000D), (0x8086, 0x10D3)),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def written_by_hand(case: Case, images: Path) -> str:
    """As short as a person may write it: no address, and no controller that libvirt adds by itself."""
    disk = images / "none.img"
    disk.touch()
    a_disk = f"""<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>
          <target dev='{case.target}' bus='{case.bus}'/></disk>"""
    arguments = ""
    if case.bus == "nvme-by-arguments":  # libvirt has no words for it before version 11
        words = ["-drive", f"file={disk},format=raw,if=none,id=nvm", "-device", "nvme,drive=nvm,serial=1"]
        a_disk, arguments = "", "".join(f"<qemu:arg value='{word}'/>" for word in words)
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>hw-{case.name}</name><memory unit='MiB'>96</memory>
      <os{" firmware='efi'" if case.uefi else ""}>
        <type arch='x86_64' machine='{case.machine}'>hvm</type></os>
      <features><acpi/></features>
      <devices>
        {case.controllers}
        {a_disk}
        <interface type='user'><mac address='{MAC}'/><model type='{case.nic}'/></interface>
        <serial type='null'/>
      </devices><qemu:commandline>{arguments}</qemu:commandline></domain>"""


def ids(inventory: Inventory) -> Counter[str]:
    return Counter(device.modalias for device in inventory.devices)


def carrier(inventory: Inventory, target: str) -> expand.Pci:
    (device,) = [one for one in inventory.devices if target in one.carries and one.modalias.startswith("pci:")]
    pci = expand.parse_pci(device.modalias)
    assert pci is not None
    return pci


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_definition_that_libvirt_made_and_libvirts_own_command_line_tell_the_same(
    name, libvirt_uri, libvirt_images, tmp_path
):
    """P6-21, P6-17: three ways to the same machine, none of which starts it: the definition as libvirt completed it,
    the QEMU command line that libvirt makes of it, and what a person wrote."""
    case = BY_NAME[name]
    (tmp_path / "x.xml").write_text(written_by_hand(case, libvirt_images))
    libvirt.virsh("define", str(tmp_path / "x.xml"))
    try:
        complete = libvirt.virsh("dumpxml", "--inactive", f"hw-{case.name}").stdout
        native = libvirt.virsh("domxml-to-native", "qemu-argv", "--domain", f"hw-{case.name}").stdout
    finally:
        libvirt.virsh("undefine", f"hw-{case.name}")
    found = hardware.from_xml(complete, source="libvirt")
    told = hardware.from_qemu(native)
    assert ids(told) == ids(found)
    assert [one.slot for one in told.devices] == [one.slot for one in found.devices]
    assert told.nics == found.nics and told.firmware is found.firmware
    by_hand = hardware.from_xml(written_by_hand(case, libvirt_images))
    assert set(ids(by_hand)) == set(ids(found))
    for inventory in (found, by_hand):
        pci = carrier(inventory, case.target)
        assert (pci.vendor, pci.device) == case.controller_ids
        (nic,) = inventory.nics
        card = expand.parse_pci(nic.modalias)
        assert card is not None and (card.vendor, card.device) == case.nic_ids
        assert nic.mac == MAC
        assert inventory.console == "ttyS0" and inventory.memory_bytes == 96 << 20
        assert inventory.firmware is (Firmware.UEFI if case.uefi else Firmware.BIOS)
        if case.behind_port:
            assert not nic.slot.startswith("0000:00:")


# --- what a kernel sees ---------------------------------------------------------------------------------------------

# Each kind of device, behind each kind of bridge; disks of nothing.
EVERYTHING = """-machine q35 -m 256 -nodefaults
    -device pcie-root-port,id=rp1,bus=pcie.0,addr=1.0,chassis=1,multifunction=on
    -device pcie-root-port,id=rp2,bus=pcie.0,addr=1.1,chassis=2
    -device pcie-root-port,id=rp3,bus=pcie.0,addr=1.2,chassis=3
    -device pcie-root-port,id=rp4,bus=pcie.0,addr=1.3,chassis=4
    -device pcie-pci-bridge,id=br1,bus=rp1 -device pci-bridge,id=br2,bus=br1,addr=5,chassis_nr=9
    -device x3130-upstream,id=up,bus=rp2 -device xio3130-downstream,id=down1,bus=up,chassis=5
    -device xio3130-downstream,id=down2,bus=up,addr=2,chassis=6
    -device pxb-pcie,id=pxb,bus=pcie.0,bus_nr=128 -device pcie-root-port,id=rp5,bus=pxb,chassis=7
    -blockdev driver=null-co,node-name=d1,read-zeroes=on,size=1048576
    -blockdev driver=null-co,node-name=d2,read-zeroes=on,size=1048576
    -blockdev driver=null-co,node-name=d3,read-zeroes=on,size=1048576
    -blockdev driver=null-co,node-name=d4,read-zeroes=on,size=1048576
    -blockdev driver=null-co,node-name=d5,read-zeroes=on,size=1048576
    -device nvme,id=disk1,drive=d1,serial=x,bus=down1 -device virtio-blk-pci,id=disk2,drive=d2,bus=down2
    -device virtio-scsi-pci,id=vs,bus=pcie.0 -device scsi-hd,id=disk3,drive=d3,bus=vs.0
    -device qemu-xhci,id=xhci,bus=rp3 -device usb-storage,id=disk4,drive=d4,bus=xhci.0 -device usb-tablet
    -device ide-hd,id=disk5,drive=d5,bus=ide.0
    -device lsi53c895a,bus=br2,addr=1 -device megasas,bus=pcie.0 -device mptsas1068,bus=pcie.0
    -device pvscsi,bus=rp4 -device sdhci-pci,bus=pcie.0
    -device ich9-ahci,id=ahci2,bus=br1,addr=2
    -device e1000,romfile=,mac=52:54:00:00:00:01,bus=br2,addr=7 -device e1000e,romfile=,mac=52:54:00:00:00:02,bus=rp5
    -device vmxnet3,romfile=,mac=52:54:00:00:00:03,bus=pcie.0 -device rtl8139,romfile=,mac=52:54:00:00:00:04,bus=pcie.0
    -device virtio-net-pci,romfile=,mac=52:54:00:00:00:05,disable-legacy=on,bus=pcie.0
    -device virtio-rng-pci,bus=pcie.0 -device VGA,bus=pcie.0"""
MODULES = [
    "virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_rng", "ahci", "nvme", "xhci_pci", "usb_storage",
    "sd_mod", "e1000", "e1000e", "vmxnet3", "8139cp",
]  # fmt: skip
INIT = b"""#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for one in $(cat /modules/order); do insmod $one; done
for second in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/block/nvme0n1 ] && [ -e /sys/block/sdc ] && break; sleep 1; done
sh /machine.sh >/dev/ttyS1
poweroff -f
"""


def kernel_and_initrd() -> tuple[Path, Path]:
    """Debian's own kernel with busybox, whose shell runs our script. Built once."""

    def build(folder: Path) -> None:
        unpacked = folder / "unpacked"
        packages.unpack(packages.kernel_package("amd64"), unpacked)
        packages.unpack("busybox-static", unpacked)
        (kernel,) = unpacked.glob("boot/vmlinuz-*")
        shutil.copy(kernel, folder / "vmlinuz")
        archive = Archive()
        for name in ("bin", "dev", "proc", "sys", "modules"):
            archive.folder(name)
        archive.file("init", INIT, 0o755)
        add_busybox(archive, unpacked, [
            "sh", "cat", "insmod", "mount", "od", "poweroff", "printf", "sed", "sleep", "tr", "uname",
        ])  # fmt: skip
        add_modules(archive, unpacked, MODULES)
        (folder / "base.cpio").write_bytes(archive.finish())
        shutil.rmtree(unpacked)

    digest = packages.sources_digest([Path(initramfs.__file__)], INIT.decode() + " ".join(MODULES))
    folder = packages.cached(f"hardware-{digest}", build)
    return folder / "vmlinuz", folder / "base.cpio"


@pytest.fixture(scope="module")
def seen_by_the_kernel(tmp_path_factory) -> Inventory:
    """What `machine.sh` prints in a machine with everything, under Debian's kernel and busybox."""
    folder = tmp_path_factory.mktemp("kernel")
    kernel, base = kernel_and_initrd()
    own = Archive()
    own.file("machine.sh", hardware.script().encode(), 0o644)
    (folder / "initrd").write_bytes(base.read_bytes() + own.finish())
    argv = [
        "qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-no-reboot", *shlex.split(EVERYTHING),
        "-kernel", str(kernel), "-initrd", str(folder / "initrd"), "-append", "console=ttyS0 panic=-1 quiet",
        "-serial", f"file:{folder / 'console'}", "-serial", f"file:{folder / 'script'}",
    ]  # fmt: skip
    process.run(argv, timeout=240)
    text = (folder / "script").read_text().replace("\r\n", "\n")
    assert text.endswith("]}\n"), (folder / "console").read_text()[-3000:]
    return hardware.from_script_output(text, target="seen")


@pytest.mark.timeout(300)
def test_a_kernel_sees_the_same_devices_as_were_found_without_one(seen_by_the_kernel):
    """P6-09, P6-21: every alias of every PCI function, behind every kind of bridge, digit for digit; what the kernel
    sees behind them was foretold; NICs and their addresses are the same."""
    found = hardware.from_qemu(shlex.split(EVERYTHING), target="found")
    kernel = ids(seen_by_the_kernel)
    assert {a: n for a, n in kernel.items() if a.startswith("pci:")} == {
        a: n for a, n in ids(found).items() if a.startswith("pci:")
    }
    later = {a for a in kernel if a.startswith(("virtio:", "scsi:", "usb:", "mmc:"))}
    foretold = {alias for alias, _ in expand.upper_aliases(found.devices)} | set(ids(found))
    hubs = {a for a in later if a.startswith("usb:v1D6B")}  # the root hubs, whose driver is usbcore itself
    assert {"scsi:t-0x00", "virtio:d00000002v00001AF4", "virtio:d00000001v00001AF4"} < later
    assert later - hubs <= foretold
    macs = {nic.mac: nic.modalias for nic in found.nics}
    assert len(macs) == 5
    for nic in seen_by_the_kernel.nics:
        assert nic.mac in macs
        assert nic.modalias in (macs[nic.mac], "virtio:d00000001v00001AF4")
    assert len(seen_by_the_kernel.nics) == 5
    carriers = {name: one.modalias for one in found.devices for name in one.carries if one.slot}
    assert set(carriers) == {"disk1", "disk2", "disk3", "disk4", "disk5"}
    assert expand.disk_bus_of(carriers["disk1"]) == "nvme" and expand.disk_bus_of(carriers["disk5"]) == "sata"


@pytest.mark.timeout(300)
def test_the_script_runs_in_busybox_under_a_real_kernel(seen_by_the_kernel):
    """P6-21, P6-25: a machine that is none of our virtual ones is described by a script for any rescue system."""
    assert seen_by_the_kernel.firmware is Firmware.BIOS and not seen_by_the_kernel.secure_boot
    assert seen_by_the_kernel.console == "ttyS0"
    assert 128 << 20 < seen_by_the_kernel.memory_bytes < 256 << 20
    (nvme,) = [one for one in seen_by_the_kernel.devices if expand.disk_bus_of(one.modalias) == "nvme"]
    assert nvme.description == "driver nvme" and nvme.slot.startswith("0000:")
    assert sum(one.modalias.startswith("cpu:") for one in seen_by_the_kernel.devices) == 1


# --- nothing of the definition is opened or run ---------------------------------------------------------------------


def test_nothing_runs_and_nothing_stays(tmp_path, monkeypatch):
    """P6-21: while QEMU is asked, its processor stands before its first instruction; afterwards it is gone, and what a
    hostile command line names was neither opened nor made."""
    states, pids = [], []
    plain = qemu._functions

    def watched(space, devices):
        states.append(space._monitor.execute("query-status"))
        pids.append(space._monitor.peer[0])
        return plain(space, devices)

    monkeypatch.setattr(qemu, "_functions", watched)
    made = tmp_path / "made"
    hostile = (
        f"-machine q35 -chardev file,id=c,path={made} -serial file:{made} -pidfile {made} -D {made} -daemonize "
        f"-drive file=/dev/sda,if=virtio -netdev tap,id=n,script=/bin/false -device virtio-net-pci,netdev=n "
        f"-device vfio-pci,host=00:1f.2 -device ivshmem-doorbell,chardev=c -accel kvm -enable-kvm -cpu host "
        f"-incoming exec:false"
    )
    found = hardware.from_qemu(hostile, target="t")
    assert [state["status"] for state in states] == ["prelaunch"]
    assert not made.exists()
    assert not Path(f"/proc/{pids[0]}").exists()
    assert any("vfio-pci" in note for note in found.notes)
    assert any("ivshmem" in note for note in found.notes)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("rtl8139,bus=nowhere", "Bus 'nowhere' not found"),
        ("rtl8139,addr=4,,romfile=/etc/shadow", "doesn't take value '4,"),
    ],
)
def test_what_qemu_refuses_is_told_in_its_own_words(device, words):
    """A value with a comma stays one value: nothing more than it reaches QEMU."""
    with pytest.raises(BadInventory, match="QEMU refuses this machine") as caught:
        hardware.from_qemu(["-nodefaults", "-device", device], target="t")
    assert caught.value.fields["target"] == "t"
    assert words in str(caught.value)


def test_a_usb_disk_without_usb_is_refused():
    with pytest.raises(BadInventory, match="usb-storage has no USB"):
        hardware.from_qemu("-nodefaults -device usb-storage,drive=x")


def test_an_unknown_version_of_a_machine_is_asked_as_the_newest_with_a_note():
    found = hardware.from_qemu("-nodefaults -machine pc-q35-rhel99.9.0 -device virtio-blk-pci,drive=a,id=vda")
    assert carrier(found, "vda").device == 0x1001
    assert any("pc-q35-rhel99.9.0" in note for note in found.notes)
    assert any(one.modalias.startswith("pci:v00008086d000029C0") for one in found.devices)


def test_a_lesser_device_that_this_qemu_lacks_is_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(command_line.known, "KNOWN", command_line.known.KNOWN | {"virtio-vga-x"})
    monkeypatch.setattr(qemu, "LESSER", qemu.LESSER | {"virtio-vga-x"})
    found = hardware.from_qemu("-nodefaults -device virtio-vga-x -device e1000e")
    assert len(found.nics) == 1 and any("virtio-vga-x" in note for note in found.notes)


def test_no_qemu_at_all_is_told():
    with pytest.raises(ToolFailed, match="no-such-qemu"):
        hardware.from_qemu("-nodefaults", emulator="/no-such-qemu")
