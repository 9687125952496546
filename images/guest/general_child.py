"""The confined child that reads what `child` does not know, by libguestfs: xfs, btrfs, LUKS, md, every kind of LVM.

Started as `python -m images.guest.general_child ORDER KEYS DESCRIPTOR`: an `Order` as JSON, and the descriptor of a
pipe with the keys. libguestfs starts a small virtual machine of its own in the cage, whose kernel mounts the file
systems; the disks are NBD sockets that cannot be written. It is emulated unless the order has KVM: libguestfs looks for
/dev/kvm whatever it is told, and there is none in the cage then. Answers are those of `child.Reader`, so the parent
cannot tell the two apart.

A key that was given and the master key that it opens are in the memory of this process and of the virtual machine. On
a host with swap both are locked (`appliance.secrecy`), or nothing is opened; the keys come only when that is done.

libguestfs' binding is Debian's python3-guestfs, imported here alone.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import guestfs
from pydantic import BaseModel, ConfigDict

from appliance import secrecy
from appliance.errors import GuestUnreadable, RewindError
from images.guest.blocks import Called
from images.guest.child import answer_all
from images.guest.confine import Cage, Limits, Seccomp, enter
from images.guest.files import check_readable
from images.guest.lvm import logical_volumes
from images.guest.registry import start_at_boot, windows_on
from images.guest.volumes import Volume, opened_name, partition_name
from images.model import Layer
from images.tree import Kind

__all__ = ["GuestfsReader", "Order", "cage", "main"]

_MISSING = tuple(map(os.strerror, (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)))
_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.FOLDER, stat.S_IFLNK: Kind.LINK}
_NO_FILES = ("", "unknown", "swap", "crypto_LUKS", "LVM2_member", "linux_raid_member")
_SCRATCH = "/tmp/answer"
# LUKS2 asks for up to 1 GiB to make a key of a passphrase.
_MEMORY = 1280


class Order(BaseModel):
    """`sockets`: disk to the socket of its server. `kvm`: the group that may open /dev/kvm, None: it is not shown.
    `secret`: the memory of all that is inside has to be locked. `writable`: the disks are written; never a point's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sockets: dict[str, str]
    appliance: str
    kvm: int | None = None
    secret: bool = False
    writable: bool = False


@dataclass(frozen=True, slots=True)
class _Device:
    """One of the virtual machine's block devices. `disks` and `layers` as in Volume."""

    name: str
    disks: tuple[str, ...]
    layers: tuple[Layer, ...] = ()
    offset: int = 0
    length: int = 0
    number: int = 0


class GuestfsReader:
    def __init__(self, disks: Sequence[str], handle: Any, keys: Sequence[bytes] = ()) -> None:
        """`disks` are the names of the handle's drives, in its order; it is launched."""
        self._g, self._disks, self._keys = handle, disks, keys
        self._mountable: dict[str, str] = {}

    def volumes(self) -> list[dict[str, Any]]:
        devices = self._devices()
        files = self._call(self._g.list_filesystems)
        found = [volume for name in devices for volume in self._told(name, devices[name], files)]
        return [volume.model_dump(mode="json") for volume in found]

    def mount(self, volume: str, where: str) -> None:
        if volume not in self._mountable:
            raise GuestUnreadable(what=f"volume {volume!r}", reason="there is no such volume")
        if where == "/":
            self._call(self._g.umount_all)
        try:
            self._call(self._g.mount_ro, self._mountable[volume], where)
        except FileNotFoundError:
            raise GuestUnreadable(what=f"volume {volume!r}", reason=f"{where} is not there to mount it") from None

    def read(self, path: str, limit: int) -> bytes:
        status = self._call(self._g.statns, path)
        check_readable(path, _KINDS.get(stat.S_IFMT(status["st_mode"]), Kind.OTHER), status["st_size"], limit)
        self._call(self._g.download, path, _SCRATCH)
        with open(_SCRATCH, "rb") as file:
            return file.read(limit)

    def list(self, path: str) -> tuple[str, ...]:
        # Names that are not UTF-8 cannot pass the binding: they come in a file.
        self._call(self._g.ls0, path, _SCRATCH)
        with open(_SCRATCH, "rb") as file:
            names = file.read().split(b"\0")
        return tuple(sorted(text for name in names if (text := name.decode(errors="ignore")).encode() == name and name))

    def kind(self, path: str) -> str:
        return _KINDS.get(stat.S_IFMT(self._call(self._g.lstatns, path)["st_mode"]), Kind.OTHER).value

    def resolve(self, path: str) -> str:
        found: str = self._call(self._g.realpath, path)
        return found

    def windows(self, volume: str) -> dict[str, Any] | None:
        """What Windows is on it, None where there is none."""
        found = self._call(windows_on, self._g, self._mountable[volume])
        return None if found is None else {"volume": volume, **found}

    def start_at_boot(self, volume: str, control_set: str, names: Sequence[str]) -> None:
        """Nothing can be asked after it."""
        self._call(start_at_boot, self._g, self._mountable[volume], control_set, names)

    # --- what lies on what ---

    def _devices(self) -> dict[str, _Device]:
        """By libguestfs' name of the device. LUKS is opened where a key fits."""
        found = {device: _Device(name, (name,)) for device, name in zip(self._call(self._g.list_devices), self._disks,
                                                                          strict=True)}  # fmt: skip
        found |= {device: self._partition(device, found) for device in self._call(self._g.list_partitions)}
        found |= dict(self._arrays(found))
        for _ in range(3):  # LUKS on LVM on LUKS is the deepest that anybody has
            opened = dict(self._opened(found))
            found |= opened
            self._call(self._g.lvm_scan, True)
            volumes = dict(self._logical(found))
            if not opened and volumes.keys() <= found.keys():
                break
            found |= {device: volume for device, volume in volumes.items() if device not in found}
        return found

    def _partition(self, device: str, disks: Mapping[str, _Device]) -> _Device:
        parent = self._call(self._g.part_to_dev, device)
        number = self._call(self._g.part_to_partnum, device)
        part = next(one for one in self._call(self._g.part_list, parent) if one["part_num"] == number)
        disk = disks[parent].name
        return _Device(partition_name(disk, number), (disk,), (Layer.PARTITION,), part["part_start"], part["part_size"],
                       number)  # fmt: skip

    def _arrays(self, found: Mapping[str, _Device]) -> Iterator[tuple[str, _Device]]:
        for device in self._call(self._g.list_md_devices):
            # With or without the folder, by its version.
            members = [one["mdstat_device"].removeprefix("/dev/") for one in self._call(self._g.md_stat, device)]
            below = [found[f"/dev/{name}"] for name in sorted(members) if f"/dev/{name}" in found]
            yield device, _above(device.removeprefix("/dev/"), below, Layer.MD)

    def _opened(self, found: Mapping[str, _Device]) -> Iterator[tuple[str, _Device]]:
        there = {device.name for device in found.values()}
        for device, below in list(found.items()):
            name = opened_name(below.name)
            locked = name not in there and self._call(self._g.vfs_type, device) == "crypto_LUKS"
            if locked and self._unlock(device, name):
                yield f"/dev/mapper/{name}", _above(name, [below], Layer.LUKS)

    def _unlock(self, device: str, name: str) -> bool:
        for key in self._keys:
            try:
                self._g.cryptsetup_open(device, key.decode(errors="surrogateescape"), name, readonly=True)
                return True
            except RuntimeError:
                continue  # not this key
        return False

    def _logical(self, found: Mapping[str, _Device]) -> Iterator[tuple[str, _Device]]:
        physical = {one["pv_uuid"]: one["pv_name"] for one in self._call(self._g.pvs_full)}
        own = self._own_places([name for name in physical.values() if name in found])
        for device in self._call(self._g.lvs):
            _, _, group, volume = device.split("/", 3)
            uuids = self._call(self._g.vgpvuuids, group)
            names = own.get(f"{group}/{volume}", tuple(physical.get(one.replace("-", ""), "") for one in uuids))
            below = [found[name] for name in names if name in found]
            yield device, _above(f"{group}/{volume}", below, Layer.LVM)

    def _own_places(self, physical: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What each volume lies on, not all of its group. Nothing where LVM's text is not as we know it."""
        with suppress(GuestUnreadable):
            volumes = logical_volumes([self._blocks(name) for name in physical])
            return {f"{one.group}/{one.name}": tuple(physical[position] for position in one.on) for one in volumes}
        return {}

    def _blocks(self, device: str) -> Called:
        size = self._call(self._g.blockdev_getsize64, device)
        return Called(device, size, lambda at, length: self._call(self._g.pread_device, device, length, at))

    def _told(self, device: str, one: _Device, files: Mapping[str, str]) -> Iterator[Volume]:
        known = self._call(self._g.blkid, device) if device not in self._partitioned() else {}
        volume = Volume(
            name=one.name, fs=known.get("TYPE", ""), uuid=known.get("UUID", ""), label=known.get("LABEL", ""),
            disks=one.disks, layers=one.layers, offset=one.offset, length=one.length, number=one.number,
            kind=known.get("PART_ENTRY_TYPE", ""), partuuid=known.get("PART_ENTRY_UUID", ""),
            partlabel=known.get("PART_ENTRY_NAME", ""),
            mountable=device in files and files[device] not in _NO_FILES,
        )  # fmt: skip
        if device not in self._partitioned():
            self._mountable[one.name] = device
            yield volume
        for name in files:
            prefix = f"btrfsvol:{device}/"
            if name.startswith(prefix):
                below = name.removeprefix(prefix)
                self._mountable[f"{one.name}:{below}"] = name
                yield volume.model_copy(update={"name": f"{one.name}:{below}", "flags": f"subvol={below}"})

    def _partitioned(self) -> set[str]:
        return {self._call(self._g.part_to_dev, device) for device in self._call(self._g.list_partitions)}

    def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except UnicodeDecodeError as error:
            raise GuestUnreadable(what="the point", reason="a name in it is not UTF-8") from error
        except RuntimeError as error:
            if str(error).endswith(_MISSING):  # the binding of libguestfs 1.48 does not tell errno
                raise FileNotFoundError from error
            raise GuestUnreadable(what="the point", reason=str(error)) from error


def _above(name: str, below: list[_Device], layer: Layer) -> _Device:
    disks = tuple(dict.fromkeys(disk for one in below for disk in one.disks))
    layers = tuple(dict.fromkeys(found for one in below for found in one.layers))
    return _Device(name, disks, (*layers, layer))


def cage(order: Order) -> Cage:
    """Programs and libraries of this machine, the appliance, four devices that hold nothing, the disks' sockets; and
    KVM where it was asked for."""
    shown = ("null", "zero", "random", "urandom", *(["kvm"] if order.kvm is not None else []))
    devices = {f"/dev/{name}": f"/dev/{name}" for name in shown}
    return Cage(
        limits=Limits(memory=0, seconds=3600, files=1024, file_bytes=2 << 30, processes=True),
        seccomp=Seccomp.PROGRAMS,
        see={"/usr": "/usr", "/etc/ld.so.cache": "/etc/ld.so.cache", "/etc/passwd": "/etc/passwd",
             "/appliance": order.appliance, **devices,
             **{f"/disks/{name}": path for name, path in order.sockets.items()}},
        links={"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64",
               "/var/tmp": "/tmp"},  # QEMU's own choice for what it forgets again
        scratch=1 << 30,
        group=order.kvm,
        secret=order.secret,
    )  # fmt: skip


def main() -> None:
    order, keys, descriptor = Order.model_validate_json(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    parent = socket.socket(fileno=descriptor)
    enter(parent, cage(order))
    os.environ.update(HOME="/tmp", TMPDIR="/tmp", XDG_RUNTIME_DIR="/tmp", LIBGUESTFS_PATH="/appliance",
                      LIBGUESTFS_BACKEND="direct", LIBGUESTFS_CACHEDIR="/tmp", LIBGUESTFS_TMPDIR="/tmp")  # fmt: skip
    if order.kvm is None:
        os.environ["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    answer_all(parent, _Launched(order, keys))


def _handle(order: Order) -> Any:
    """Not launched."""
    handle = guestfs.GuestFS(python_return_dict=True)
    handle.set_memsize(_MEMORY)
    # A program that takes core dumps by a pipe gets them whatever the limit of the cage is.
    handle.config("-machine", "dump-guest-core=off")
    if order.secret:
        handle.config("-overcommit", "mem-lock=on")
    for name in order.sockets:
        server = [f"unix:/disks/{name}"]
        handle.add_drive_opts("", readonly=not order.writable, format="raw", protocol="nbd", server=server)
    return handle


class _Launched:
    """Launches for the first question, so that a failure is an answer. The keys are read from the pipe by then."""

    def __init__(self, order: Order, keys: int) -> None:
        self._order, self._pipe = order, keys
        self._reader: GuestfsReader | None = None

    def __getattr__(self, question: str) -> Any:
        if self._reader is None:
            keys = self._keys()
            handle = _handle(self._order)
            try:
                handle.launch()
            except RuntimeError as error:
                raise GuestUnreadable(what="the point", reason=f"libguestfs does not start: {error}") from error
            self._reader = GuestfsReader(tuple(self._order.sockets), handle, keys)
        return getattr(self._reader, question)

    def _keys(self) -> list[bytes]:
        if self._order.secret:
            try:
                secrecy.guard()
            except RewindError as error:
                raise GuestUnreadable(what="the point", reason=error.message) from error
        with os.fdopen(self._pipe, "rb") as pipe:
            return [bytes.fromhex(line) for line in pipe.read().decode().split()]


if __name__ == "__main__":
    main()
