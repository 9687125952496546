"""What a client has not got for the steps that are chosen, told before it is started.

All is done by its own programs, and what needs one that it lacks is left as it was: an admin who learns it from the
report has waited for a boot, and needs another one after that. Each condition here is one of a script in `steps/`,
which has the last word: it sees the disk and the hardware, this sees the files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from images.guest.layout import ESP
from images.guest.texts import listed, text
from images.guest.volumes import Volume
from images.model import Firmware, Generator, Plan
from images.tree import Tree, exists

__all__ = ["lacking"]

# `run.sh` looks for programs there.
_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
_INITRAMFS = {
    Generator.INITRAMFS_TOOLS: ("update-initramfs", "lsinitramfs"), Generator.DRACUT: ("dracut", "lsinitrd"),
}  # fmt: skip
_DHCP = ("dhclient", "dhcpcd", "dhcpcd5", "udhcpc", "pump")
_STAYS = "the boot medium has to stay"
# Of a program, which a package brings: all else stays as it is.
_LACKS = "the guest has no"


def lacking(plan: Plan, tree: Tree, volumes: Sequence[Volume], chosen: Collection[str]) -> tuple[str, ...]:
    """Sentences, none if nothing is known to be lacking. `chosen` are names of steps; `volumes` those of the client."""
    found = []
    if "loader" in chosen:
        found += [f"it will not start by itself: {one}; {_STAYS}" for one in _settling(plan, tree, volumes)]
    if "grow" in chosen and not _has(tree, "sfdisk"):
        found.append(f"its root will not grow: {_LACKS} sfdisk (fdisk)")
    if "ssh-keys" in chosen and not _has(tree, "ssh-keygen") and _host_keys(tree):
        found.append(f"it will keep its SSH host keys: {_LACKS} ssh-keygen (openssh-client)")
    if any(_LACKS in one for one in found):
        found.append("a package can be installed once the guest runs: each start from the boot medium tries again")
    if "addresses" in chosen and not any(_has(tree, one) for one in _DHCP):
        found += [f"fixed addresses in {one} will stay: the guest has no program that asks by DHCP (isc-dhcp-client), "
                  "which has to be in the point" for one in _fixed(tree)]  # fmt: skip
    return tuple(found)


def _settling(plan: Plan, tree: Tree, volumes: Sequence[Volume]) -> Iterator[str]:
    client, firmware = plan.client, plan.inventory.firmware
    if not client.initrd:
        yield "its boot loader uses no initramfs"
    elif client.generator not in _INITRAMFS:
        yield f"the tool that made {client.initrd} is not known"
    else:
        yield from (f"{_LACKS} {one}" for one in _INITRAMFS[client.generator] if not _has(tree, one))
    if client.firmware is not firmware:
        kinds = {one.kind for one in volumes if one.kind}
        yield from _uefi(plan, tree, kinds) if firmware is Firmware.UEFI else _bios(tree, kinds)


def _uefi(plan: Plan, tree: Tree, kinds: Collection[str]) -> Iterator[str]:
    """`kinds` of the partitions that there are."""
    there = ESP in kinds or "0xef" in kinds
    unless = ", unless its EFI system partition has a loader" if there else ""
    if plan.inventory.secure_boot:
        yield f"no loader of its disk is signed for Secure Boot, and the guest cannot sign one{unless}"
        return
    if not _has_grub(tree, "x86_64-efi"):
        yield f"{_LACKS} GRUB for UEFI (grub-efi-amd64-bin){unless}"
    for program, package in () if there else (("mkfs.vfat", "dosfstools"), ("sfdisk", "fdisk")):
        if not _has(tree, program):
            yield f"{_LACKS} {program} ({package}) to make an EFI system partition with"


def _bios(tree: Tree, kinds: Collection[str]) -> Iterator[str]:
    if exists(tree, "/boot/grub/i386-pc"):
        return  # GRUB was put in front of this disk before, and may be there still
    if not _has_grub(tree, "i386-pc"):
        yield f"{_LACKS} GRUB for a BIOS (grub-pc-bin)"
    gpt = any(not one.startswith("0x") for one in kinds)
    if gpt and _BIOS_BOOT not in kinds and not _has(tree, "sfdisk"):
        yield f"{_LACKS} sfdisk (fdisk) to make a BIOS boot partition with"


def _has_grub(tree: Tree, platform: str) -> bool:
    return _has(tree, "grub-install") and exists(tree, f"/usr/lib/grub/{platform}")


def _has(tree: Tree, program: str) -> bool:
    return any(exists(tree, f"{folder}/{program}") for folder in _PATH)


def _fixed(tree: Tree) -> Iterator[str]:
    """Files of ifupdown, which asks by a program of its own, with fixed addresses."""
    for path in ("/etc/network/interfaces", *listed(tree, "/etc/network/interfaces.d", "")):
        if re.search(r"^[ \t]*iface .*[ \t]static", text(tree, path), re.M):
            yield path


def _host_keys(tree: Tree) -> bool:
    return any(path.startswith("/etc/ssh/ssh_host_") for path in listed(tree, "/etc/ssh", "_key"))
