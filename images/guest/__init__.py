"""A point read safely: its files as a Tree, and the system in it as a Client.

    sources      the disks as we read them: NBD exports, image files
    confine      the cage: namespaces, limits, seccomp                      wire, reader: the talk with what is in it
    child        inside: blocks → layout, signature, lvm → ext4 + journal, fat → files
    general_child  the reader for all else (xfs, btrfs, LUKS, md, thin LVM): libguestfs, in a wider cage    appliance
    inspect      outside: bootloader (grub), kernel, fstab, network → Client

Nothing of a guest is mounted by this machine's kernel, none of its programs runs, and its bytes are parsed by a child
that reaches one socket. Two readers, one Tree: the first one knows ext2 to ext4 and FAT on partitions and linear LVM
and answers at once; where it finds no system, or meets what it does not know, libguestfs is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import GuestUnreadable
from images.guest.confine import user
from images.guest.files import Unsupported
from images.guest.inspect import client_of, find_system
from images.guest.reader import ConfinedTree
from images.guest.sources import open_disks, serve_disks
from images.guest.volumes import Volume
from images.model import Client
from images.tree import Tree

__all__ = ["Guest", "open_guest"]


@dataclass(frozen=True, slots=True)
class Guest:
    """A point that is open. `volumes` are all that lie on its disks, with their places; `mounts` maps the client's
    mount points to those that `tree` shows. `reader` is `fast` or `general`."""

    tree: Tree
    client: Client
    volumes: tuple[Volume, ...]
    mounts: Mapping[str, Volume]
    reader: str


@contextmanager
def open_guest(
    disks: Mapping[str, str], folder: Path, *, keys: Sequence[bytes] = (), appliance: Path | None = None
) -> Iterator[Guest]:
    """Open the disks of a point (target → NBD URI or image file, see `sources`), read-only.

    `folder` is for sockets; nothing of the guest is stored in it. `keys` are passphrases for LUKS. `appliance` is what
    `appliance.build_appliance` made; without it only the fast reader is there. Raises GuestUnreadable, with what and
    why; ConfigError for what is no disk; ToolFailed when a program is missing. Nothing runs after it. A Guest is for
    one thread.
    """
    with ExitStack() as opened:
        try:
            guest = _fast(disks, folder, opened)
        except Unsupported as error:
            opened.close()
            if appliance is None:
                hint = "libguestfs may read it, and there is none here: its appliance was not made"
                raise GuestUnreadable(hint=hint, **error.fields) from error
            guest = _general(disks, folder, keys, appliance, opened)
        yield guest


def _fast(disks: Mapping[str, str], folder: Path, opened: ExitStack) -> Guest:
    return _guest(opened.enter_context(ConfinedTree.fast(opened.enter_context(open_disks(disks, folder)))), "fast")


def _general(
    disks: Mapping[str, str], folder: Path, keys: Sequence[bytes], appliance: Path, opened: ExitStack
) -> Guest:
    sockets = opened.enter_context(serve_disks(disks, folder, user()))
    return _guest(opened.enter_context(ConfinedTree.general(sockets, appliance, keys)), "general")


def _guest(tree: ConfinedTree, reader: str) -> Guest:
    volumes = tree.volumes()
    system = find_system(tree, volumes)
    return Guest(tree, client_of(tree, system, volumes), volumes, system.mounts, reader)
