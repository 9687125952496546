"""Builds a real Debian guest of this machine's release: systemd, ssh, PostgreSQL with a shop in it, the guest agent.

    disk.qcow2   one ext4, no partitions; the guest's own user space, hashes of its documents in /srv/documents.sha256
    vmlinuz      Debian's cloud kernel, booted directly        initrd   loads the drivers, hands over to systemd
    ssh_key      root's

Built in one to two minutes by mmdebstrap from wherever this machine's apt takes its packages; kept in the cache.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.guests import initramfs, packages
from tests.guests.initramfs import Archive, add_busybox, add_modules

__all__ = ["DISK_BYTES", "DebianFiles", "build"]

DISK_BYTES = 3 << 30

_FILES = Path(__file__).with_name("debian_files")
_PACKAGES = ["systemd-sysv", "udev", "openssh-server", "postgresql", "qemu-guest-agent", "iproute2"]
_MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "button", "evdev"]
_APPLETS = ["sh", "mount", "umount", "insmod", "sleep", "switch_root", "ls", "cat"]
# Compiled queries and documentation are half of a small Debian.
_LEFT_OUT = ["usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/lib/*/libLLVM*"]


@dataclass(frozen=True, slots=True)
class DebianFiles:
    """What QEMU boots; `disk` is the pristine image, to be copied."""

    kernel: Path
    initrd: Path
    disk: Path
    ssh_key: Path


def build() -> DebianFiles:
    """The files of the guest, from the cache if they are there."""
    sources = [*sorted(_FILES.iterdir()), Path(__file__), Path(initramfs.__file__)]
    folder = packages.cached(f"debian-{packages.sources_digest(sources)}", _build)
    return DebianFiles(folder / "vmlinuz", folder / "initrd", folder / "disk.qcow2", folder / "ssh_key")


def _build(folder: Path) -> None:
    _build_initrd(folder)
    root = folder / "root"
    packages.bootstrap(root, packages.release(), _PACKAGES, _LEFT_OUT)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f", folder / "ssh_key"], check=True)
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(folder / "ssh_key.pub", keys / "authorized_keys")
    _install(_FILES / "rows", root / "usr/local/sbin/rows")
    _install(_FILES / "rows.service", root / "etc/systemd/system/rows.service")
    _install(_FILES / "setup", root / "root/setup")
    packages.in_root(root, "/root/setup")
    _make_disk(root, folder)
    shutil.rmtree(root)


def _build_initrd(folder: Path) -> None:
    unpacked = folder / "unpacked"
    packages.unpack(packages.kernel_package("cloud-amd64"), unpacked)
    packages.unpack("busybox-static", unpacked)
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    shutil.copy(kernel, folder / "vmlinuz")
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys", "root", "modules"):
        archive.folder(name)
    archive.file("init", (_FILES / "init").read_bytes(), 0o755)
    add_busybox(archive, unpacked, _APPLETS)
    add_modules(archive, unpacked, _MODULES)
    (folder / "initrd").write_bytes(gzip.compress(archive.finish(), 1))
    shutil.rmtree(unpacked)


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _make_disk(root: Path, folder: Path) -> None:
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    # A lazily initialised file system would be written to by the guest's kernel for minutes after its first mount.
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-J", "size=32", "-E", options, "-d", root, raw], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, folder / "disk.qcow2"], check=True)
    raw.unlink()
