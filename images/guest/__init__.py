"""A point read safely: its files as a Tree, and the system in it as a Client.

    sources      the disks as we read them: NBD exports, image files
    confine      the cage: namespaces, limits, seccomp                      wire, reader: the talk with what is in it
    child        inside: blocks → layout, signature, lvm → ext4 + journal, fat → files
    general_child  the reader for all else (xfs, btrfs, LUKS, md, thin LVM): libguestfs, in a wider cage
    appliance, accelerator   what its virtual machine runs, and on what
    registry     inside: what a Windows' registry tells, of which only windows.Windows comes out
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
from images.guest.appliance import Unfit, fitting
from images.guest.confine import user
from images.guest.files import Unsupported
from images.guest.inspect import NoSystem, client_of, find_system
from images.guest.reader import ConfinedTree
from images.guest.sealed import locked
from images.guest.sources import open_disks, serve_disks
from images.guest.volumes import Volume
from images.guest.windows import IsWindows
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
    disks: Mapping[str, str],
    folder: Path,
    *,
    keys: Sequence[bytes] = (),
    appliances: Path | None = None,
    accelerator: str = "tcg",
) -> Iterator[Guest]:
    """Open the disks of a point (target → NBD URI or image file, see `sources`), read-only.

    `folder` is for sockets; nothing of the guest is stored in it. `keys` are passphrases for LUKS. `appliances` is
    where `appliance.build_appliance` has made one; without it only the fast reader is there. `accelerator` is for that
    one (`auto`, `kvm`, `tcg`). Raises GuestUnreadable, with what and why; ConfigError for what is no disk; ToolFailed
    when a program is missing. Nothing runs after it. A Guest is for one thread.
    """
    with ExitStack() as opened:
        try:
            guest = _fast(disks, folder, opened)
        except Unsupported as error:
            opened.close()
            made = _appliance(appliances, opened, error)
            guest = _general(disks, folder, keys, made, accelerator, opened)
        yield guest


def _appliance(appliances: Path | None, opened: ExitStack, error: Unsupported) -> Path:
    try:
        return opened.enter_context(fitting(appliances))
    except Unfit as unfit:
        told = {**error.fields, "reason": f"{error.fields['reason']}; {unfit}"}
        hint = "`rewind image reader build` makes the reader for xfs, btrfs, LUKS, md and the rest"
        raise GuestUnreadable(hint=hint, **told) from error


def _fast(disks: Mapping[str, str], folder: Path, opened: ExitStack) -> Guest:
    return _guest(opened.enter_context(ConfinedTree.fast(opened.enter_context(open_disks(disks, folder)))), "fast")


def _general(
    disks: Mapping[str, str], folder: Path, keys: Sequence[bytes], appliance: Path, accelerator: str, opened: ExitStack
) -> Guest:
    sockets = opened.enter_context(serve_disks(disks, folder, user()))
    tree = opened.enter_context(ConfinedTree.general(sockets, appliance, keys, accelerator=accelerator))
    try:
        return _guest(tree, "general")
    except (NoSystem, Unsupported) as error:
        _tell_windows(tree)
        raise _explained(error, tree, keys) from error
    except GuestUnreadable as error:
        raise _explained(error, tree, keys) from error


def _tell_windows(tree: ConfinedTree) -> None:
    """Raises IsWindows when there is one, GuestUnreadable when what looks like one cannot be read."""
    volumes = tree.volumes()
    for one in volumes:
        if one.fs == "ntfs" and one.mountable and (windows := tree.windows(one.name)) is not None:
            raise IsWindows.found(windows, volumes)


def _explained(error: GuestUnreadable, tree: ConfinedTree, keys: Sequence[bytes]) -> GuestUnreadable:
    """No system was found, or not all of it: it may be in a container that stayed closed."""
    try:
        closed = locked(tree.volumes())
    except GuestUnreadable:
        return error  # the reader is over
    if not closed:
        return error
    why = "none of the passphrases opens" if keys else "without its passphrase nobody opens"
    reason = f"{error.fields['reason']}; {why} {', '.join(one.name for one in closed)}"
    hint = "`rewind image plan`, `build`, `start`, `settle` and `serve` take a passphrase by `--luks-key FILE`"
    return GuestUnreadable(what=error.fields["what"], reason=reason, hint=hint)


def _guest(tree: ConfinedTree, reader: str) -> Guest:
    volumes = tree.volumes()
    system = find_system(tree, volumes)
    return Guest(tree, client_of(tree, system, volumes), volumes, system.mounts, reader)
