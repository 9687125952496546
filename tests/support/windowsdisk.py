"""A disk that looks like a Windows to whoever reads it, made of nothing that Windows brings: hives by hivex, NTFS by
mkntfs. It does not boot."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hivex

from tests.support.guestdisk import partitioned

__all__ = ["Open", "empty_hive", "ntfs", "opened", "software", "system", "windows"]

MiB = 1 << 20
_SZ, _DWORD = 1, 4


class Open:
    """A hive by python3-hivex as libguestfs names its functions."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self._hive = hivex.Hivex(str(path), write=write)

    def hivex_root(self) -> int:
        return self._hive.root()

    def hivex_node_get_child(self, nodeh: int, name: str) -> int:
        return self._hive.node_get_child(nodeh, name) or 0

    def hivex_node_get_value(self, nodeh: int, key: str) -> int:
        try:
            return self._hive.node_get_value(nodeh, key) or 0
        except RuntimeError:
            return 0

    def hivex_value_type(self, valueh: int) -> int:
        return self._hive.value_type(valueh)[0]

    def hivex_value_value(self, valueh: int) -> bytes:
        return self._hive.value_value(valueh)[1]

    def hivex_node_add_child(self, nodeh: int, name: str) -> int:
        return self._hive.node_add_child(nodeh, name)

    def hivex_node_delete_child(self, nodeh: int) -> None:
        self._hive.node_delete_child(nodeh)

    def hivex_node_set_value(self, nodeh: int, key: str, t: int, val: bytes) -> None:
        self._hive.node_set_value(nodeh, {"key": key, "t": t, "value": val})

    def commit(self) -> None:
        self._hive.commit(None)


def empty_hive(path: Path) -> Path:
    """The base block and one bin with the root key, as "Windows registry file format specification" (msuhanov) has
    them."""
    none, at, descriptor = 0xFFFFFFFF, 0x20 + 88, bytes(20)
    root = struct.pack(
        "<i2sHQ15IHH", -88, b"nk", 0x2C, 0, 0, 0, 0, 0, none, none, 0, none, at, none, 0, 0, 0, 0, 0, 4, 0
    ) + b"root"  # fmt: skip
    security = struct.pack("<i2sH4I", -48, b"sk", 0, at, at, 1, len(descriptor)) + descriptor
    used = root.ljust(88, b"\0") + security.ljust(48, b"\0")
    left = 4096 - 32 - len(used)
    bins = struct.pack("<4sIIIIQI", b"hbin", 0, 4096, 0, 0, 0, 0) + used + struct.pack("<i", left).ljust(left, b"\0")
    head = struct.pack("<4sIIQIIIIIII", b"regf", 1, 1, 0, 1, 3, 0, 1, 32, 4096, 1).ljust(508, b"\0")
    checksum = 0
    for (word,) in struct.iter_unpack("<I", head):
        checksum ^= word
    path.write_bytes((head + struct.pack("<I", checksum)).ljust(4096, b"\0") + bins)
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`put(key, name, value)` in a hive: a key by its path, text or a number."""
    hive = Open(path, write=True)

    def put(key: str, name: str = "", value: str | int = "") -> None:
        node = hive.hivex_root()
        for part in key.split("\\"):
            node = hive.hivex_node_get_child(node, part) or hive.hivex_node_add_child(node, part)
        if isinstance(value, int):
            hive.hivex_node_set_value(node, name, _DWORD, struct.pack("<I", value))
        elif name:
            hive.hivex_node_set_value(node, name, _SZ, f"{value}\0".encode("utf-16-le"))

    yield put
    hive.commit()


def system(path: Path, services: Mapping[str, int]) -> Path:
    """SYSTEM with these services and their Start; each has a StartOverride. The current control set is the second."""
    with opened(empty_hive(path)) as put:
        put("Select", "Current", 2)
        put(r"ControlSet001\Services\storahci", "Start", 3)
        put(r"ControlSet002\Control\Session Manager\Environment", "PROCESSOR_ARCHITECTURE", "AMD64")
        put(r"ControlSet002\Control\ComputerName\ComputerName", "ComputerName", "DESK")
        for name, start in services.items():
            put(rf"ControlSet002\Services\{name}", "Start", start)
            put(rf"ControlSet002\Services\{name}\StartOverride", "0", 3)
    return path


def software(path: Path, product: str = "Windows 10 Pro", version: tuple[int, int] = (10, 0)) -> Path:
    with opened(empty_hive(path)) as put:
        key = r"Microsoft\Windows NT\CurrentVersion"
        put(key, "ProductName", product)
        put(key, "CurrentVersion", "6.3" if version >= (6, 3) else "{}.{}".format(*version))
        put(key, "CurrentBuildNumber", "19045")
        if version >= (10, 0):
            put(key, "CurrentMajorVersionNumber", version[0])
            put(key, "CurrentMinorVersionNumber", version[1])
    return path


def windows(disk: Path, services: Mapping[str, int], *, hibernated: bool = False) -> Path:
    """A disk (MBR, NTFS) with these services, each with its driver's file; before it the partition that setup makes."""
    with tempfile.TemporaryDirectory(prefix="windows-") as name:
        folder = Path(name)
        files = {
            "WINDOWS/System32/Config/SYSTEM": system(folder / "SYSTEM", services),
            "WINDOWS/System32/Config/SOFTWARE": software(folder / "SOFTWARE"),
        }
        driver = folder / "driver"
        driver.write_bytes(b"MZ" + bytes(510))
        files |= {f"WINDOWS/System32/drivers/{one}.sys": driver for one in services}
        if hibernated:
            (folder / "hiberfil.sys").write_bytes(b"HIBR" + bytes(8188))
            files["hiberfil.sys"] = folder / "hiberfil.sys"
        reserved = ntfs(folder / "reserved.raw", {"Boot/BCD": driver}, 8 * MiB)
        return partitioned(disk, [("7", reserved), ("7", ntfs(folder / "ntfs.raw", files))])


def ntfs(image: Path, files: Mapping[str, Path], size: int = 48 * MiB) -> Path:
    """A file system with copies of these files."""
    with image.open("wb") as file:
        file.truncate(size)
    _run("mkntfs", "-F", "-q", "-f", image)
    _put(image, files)
    return image


def _put(image: Path, files: Mapping[str, Path]) -> None:
    """By NTFS-3G over FUSE, in a mount namespace of its own."""
    script = 'ntfs-3g "$1" "$2"; shift; where=$1; shift; while [ $# -gt 0 ]; do mkdir -p "$where/${1%/*}";'
    script += ' case $1 in */*) ;; *) rmdir "$where/$1" ;; esac; cp "$2" "$where/$1"; shift 2; done; umount "$where"'
    with tempfile.TemporaryDirectory(prefix="ntfs-") as where:
        words = [str(one) for pair in files.items() for one in pair]
        _run("unshare", "--mount", "sh", "-ec", script, "sh", image, where, *words)


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
