"""A disk sda that the steps of `images.settle` find in their root: a file with a real partition table.

    machine(root)     sda behind an AHCI controller, and an initramfs that has no driver for it
    disk(root)        the file behind it, GRUB for a BIOS beside it           uefi(root)   started by UEFI, sda1 an ESP
    table(root, ...)  another table; what the kernel and lsblk would say of it follows the file, as `partx` is run

The programs that would need a kernel that sees the disk are small ones of bash: `Root.cut` can end in them, too.
"""

from __future__ import annotations

import subprocess

from tests.support.settling import INITRD, Root

__all__ = ["BIOS_BOOT", "ESP", "HEAD", "disk", "ends", "entries", "machine", "table", "uefi"]

ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
HEAD = bytes(range(256)) * 2

_LSBLK = r"""rows() {
    sfdisk -d /dev/sda 2>/dev/null | sed -n 's|^\(/dev/[a-z0-9]*\) : .*type= *\([^,]*\).*|\1 \2|p' |
        while read -r name kind; do [ ! -e "$name" ] || echo "$name $kind"; done
}
case "$*" in
    *-nrso*NAME,TYPE*) echo sda1 part; echo sda disk ;;
    *-nrso*TYPE*) echo part; echo disk ;;
    *NAME,PARTTYPE*) rows | sed 's| ef$| 0xef|' ;;
    *PARTTYPE*) rows | cut -d' ' -f2 ;;
    *NAME,TYPE*) echo /dev/sda disk; rows | sed 's| .*| part|' ;;
    *PTTYPE*) sfdisk -d /dev/sda 2>/dev/null | sed -n 's/^label: //p' ;;
    *PARTUUID*)
        sfdisk -d /dev/sda | sed -n "s|^${!#} : .*uuid= *\([^,]*\).*|\1|p" | tr A-F a-f
        one=${!#}
        sfdisk -d /dev/sda | sed -n "s|^label-id: 0x\(.*\)|\1-0${one#/dev/sda}|p"
        ;;
esac"""
_PARTX = r"""sfdisk -d /dev/sda 2>/dev/null |
    sed -n 's|^/dev/\([a-z0-9]*\) : start= *\([0-9]*\), size= *\([0-9]*\).*|\1 \2 \3|p' |
    while read -r name start size; do
        mkdir -p /sys/class/block/sda/$name
        [ -e /dev/$name ] || mknod /dev/$name b 7 200
        echo $start >/sys/class/block/sda/$name/start
        echo $size >/sys/class/block/sda/$name/size
        echo ${name#sda} >/sys/class/block/sda/$name/partition
        ln -sfn sda/$name /sys/class/block/$name
    done"""
# Keeps its list in a file.
_EFIBOOTMGR = r"""list=/sys/firmware/efi/list
case "$*" in
    -v) cat $list ;;
    *--create-only*)
        while [ $# -gt 0 ]; do
            case $1 in --part) part=$2 ;; --label) label=$2 ;; --loader) loader=$2 ;; esac
            shift
        done
        of=GPT,$(lsblk -ndo PARTUUID /dev/sda$part)
        [ "$(lsblk -ndo PTTYPE /dev/sda)" != dos ] || of=MBR,0x$(sfdisk -d /dev/sda | sed -n 's/^label-id: 0x0*//p')
        printf 'Boot0007* %s\tHD(%s,%s,0x800,0x20000)/File(%s)\n' "$label" "$part" "$of" "$loader" >>$list
        ;;
    *--bootorder*) sed -i "s/^BootOrder:.*/BootOrder: ${!#}/" $list ;;
esac"""


def machine(root: Root) -> Root:
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


def disk(root: Root) -> Root:
    """4 MiB, the first partition at sector 2048, GRUB's menu is there."""
    machine(root)
    root.write("/dev/sda", HEAD + bytes((4 << 20) - len(HEAD)))
    root.write("/sys/class/block/sda/sda1/start", "2048\n")
    root.write("/boot/grub/grub.cfg", "menu")
    root.write("/usr/lib/grub/i386-pc/modinfo.sh", "")
    return root


def uefi(root: Root) -> Root:
    """Started by UEFI; sda1 is an ESP that is mounted at /boot/efi."""
    disk(root)
    root.write("/sys/firmware/efi/fw_platform_size", "64")
    root.write("/etc/os-release", "ID=debian\n")
    root.write("/boot/efi/EFI/debian/grubx64.efi", "grub")
    root.program("findmnt", 'case "$*" in *TARGET*) echo /boot/efi ;; *) echo /dev/sda1 ;; esac')
    root.program("lsblk", (
        'case "$*" in *NAME,PARTTYPE*) echo /dev/sda1 c12a7328-f81f-11d2-ba4b-00a0c93ec93b ;; '
        "*NAME,TYPE*) echo sda1 part; echo sda disk ;; *PTTYPE*) echo gpt ;; esac"
    ))  # fmt: skip
    return root


def table(root: Root, text: str, mib: int = 96, made_with: int = 0) -> None:
    """A disk of so many MiB with this table (of sfdisk), made when it had `made_with`; the kernel knows it."""
    device = root.path("/dev/sda")
    with device.open("r+b") as file:
        file.truncate((made_with or mib) << 20)
    subprocess.run(["sfdisk", "-q", device], input=text, text=True, check=True)
    with device.open("r+b") as file:
        file.truncate(mib << 20)
    root.write("/sys/class/block/sda/size", f"{mib << 11}\n")
    root.program("lsblk", _LSBLK, "bash")
    root.program("partx", _PARTX, "bash")
    root.program("udevadm", "")
    root.inside("partx", "-a", "/dev/sda")


def ends(root: Root) -> bytes:
    """The first and the last MiB of the disk, where its tables are."""
    with root.path("/dev/sda").open("rb") as file:
        first = file.read(1 << 20)
        file.seek(-(1 << 20), 2)
        return first + file.read()


def entries(root: Root, text: str = "BootCurrent: 0001\nBootOrder: 0001,0000\n") -> None:
    """Firmware that keeps a list, and a guest that has efibootmgr."""
    root.write("/sys/firmware/efi/list", text)
    root.program("efibootmgr", _EFIBOOTMGR, "bash")
