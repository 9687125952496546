"""The child's part of Windows: what its registry and its file system tell, and the one change that we make.

All of it is done by libguestfs in its virtual machine, which has hivex and NTFS-3G: nothing of a hive is parsed outside
it. `Hives` are the functions of a GuestFS handle that are used here. Sizes are limited, and text is cut.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from appliance.errors import GuestUnreadable

__all__ = ["DRIVERS", "Hives", "read_hives", "set_boot_start", "start_at_boot", "windows_on"]

# Services of drivers that a disk may need: those that Windows brings, then those that somebody has to add.
DRIVERS = (
    "storahci", "msahci", "stornvme", "atapi", "intelide", "pciide", "lsi_sas", "megasas",
    "viostor", "vioscsi",
)  # fmt: skip
_CONFIG = "/Windows/System32/config"
_SYSTEM, _SOFTWARE = f"{_CONFIG}/SYSTEM", f"{_CONFIG}/SOFTWARE"
_HIVE_BYTES = 512 << 20
_TEXT = 128
_DWORD = 4
# Of `ntfs-3g.probe`; its others are of no file system that could be used.
_STATES = {0: "clean", 14: "hibernated", 15: "unclean"}
# What libguestfs says of a path of which not even the folder is there; it has no errno of its own for it.
_ABSENT = ("not found", "no file or directory found with this name", os.strerror(errno.ENOENT))


class Hives(Protocol):
    """One hive is open at a time. A node or value of 0 is none."""

    def hivex_root(self) -> int: ...
    def hivex_node_get_child(self, nodeh: int, name: str) -> int: ...
    def hivex_node_get_value(self, nodeh: int, key: str) -> int: ...
    def hivex_value_type(self, valueh: int) -> int: ...
    def hivex_value_value(self, valueh: int) -> bytes: ...
    def hivex_node_delete_child(self, nodeh: int) -> None: ...
    def hivex_node_set_value(self, nodeh: int, key: str, t: int, val: bytes) -> None: ...


def windows_on(handle: Any, device: str) -> dict[str, Any] | None:
    """The fields of `Windows`, but `volume`; None where there is no Windows, or nothing that can be mounted: that was
    told when it was looked at for a Linux. Raises RuntimeError, GuestUnreadable."""
    handle.umount_all()
    state = _STATES.get(handle.ntfs_3g_probe(True, device), "damaged")
    try:
        handle.mount_ro(device, "/")
    except RuntimeError:
        return None
    system = _file(handle, _SYSTEM)
    if system is None:
        return None
    if (_magic(handle, "/hiberfil.sys") or "").lower() == "hibr":
        state = "hibernated"
    whole = _is_whole(handle, system)
    with _opened(handle, system):
        found = read_hives(handle)
    for name, service in found["services"].items():
        service["file"] = _file(handle, f"/Windows/System32/drivers/{name}.sys") is not None
    software = _file(handle, _SOFTWARE)
    if software is not None:
        with _opened(handle, software):
            found |= _product(handle)
    return {**found, "state": state, "whole": whole}


def start_at_boot(handle: Any, device: str, control_set: str, names: Sequence[str]) -> None:
    """In the hive on that device, which is written. Raises RuntimeError, GuestUnreadable; it may be half written
    then, so whoever asked throws it away."""
    handle.umount_all()
    handle.mount(device, "/")
    system = _file(handle, _SYSTEM)
    if system is None:
        raise GuestUnreadable(what="the guest's registry", reason=f"{_SYSTEM} is gone")
    with _opened(handle, system, write=True):
        set_boot_start(handle, control_set, names)
        handle.hivex_commit(None)
    handle.umount_all()
    _prove(handle, device, names)
    handle.shutdown()


def _prove(handle: Any, device: str, names: Sequence[str]) -> None:
    """As it is on the disk now: NTFS-3G mounts without a word for reading only what it does not like."""
    handle.mount_ro(device, "/")
    with _opened(handle, _file(handle, _SYSTEM) or _SYSTEM):
        services = read_hives(handle)["services"]
    if any(services.get(name, {}).get("start") != 0 for name in names):
        raise GuestUnreadable(what="the guest's registry", reason="what was written to it is not there")
    handle.umount_all()


# --- in an open hive ---


def read_hives(hives: Hives) -> dict[str, Any]:
    """What SYSTEM tells. Raises GuestUnreadable where it is no such hive."""
    current = _dword(hives, _node(hives, "Select"), "Current")
    if current is None or not 0 < current < 1000:
        raise GuestUnreadable(what="the guest's registry", reason="it does not tell its current control set")
    control_set = f"ControlSet{current:03}"
    control = (control_set, "Control")
    services = {}
    for name in DRIVERS:
        if node := _node(hives, control_set, "Services", name):
            services[name] = {"start": _dword(hives, node, "Start")}
    environment = _node(hives, *control, "Session Manager", "Environment")
    return {
        "control_set": control_set, "services": services,
        "arch": _text(hives, environment, "PROCESSOR_ARCHITECTURE"),
        "host": _text(hives, _node(hives, *control, "ComputerName", "ComputerName"), "ComputerName"),
    }  # fmt: skip


def set_boot_start(hives: Hives, control_set: str, names: Sequence[str]) -> None:
    """Each driver's Start is 0, and nothing overrides that. Raises GuestUnreadable for one that has no service."""
    for name in names:
        node = _node(hives, control_set, "Services", name)
        if not node:
            raise GuestUnreadable(what="the guest's registry", reason=f"it has no service {name!r}")
        hives.hivex_node_set_value(node, "Start", _DWORD, bytes(4))
        # Windows 8 and later: by this key setup takes a driver's start back on hardware that did without it.
        if override := hives.hivex_node_get_child(node, "StartOverride"):
            hives.hivex_node_delete_child(override)


def _product(hives: Hives) -> dict[str, str]:
    node = _node(hives, "Microsoft", "Windows NT", "CurrentVersion")
    major, minor = (_dword(hives, node, f"Current{which}VersionNumber") for which in ("Major", "Minor"))
    version = _text(hives, node, "CurrentVersion") if major is None else f"{major}.{minor or 0}"
    return {
        "product": _text(hives, node, "ProductName"), "build": _text(hives, node, "CurrentBuildNumber"),
        "version": version if re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}", version) else "",
    }  # fmt: skip


def _node(hives: Hives, *path: str) -> int:
    node = hives.hivex_root()
    for name in path:
        node = hives.hivex_node_get_child(node, name) if node else 0
    return node


def _value(hives: Hives, node: int, key: str) -> bytes | None:
    value = hives.hivex_node_get_value(node, key) if node else 0
    return hives.hivex_value_value(value) if value else None


def _dword(hives: Hives, node: int, key: str) -> int | None:
    raw = _value(hives, node, key)
    return int.from_bytes(raw, "little") if raw is not None and len(raw) == 4 else None


def _text(hives: Hives, node: int, key: str) -> str:
    raw = _value(hives, node, key) or b""
    text = raw[: 2 * _TEXT].decode("utf-16-le", errors="replace").partition("\0")[0]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# --- in the file system ---


def _file(handle: Any, path: str) -> str | None:
    """As it is written there; Windows does not tell upper from lower case."""
    try:
        found: str = handle.case_sensitive_path(path)
    except RuntimeError as error:
        if str(error).endswith(_ABSENT):
            return None
        raise
    return found if handle.is_file(found) else None


def _magic(handle: Any, path: str) -> str | None:
    found = _file(handle, path)
    return handle.pread(found, 4, 0).decode("latin-1") if found else None


def _is_whole(handle: Any, path: str) -> bool:
    """A hive's two counters differ while it is written; what is missing is in its log, which hivex does not read."""
    head = handle.pread(path, 12, 0)
    if head[:4] != b"regf" or handle.filesize(path) > _HIVE_BYTES:
        raise GuestUnreadable(what=f"file {path!r} of the guest", reason="it is no registry hive, or too large for one")
    return bool(head[4:8] == head[8:12])


@contextmanager
def _opened(handle: Any, path: str, *, write: bool = False) -> Iterator[None]:
    if handle.filesize(path) > _HIVE_BYTES:
        raise GuestUnreadable(what=f"file {path!r} of the guest", reason=f"it has more than {_HIVE_BYTES} bytes")
    handle.hivex_open(path, write=write)
    try:
        yield
    finally:
        handle.hivex_close()
