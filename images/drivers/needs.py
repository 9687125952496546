"""What the root file system and the way to it need beside the devices' drivers.

    needs_of    a client on a way to boot → Needs: names of which one must be there, or may
    mode_of     whether our own init knows this root, or the client's initrd has to find it

A name is what `modprobe` takes: a module or an alias (`fs-ext4`, `crypto-aes`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from images.model import Client, Layer, Role
from images.words import words_of

__all__ = ["Need", "keys_in_initrd", "mode_of", "needs_of", "sealed_keys"]


@dataclass(frozen=True, slots=True)
class Need:
    """The first of `names` that the kernel has is taken. Without any it is MISSING if `required`, else nothing."""

    names: tuple[str, ...]
    role: Role
    reason: str
    required: bool = True


_FS_NAMES = {"ext2": ("fs-ext2", "ext2", "ext4"), "ext3": ("fs-ext3", "ext3", "ext4"), "msdos": ("fs-vfat", "vfat")}
_FAT = frozenset({"vfat", "msdos"})
# Which of them an array, a volume or a header wants is written on the disk: those that the kernel has are taken along.
# The kernel asks for many of them by request_module alone (`md-level-1` of a dm-raid too, a cache's policy): no other
# module depends on them, and our init has no modprobe that it could ask.
_MD_LEVELS = ("raid1", "raid10", "raid456", "raid0", "linear")
_LVM_KINDS = (
    "raid1", "raid10", "raid456", "raid0", "dm_raid", "dm_mirror", "dm_snapshot", "dm_thin_pool", "dm_cache",
    "dm_cache_smq", "dm_writecache", "dm_integrity",
)  # fmt: skip
_CIPHERS = (
    "crypto-aes", "crypto-xts", "crypto-cbc", "crypto-essiv", "crypto-sha256", "crypto-sha512", "algif_skcipher",
)  # fmt: skip
_KEYBOARD = ("i8042", "atkbd", "usbhid", "hid_generic")
# Words of crypttab for keys that our init does not fetch.
_SEALED = ("tpm2-device=", "fido2-device=", "pkcs11-uri=", "keyscript=", "clevis", "tang", "_netdev")
# Words of a command line for roots that our init does not know.
_FOREIGN_ROOT = re.compile(
    r"(?:^|\s)(?:root=(?:/dev/nfs|nfs\d?:|nbd:|iscsi:|live:|zfs[:=]|ZFS=|/dev/mapper/mpath|/dev/zvol)|nfsroot=|netroot="
    r"|iscsi_|rd\.iscsi|rd\.multipath|boot=zfs|boot=live|boot=nfs|overlayroot=|rd\.neednet=1)"
)
_FOREIGN_FS = frozenset({"zfs", "nfs", "nfs4", "bcachefs", "overlay", "ceph", "glusterfs", "9p", "virtiofs"})


def needs_of(client: Client, *, stream: bool = False, extra: tuple[str, ...] = ()) -> tuple[Need, ...]:
    """In the order in which they are inserted: ways to a volume first, the file system last."""
    return tuple(_needs(client, stream, extra))


def _needs(client: Client, stream: bool, extra: tuple[str, ...]) -> Iterator[Need]:
    if stream:
        yield Need(("nbd",), Role.DISK, "the root comes over the network")
        yield Need(("dm_mod",), Role.DISK, "joins the source and the local disk")
        yield Need(("dm_clone", "dm_mirror"), Role.DISK, "fills the local disk while the system runs")
    for name in extra:
        yield Need((name,), Role.OTHER, "asked for by name")
    for layer in client.root.layers:
        yield from _of_layer(layer)
    yield from _of_file_system(client.root.fs, "the root file system")
    for mount in client.fstab:
        # The system's own programs are there: it is mounted before the hand-over.
        if mount.where == "/usr":
            yield from _of_file_system(mount.fs, "/usr, which the system starts from")


def _of_layer(layer: Layer) -> Iterator[Need]:
    if layer is Layer.MD:
        yield Need(("md_mod",), Role.ROOT, "the root is on an md array")
        for name in _MD_LEVELS:
            yield Need((name,), Role.ROOT, "a level that the md array may have", required=False)
    elif layer is Layer.LVM:
        yield Need(("dm_mod",), Role.ROOT, "the root is on an LVM volume")
        for name in _LVM_KINDS:
            yield Need((name,), Role.ROOT, "a kind that the LVM volume may be", required=False)
    elif layer is Layer.LUKS:
        yield Need(("dm_crypt",), Role.ROOT, "the root is encrypted (LUKS)")
        for name in _CIPHERS:
            yield Need((name,), Role.ROOT, "a cipher that LUKS may use", required=False)
        for name in _KEYBOARD:
            yield Need((name,), Role.CONSOLE, "to type the passphrase", required=False)


def _of_file_system(fs: str, reason: str) -> Iterator[Need]:
    yield Need(_FS_NAMES.get(fs, (f"fs-{fs}", fs)), Role.ROOT, f"{reason} is {fs}")
    if fs in _FAT:
        for name in ("nls_cp437", "nls_iso8859_1", "nls_ascii", "nls_utf8"):
            yield Need((name,), Role.ROOT, "letters in names of a FAT file system", required=False)


def mode_of(client: Client) -> tuple[Literal["template", "append"], str]:
    """The plan's mode and why it is `append`; the reason is empty for `template`."""
    root = client.root
    sealed = sealed_keys(client)
    if Layer.LUKS in root.layers and sealed:
        return "append", f"the key of the encrypted root comes by {sealed[0]}, which the guest's own initrd knows"
    if Layer.LUKS in root.layers and not root.containers:
        return "append", (
            "no line of crypttab names the encrypted container below the root, which the guest's own initrd opens"
        )
    above = [layer.value for layer in client.usr_layers if layer not in (Layer.PARTITION, *root.layers)]
    if above:
        return "append", f"/usr is on {' and '.join(above)} and the root is not, which the guest's own initrd knows"
    if root.fs in _FOREIGN_FS:
        return "append", f"the root is {root.fs}, which the guest's own initrd knows"
    found = _FOREIGN_ROOT.search(f"root={root.spec} {client.command_line}")
    if found:
        return "append", f"the command line has {found[0].strip()!r}, which the guest's own initrd knows"
    if root.fs == "btrfs" and len(root.disks) > 1:
        return "append", "the root is one btrfs on several disks, which the guest's own initrd finds"
    return "template", ""


def keys_in_initrd(client: Client) -> tuple[str, ...]:
    """Files with keys of the encrypted root that the client's own initrd may hold, as crypttab and the command line
    name them. A key that is a person's, a device's or a TPM's is not there."""
    if Layer.LUKS not in client.root.layers:
        return ()
    words = (line.split() for line in client.crypttab)
    named = [one[2] for one in words if len(one) > 2]
    named += [word.partition("=")[2].split(":")[0] for word in words_of(client.command_line)
              if word.startswith(("rd.luks.key=", "luks.key=", "cryptkey="))]  # fmt: skip
    named = [one.rpartition("=")[2] for one in named]  # UUID=/path
    return tuple(dict.fromkeys(one for one in named if one.startswith("/") and not one.startswith("/dev/")))


def sealed_keys(client: Client) -> tuple[str, ...]:
    """Words of crypttab that say that a key comes from elsewhere than a person or a file, each once."""
    found = (word for line in client.crypttab for word in _SEALED if word in line)
    return tuple(dict.fromkeys(word.rstrip("=") for word in found))
