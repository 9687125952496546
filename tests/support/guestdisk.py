"""Disks of guests made of folders, without mounting anything: file systems, partitions, a small Debian."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from images.guest.blocks import Cached

__all__ = [
    "DEBIAN", "FileBlocks", "Link", "bzimage", "debian", "ext4", "image_of", "partitioned", "walked", "write_tree",
]  # fmt: skip

MiB = 1 << 20


class Link(str):
    """The target of a symbolic link."""


class FileBlocks:
    """Blocks of an image file."""

    def __init__(self, path: Path, name: str = "vda") -> None:
        self.name = name
        self._data = path
        self.size = path.stat().st_size
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._handle, length, offset)

    def __del__(self) -> None:
        os.close(self._handle)


def image_of(path: Path, name: str = "vda1") -> Cached:
    return Cached(FileBlocks(path, name))


def write_tree(folder: Path, tree: Mapping[str, str | bytes | Link]) -> Path:
    """Files and links by their paths; `x/` is a folder."""
    for name, content in tree.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif isinstance(content, Link):
            path.symlink_to(content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def ext4(image: Path, folder: Path, *options: str, size: int = 32 * MiB) -> Path:
    with image.open("wb") as file:
        file.truncate(size)
    done = subprocess.run(["mkfs.ext4", "-q", "-F", "-d", folder, *options, image], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return image


def partitioned(image: Path, parts: list[tuple[str, Path]], *, label: str = "dos") -> Path:
    """A disk with these images as partitions, each (type for sfdisk, image), from 1 MiB on."""
    script, places, at = [f"label: {label}"], [], MiB
    for kind, part in parts:
        size = -(-part.stat().st_size // MiB) * MiB
        script.append(f"start={at // 512}, size={size // 512}, type={kind}")
        places.append((at, part))
        at += size
    with image.open("wb") as file:
        file.truncate(at + MiB)
    done = subprocess.run(["sfdisk", "-q", image], input="\n".join(script), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    with image.open("r+b") as file:
        for start, part in places:
            file.seek(start)
            file.write(part.read_bytes())
    return image


def walked(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder: path → content, a link's target, None for a folder."""
    found: dict[str, bytes | str | None] = {}
    for base, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(base, name)
            key = f"/{path.relative_to(folder)}"
            found[key] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    found.pop("/lost+found", None)
    return found


def bzimage(release: str, *, signed: bool = False) -> bytes:
    """As much of a kernel as a boot loader looks at."""
    raw = bytearray(0x8000)
    raw[0x1FE:0x200] = b"\x55\xaa"
    raw[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", raw, 0x20E, 0x3000)
    raw[0x3200 : 0x3200 + len(release) + 30] = f"{release} (builder@host) #1 SMP Debian".encode()[: len(release) + 30]
    if signed:
        raw[:2] = b"MZ"
        struct.pack_into("<I", raw, 0x3C, 0x40)
        raw[0x40:0x44] = b"PE\0\0"
        struct.pack_into("<H", raw, 0x58, 0x20B)
        struct.pack_into("<I", raw, 0x58 + 108, 16)
        struct.pack_into("<II", raw, 0x58 + 112 + 32, 0x7000, 0x800)
    return bytes(raw)


RELEASE = "6.1.0-50-amd64"
_UUID = "11111111-2222-3333-4444-555555555555"
_GRUB = f"""\
set default="0"
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-{_UUID}' {{
	insmod ext2
	linux	/boot/vmlinuz-{RELEASE} root=UUID={_UUID} ro quiet client.setting=42
	initrd	/boot/initrd.img-{RELEASE}
}}
"""

DEBIAN: dict[str, str | bytes | Link] = {
    "/usr/lib/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "/etc/os-release": Link("../usr/lib/os-release"),
    "/etc/hostname": "client\n",
    "/etc/fstab": f"# comment\nUUID={_UUID} / ext4 errors=remount-ro 0 1\n",
    "/etc/network/interfaces": "source /etc/network/interfaces.d/*\nauto lo\niface lo inet loopback\n",
    "/etc/network/interfaces.d/ens3": "allow-hotplug ens3\niface ens3 inet dhcp\n",
    "/lib": Link("usr/lib"),
    "/usr/sbin/mkinitramfs": "#!/bin/sh\n",
    "/var/lib/dpkg/info/initramfs-tools.list": "",
    f"/usr/lib/modules/{RELEASE}/modules.dep": "kernel/drivers/nvme/host/nvme.ko:\n",
    f"/usr/lib/modules/{RELEASE}/kernel/drivers/nvme/host/nvme.ko": b"\x7fELF" + bytes(100),
    f"/boot/vmlinuz-{RELEASE}": bzimage(RELEASE),
    f"/boot/initrd.img-{RELEASE}": b"initrd",
    "/boot/grub/grub.cfg": _GRUB,
}


def debian(folder: Path, changes: Mapping[str, str | bytes | Link | None] | None = None) -> Path:
    """A disk (MBR, ext4) with the small Debian; a change of None leaves a file out. Its folder is `folder/root`."""
    tree = {**DEBIAN, **(changes or {})}
    folder.mkdir(exist_ok=True)
    root = write_tree(folder / "root", {name: content for name, content in tree.items() if content is not None})
    return partitioned(folder / "disk.raw", [("83", ext4(folder / "root.ext4", root, "-U", _UUID))])
