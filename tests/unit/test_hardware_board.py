"""What definitions of virtual machines say, before anybody is asked: QEMU command lines and libvirt's XML (P6-17)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import BadInventory
from images.hardware import command_line, libvirt_xml
from images.hardware.parts import KNOWN, PASSED, Board
from images.model import Firmware


def drivers(board: Board) -> list[str]:
    return [part.driver for part in board.parts]


def carriers(board: Board) -> dict[str, str]:
    """Disk → what it hangs on."""
    found = {disk: part.driver for part in board.parts for disk in part.carries}
    found |= {disk: one.driver for one in board.usb for disk in one.carries}
    return found | dict.fromkeys(board.built_in, "built-in")


# --- command lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("-hda a.img -hdb b.img", {"hda": "built-in", "hdb": "built-in"}),
        ("-enable-kvm a.img", {"hda": "built-in"}),
        ("-drive file=a", {"disk0": "built-in"}),
        ("-drive file=a,if=virtio,id=root -drive file=b,if=scsi", {"root": "virtio-blk-pci", "disk1": "lsi53c895a"}),
        ("-drive file=a,media=cdrom -cdrom b.iso", {}),
        ("-drive if=none,id=x,file=a -device virtio-blk,drive=x", {"x": "virtio-blk-pci"}),
        ("-device virtio-scsi,id=s -device scsi-hd,drive=x,bus=s.0,id=sda", {"sda": "virtio-scsi-pci"}),
        ("-device megasas -device scsi-hd,drive=x", {"x": "megasas"}),
        ("-device scsi-hd,drive=x -device megasas", {"x": "megasas"}),
        ("-device lsi,id=a -device pvscsi,id=b -device scsi-hd,drive=x,bus=b.0", {"x": "pvscsi"}),
        ("-device virtio-scsi -drive if=none,id=c,media=cdrom -device scsi-disk,drive=c -device scsi-cd", {}),
        ("-M q35 -device ide-hd,drive=x,bus=ide.2", {"x": "built-in"}),
        ("-M pc -device ahci,id=ahci -device ide-hd,drive=x,bus=ahci.0", {"x": "ich9-ahci"}),
        ("-device nvme,serial=1,drive=x", {"x": "nvme"}),
        ("-device nvme,serial=1,id=n -device nvme-ns,drive=x,bus=n", {"x": "nvme"}),
        ("-device qemu-xhci -device usb-storage,drive=x", {"x": "usb-storage"}),
        ("-device qemu-xhci -device usb-uas,id=u -device scsi-hd,drive=x,bus=u.0", {"x": "usb-uas"}),
        ('-device {"driver":"virtio-blk-pci","drive":"x","id":"vda","write-cache":"on"}', {"vda": "virtio-blk-pci"}),
    ],
)
def test_disks_of_a_command_line(command, expected):
    argv = command.split()
    assert carriers(command_line.board_of(argv)) == expected


@pytest.mark.parametrize(
    ("command", "nics"),
    [
        ("", [("e1000", "")]),
        ("-M q35", [("e1000e", "")]),
        ("-nodefaults", []),
        ("-nic none", []),
        ("-net none", []),
        ("-nic user", [("e1000", "")]),
        ("-nic tap,model=virtio-net-pci,mac=52:54:00:AA:00:01", [("virtio-net-pci", "52:54:00:aa:00:01")]),
        ("-net nic,model=rtl8139,macaddr=52:54:00:00:00:02 -net user", [("rtl8139", "52:54:00:00:00:02")]),
        ("-netdev tap,id=n -device vmxnet3,netdev=n,mac=52:54:00:00:00:03", [("vmxnet3", "52:54:00:00:00:03")]),
    ],
)
def test_cards_of_a_command_line(command, nics):
    board = command_line.board_of(command)
    assert [(part.driver, part.mac) for part in board.parts if part.nic] == nics


@pytest.mark.parametrize(
    ("command", "firmware", "secure"),
    [
        ("", Firmware.BIOS, False),
        ("-bios /usr/share/ovmf/OVMF.fd", Firmware.UEFI, False),
        ("-bios /usr/share/seabios/bios.bin", Firmware.BIOS, False),
        ("-drive if=pflash,file=CODE.fd -drive if=pflash,file=OVMF_VARS_4M.fd", Firmware.UEFI, False),
        ("-drive if=pflash,file=CODE.fd -drive if=pflash,file=OVMF_VARS_4M.ms.fd", Firmware.UEFI, True),
        ("-machine q35,smm=on,pflash0=a -global driver=cfi.pflash01,property=secure,value=on", Firmware.UEFI, True),
        ("-machine q35,pflash0=a -global cfi.pflash01.secure=on", Firmware.UEFI, True),
        ("-machine q35,pflash0=a", Firmware.UEFI, False),
    ],
)
def test_firmware_of_a_command_line(command, firmware, secure):
    board = command_line.board_of(command)
    assert (board.firmware, board.secure_boot) == (firmware, secure)


def test_other_facts_of_a_command_line_as_a_shell_would_have_it():
    board = command_line.board_of(
        "LC_ALL=C \\\nPATH=/bin \\\n/usr/bin/qemu-system-x86_64 \\\n-name 'guest=Web 01,debug-threads=on' \\\n"
        "-m size=2097152k -nodefaults -serial stdio -tpmdev emulator,id=t,chardev=c -device tpm-crb,tpmdev=t -usb"
    )
    assert (board.name, board.memory_bytes, board.console, board.tpm) == ("web-01", 2 << 30, "ttyS0", True)
    assert drivers(board) == ["piix3-usb-uhci"] and board.notes == ()


@pytest.mark.parametrize(
    ("command", "field", "reason"),
    [
        ("/usr/bin/qemu-system-aarch64 -M virt", "arch", "aarch64"),
        ("-M microvm", "-M", "microvm"),
        ("-machine pc,,x", "-machine", "pc,x"),
        ("-m lots", "-m", "lots"),
        ("-nic user,model=token-ring", "-nic", "token-ring"),
        ("-device scsi-hd,drive=x", "-device", "'x'"),
        ("-device lsi -device scsi-hd,drive=x,bus=other.0", "-device", "other"),
        ("-device e1000,id=../x", "-device", "../x"),
        ('-device {"driver":', "-device", "not JSON"),
        ('-name "half', "command line", "cannot be taken apart"),
        ("-x " * 3_000_000, "document", "characters"),
        ("rm -rf /tmp/nothing", "command line", "'rm', which is no QEMU"),
    ],
)
def test_a_command_line_that_is_refused(command, field, reason):
    with pytest.raises(BadInventory) as caught:
        command_line.board_of(command.split() if field == "-device" else command, target="t")
    assert caught.value.fields["field"] == field and reason in str(caught.value)


WORDS = st.sampled_from([
    "-device", "-drive", "-M", "-machine", "-m", "-nic", "-usb", "-global", "-name", "q35", "nvme", "usb-storage",
    "file=/etc/passwd,if=virtio", "virtio-blk-pci,drive=x,backend=/dev/sda",
    '{"driver": ["x"]}', '{"a": {}}', "[]", ",",
    "=", "scsi-hd,drive=x", "lsi", "e1000,romfile=/etc/shadow,bus=a", "",
])  # fmt: skip


@given(st.lists(WORDS | st.text(max_size=12), max_size=8))
def test_no_command_line_brings_more_than_known_devices_and_places(argv):
    """Whatever it says, what QEMU will be told has only drivers and properties of our tables."""
    try:
        board = command_line.board_of(argv, target="t")
    except BadInventory:
        return
    assert set(drivers(board)) <= KNOWN
    assert {name for part in board.parts for name in part.properties} <= PASSED


# --- domain XML -----------------------------------------------------------------------------------------------------


def domain(devices: str = "", *, machine: str = "pc-q35-7.2", os: str = "", more: str = "", kind: str = "kvm") -> str:
    return (
        f"<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>Mail.Server</name>"
        f"<memory unit='GiB'>2</memory><os {os.partition('|')[0]}><type arch='x86_64' machine='{machine}'>hvm</type>"
        f"{os.partition('|')[2]}</os><devices>{devices}</devices>{more}</domain>"
    )


def disk(target: str, bus: str, address: str = "", device: str = "disk") -> str:
    return f"<disk type='file' device='{device}'><target dev='{target}' bus='{bus}'/>{address}</disk>"


NVME_BY_ARGUMENTS = """<qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file=/x,if=none,id=nvm'/>
    <qemu:arg value='-device'/><qemu:arg value='nvme,drive=nvm,serial=1'/></qemu:commandline>"""


@pytest.mark.parametrize(
    ("xml", "expected"),
    [
        (domain(disk("sda", "sata")), {"sda": "built-in"}),
        (domain(disk("hda", "ide"), machine="pc"), {"hda": "built-in"}),
        (domain(disk("sda", "sata"), machine="pc"), {"sda": "ich9-ahci"}),
        (domain(disk("sda", "scsi")), {"sda": "lsi53c895a"}),
        (domain(disk("sda", "usb")), {"sda": "usb-storage"}),
        (domain(disk("vda", "virtio") + disk("vdb", "virtio")), {"vda": "virtio-blk-pci", "vdb": "virtio-blk-pci"}),
        (domain(disk("vda", "") + disk("sdb", "scsi", device="cdrom")), {"vda": "virtio-blk-pci"}),
        (
            domain("<controller type='scsi' index='0' model='vmpvscsi'/><controller type='scsi' index='1' "
                   "model='virtio-scsi'/>" + disk("sda", "scsi", "<address type='drive' controller='1'/>")
                   + disk("sdb", "scsi", "<address type='drive' controller='0'/>")),
            {"sda": "virtio-scsi-pci", "sdb": "pvscsi"},
        ),
        (
            domain("<controller type='sata' index='1'/>"
                   + disk("sdg", "sata", "<address type='drive' controller='1'/>")),
            {"sdg": "ich9-ahci"},
        ),
        (domain("<controller type='nvme' index='0'/>" + disk("nvme0", "nvme")), {"nvme0": "nvme"}),
        (domain(more=NVME_BY_ARGUMENTS), {"nvm": "nvme"}),
    ],
)  # fmt: skip
def test_disks_of_a_definition(xml, expected):
    assert carriers(libvirt_xml.board_of(xml)) == expected


@pytest.mark.parametrize(
    ("os", "firmware", "secure"),
    [
        ("", Firmware.BIOS, False),
        ("firmware='efi'", Firmware.UEFI, False),
        ("firmware='bios'", Firmware.BIOS, False),
        ("firmware='efi'|<firmware><feature enabled='yes' name='secure-boot'/></firmware>", Firmware.UEFI, True),
        ("firmware='efi'|<firmware><feature enabled='yes' name='secure-boot'/>"
         "<feature enabled='no' name='enrolled-keys'/></firmware>", Firmware.UEFI, False),
        ("firmware='efi'|<firmware><feature enabled='no' name='secure-boot'/></firmware>", Firmware.UEFI, False),
        ("|<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>", Firmware.UEFI, False),
        ("|<loader secure='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>", Firmware.UEFI, True),
        ("|<loader type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>", Firmware.UEFI, True),
        ("|<loader type='pflash'>/x</loader><nvram template='/x/OVMF_VARS_4M.ms.fd'/>", Firmware.UEFI, True),
        ("|<loader type='rom'>/usr/share/ovmf/OVMF.fd</loader>", Firmware.UEFI, False),
        ("|<loader type='rom'>/usr/share/seabios/bios.bin</loader>", Firmware.BIOS, False),
    ],
)  # fmt: skip
def test_firmware_of_a_definition(os, firmware, secure):
    """P6-17: BIOS or UEFI, and whether the firmware will refuse what is unsigned."""
    board = libvirt_xml.board_of(domain(os=os))
    assert (board.firmware, board.secure_boot) == (firmware, secure)


def test_other_facts_of_a_definition():
    board = libvirt_xml.board_of(domain(
        "<tpm model='tpm-crb'><backend type='emulator'/></tpm><console type='pty'><target type='virtio'/></console>"
        "<interface type='hostdev'/><hostdev mode='subsystem' type='pci'/><memballoon model='none'/>"
        "<interface type='bridge'><mac address='52:54:00:AA:BB:CC'/><model type='e1000'/></interface>"
    ))  # fmt: skip
    assert (board.name, board.tpm, board.console, board.memory_bytes) == ("mail-server", True, "hvc0", 2 << 30)
    (nic,) = [part for part in board.parts if part.nic]
    assert (nic.driver, nic.mac) == ("e1000", "52:54:00:aa:bb:cc")
    assert len(board.notes) == 2 and "virtio-balloon-pci" not in drivers(board)


def on_scsi(model: str, more: str = "") -> str:
    return domain(f"<controller type='scsi' index='0' model='{model}'/>{disk('sda', 'scsi', more)}")


@pytest.mark.parametrize(
    ("board", "told"),
    [
        (command_line.board_of("-device mptsas1068,id=s -device scsi-hd,drive=x,bus=s.0,id=sda"), True),
        (command_line.board_of("-device mptsas1068,id=s -device scsi-hd,drive=x,bus=s.0,id=sda,wwn=0x50"), False),
        (command_line.board_of("-device pvscsi,id=s -device scsi-hd,drive=x,bus=s.0,id=sda"), False),
        (libvirt_xml.board_of(on_scsi("lsisas1068")), True),
        (libvirt_xml.board_of(on_scsi("lsisas1068", "<wwn>5000c50015ea71ac</wwn>")), False),
        (libvirt_xml.board_of(on_scsi("vmpvscsi")), False),
    ],
)
def test_a_sas_disk_without_a_name_is_told(board, told):
    """P6-17: Linux would not see it there, with all its drivers."""
    assert any("disk 'sda' has no WWN" in note for note in board.notes) is told


def test_bridges_come_before_what_is_behind_them_and_express_devices_get_a_port():
    """As in a definition whose controllers stand in any order, and in one without addresses."""
    xml = domain("""
        <controller type='pci' index='2' model='pci-bridge'><target chassisNr='2'/>
          <address type='pci' bus='0x01' slot='0x01' function='0x0'/></controller>
        <controller type='pci' index='1' model='dmi-to-pci-bridge'>
          <address type='pci' bus='0x00' slot='0x1e' function='0x0'/></controller>
        <interface type='user'><model type='rtl8139'/>
          <address type='pci' bus='0x02' slot='0x03' function='0x0'/></interface>
        <interface type='user'><model type='virtio'/></interface>""")
    board = libvirt_xml.board_of(xml)
    where = {part.id: part for part in board.parts}
    order = [part.id for part in board.parts]
    assert order.index("pci.1") < order.index("pci.2") < order.index("net0")
    assert where["net0"].properties == {"bus": "pci.2", "addr": "3.0"}
    assert where["pci.1"].properties == {"bus": "pcie.0", "addr": "1e.0"}
    assert where[where["net1"].properties["bus"]].driver == "pcie-root-port"


CIRCLE = "".join(
    f"<controller type='pci' index='{one}' model='pci-bridge'><address type='pci' bus='{other}' slot='1'/></controller>"
    for one, other in ((1, 2), (2, 1))
)


@pytest.mark.parametrize(
    ("xml", "field", "reason"),
    [
        ("", "document", "not XML"),
        ("<domain", "document", "not XML"),
        ("<network/>", "document", "<network>"),
        ("<!DOCTYPE d [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><domain>&a;</domain>", "document", "document type"),
        (domain(kind="vmware"), "type", "vmware"),
        (domain().replace("x86_64", "aarch64"), "os/type/@arch", "aarch64"),
        (domain().replace("hvm", "linux"), "os/type", "hvm"),
        (domain(machine="pc,accel=kvm"), "os/type/@machine", "accel"),
        (domain(machine="microvm"), "os/type/@machine", "microvm"),
        (domain("<controller type='scsi' model='buslogic'/>"), "devices/controller[0]", "buslogic"),
        (domain("<controller type='scsi' index='x'/>"), "devices/controller[0]/@index", "'x'"),
        (domain(CIRCLE), "devices/controller", "circle"),
        (domain(disk("../x", "virtio")), "devices/disk[0]/target/@dev", "../x"),
        (domain(disk("sda", "xen")), "devices/disk[0]/target/@bus", "xen"),
        (domain(disk("sda", "scsi", "<address type='drive' controller='7'/>")), "devices/disk[0]/address", "scsi7"),
        (domain("<interface type='user'><model type='ne3k'/></interface>"), "devices/interface[0]/model/@type", "ne3k"),
        (
            domain("<interface type='user'><address type='pci' bus='0' slot='0x99'/></interface>"),
            "devices/interface/address", "no PCI address",
        ),
        (domain().replace("<memory unit='GiB'>2", "<memory unit='GiB'>-2"), "memory", "-2"),
        (" " * (2 << 20), "document", "characters"),
    ],
)  # fmt: skip
def test_a_definition_that_is_refused(xml, field, reason):
    with pytest.raises(BadInventory) as caught:
        libvirt_xml.board_of(xml, target="t")
    assert caught.value.fields["field"] == field and reason in str(caught.value)
    assert caught.value.fields["target"] == "t"
