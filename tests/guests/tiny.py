"""Builds the tiny guest: Debian's kernel, and an initramfs with busybox and the program in `tiny.c`.

    initramfs:  /init (tiny.c, static)   /bin/busybox + links   /modules/*.ko + order   /data

The `cloud` kernel boots fastest but has no SATA; the `generic` one has everything.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.guests import initramfs, packages
from tests.guests.initramfs import Archive, add_busybox, add_modules

__all__ = ["TinyFiles", "build"]

_SOURCE = Path(__file__).with_name("tiny.c")
_MODULES = {
    "cloud": ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "button", "evdev"],
    "generic": [
        "virtio_pci", "virtio_blk", "virtio_scsi", "ahci", "sd_mod", "virtio_console", "button", "evdev", "ext4",
    ],  # fmt: skip
}
_FLAVOURS = {"cloud": "cloud-amd64", "generic": "amd64"}
_APPLETS = [
    "sh", "blockdev", "cat", "cp", "dd", "df", "dmesg", "echo", "find", "fsfreeze", "grep", "head", "ls", "md5sum",
    "mkdir", "mount", "mv", "ps", "rm", "sha256sum", "sleep", "sort", "sync", "tail", "touch", "umount", "wc",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class TinyFiles:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def build(flavour: str = "cloud") -> TinyFiles:
    """The files of the guest; takes some ten seconds and a download once, nothing afterwards."""
    digest = packages.sources_digest([_SOURCE, Path(__file__), Path(initramfs.__file__)], flavour)
    folder = packages.cached(f"tiny-{flavour}-{digest}", lambda scratch: _build(scratch, flavour))
    return TinyFiles(folder / "vmlinuz", folder / "initrd")


def _build(folder: Path, flavour: str) -> None:
    unpacked = folder / "unpacked"
    packages.unpack(packages.kernel_package(_FLAVOURS[flavour]), unpacked)
    packages.unpack("busybox-static", unpacked)
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    shutil.copy(kernel, folder / "vmlinuz")
    program = folder / "init"
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-static", "-pthread", "-o", str(program), str(_SOURCE)], check=True
    )
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys", "data", "tmp", "modules"):
        archive.folder(name)
    archive.file("init", program.read_bytes(), 0o755)
    add_busybox(archive, unpacked, _APPLETS)
    add_modules(archive, unpacked, _MODULES[flavour])
    (folder / "initrd").write_bytes(gzip.compress(archive.finish(), 1))
    shutil.rmtree(unpacked)
    program.unlink()
