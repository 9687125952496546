"""The client `mbr` once more, on roots that only libguestfs reads: the same Debian, files and state, on other layers.

    xfs      one partition with xfs
    btrfs    one partition, a subvolume `@rootfs`, as Debian has it
    luks     /boot on ext4, LUKS2 with Argon2id, ext4 in it
    md       two disks, RAID 1 of a partition of each, ext4 on it

The files are those of the client's first instant; what says where the root is (fstab, crypttab, GRUB's menu) is written
as Debian would. Nothing is booted to make one, so each takes a minute. LUKS and md are made by libguestfs with an
appliance of ours: there is no device mapper in the kernel that tests run on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.guests import clients, packages
from tests.guests.clients import ClientFiles, Instant

__all__ = ["PASSPHRASE", "Kind", "RootFiles", "build"]

Kind = Literal["xfs", "btrfs", "luks", "md"]

# Nothing else has these words, so whoever finds them has found the passphrase.
PASSPHRASE = "Rohrzange Apfelkuchen 1931"
_MIB = 1 << 20
_FS_BYTES = 960 * _MIB
_BOOT_BYTES = 128 * _MIB
_UUIDS = {
    "xfs": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b001", "btrfs": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b002",
    "luks": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b003", "md": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b004",
    "sealed": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b005", "boot": "6a1e7d10-5b7e-4c37-9d0e-52f0a2a3b006",
}  # fmt: skip
_MAKERS: dict[Kind, tuple[str, ...]] = {
    "xfs": ("mkfs.xfs", "-q", "-m", f"uuid={_UUIDS['xfs']}"),
    "btrfs": ("mkfs.btrfs", "-q", "-U", _UUIDS["btrfs"]),
    "luks": ("mkfs.ext4", "-q", "-U", _UUIDS["luks"], "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "md": ("mkfs.ext4", "-q", "-U", _UUIDS["md"], "-E", "lazy_itable_init=0,lazy_journal_init=0"),
}
_SUBVOLUME = "@rootfs"


@dataclass(frozen=True, slots=True)
class RootFiles(ClientFiles):
    """A client (see there) of one instant and one or two disks."""

    kind: Kind = "xfs"

    def disks(self, instant: Instant = "first") -> tuple[Path, ...]:
        """Pristine qcow2 images; never to be written."""
        return tuple(sorted(self.folder.glob("disk*.qcow2")))


def build(kind: Kind, appliance: Path) -> RootFiles:
    """From the cache if it is there. `appliance` is one that `rewind image reader build` has made."""
    base = clients.build("mbr")
    name = f"root-{kind}-{packages.sources_digest([Path(__file__)], base.folder.name, kind)}"
    folder = packages.cached(name, lambda scratch: _build(scratch, kind, base, appliance))
    told = json.loads((folder / "client.json").read_text())
    return RootFiles("mbr", folder, base.kernel, {"first": told}, kind)


def _build(folder: Path, kind: Kind, base: ClientFiles, appliance: Path) -> None:
    image, boot = folder / "fs.raw", folder / "boot.raw"
    _sized(image, _FS_BYTES)
    subprocess.run([*_MAKERS[kind], image], check=True, capture_output=True)
    with _root_of(base, folder) as source, _mounted(image, folder / "new") as new:
        if kind == "btrfs":
            new = new / _SUBVOLUME
            subprocess.run(["btrfs", "-q", "subvolume", "create", new], check=True)
        subprocess.run(["cp", "-a", f"{source}/.", new], check=True)
        _say_where_it_is(kind, new)
        done = subprocess.run(
            ["chroot", new, "/usr/local/sbin/proof", "state"], check=True, capture_output=True, text=True
        )
        (folder / "client.json").write_text(done.stdout)
        if kind == "luks":
            _sized(boot, _BOOT_BYTES)
            options = ("-U", _UUIDS["boot"], "-d", new / "boot")
            subprocess.run(["mkfs.ext4", "-q", *options, boot], check=True, capture_output=True)
            shutil.rmtree(new / "boot")
            (new / "boot").mkdir()
    for raw in _disks(kind, folder, appliance):
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, raw.with_suffix(".qcow2")], check=True)
        raw.unlink()
    for left in (image, boot):
        left.unlink(missing_ok=True)
    (folder / "new").rmdir()


# --- the root's files -----------------------------------------------------------------------------------------------


@contextmanager
def _root_of(base: ClientFiles, folder: Path) -> Iterator[Path]:
    raw = folder / "base.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", base.disk("first"), raw], check=True)
    try:
        with _mounted(raw, folder / "base", "ro", "noload", f"offset={_MIB}") as mounted:
            yield mounted
    finally:
        raw.unlink()
        (folder / "base").rmdir()


@contextmanager
def _mounted(image: Path, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir()
    subprocess.run(["mount", "-o", ",".join(("loop", *options)), image, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def _say_where_it_is(kind: Kind, root: Path) -> None:
    """fstab, crypttab, GRUB's menu."""
    spec = "/dev/mapper/sealed_crypt" if kind == "luks" else f"UUID={_UUIDS[kind]}"
    fs = {"xfs": "xfs", "btrfs": "btrfs"}.get(kind, "ext4")
    options = {"btrfs": f"defaults,subvol={_SUBVOLUME}", "xfs": "defaults"}.get(kind, "errors=remount-ro")
    fstab = f"{spec} / {fs} {options} 0 {0 if fs in ('xfs', 'btrfs') else 1}\n"
    if kind == "luks":
        fstab += f"UUID={_UUIDS['boot']} /boot ext4 defaults 0 2\n"
        (root / "etc/crypttab").write_text(f"sealed_crypt UUID={_UUIDS['sealed']} none luks,discard\n")
    (root / "etc/fstab").write_text(fstab)
    menu = root / "boot/grub/grub.cfg"
    flags = f" rootflags=subvol={_SUBVOLUME}" if kind == "btrfs" else ""
    text = re.sub(r"root=UUID=\S+( ro)?", f"root={spec} ro{flags}", menu.read_text())
    prefix = {"btrfs": f"/{_SUBVOLUME}/boot/", "luks": "/"}.get(kind, "/boot/")
    menu.write_text(re.sub(r"(\s(?:linux|initrd)\s+)/boot/", rf"\g<1>{prefix}", text))


# --- the disks ------------------------------------------------------------------------------------------------------


def _disks(kind: Kind, folder: Path, appliance: Path) -> list[Path]:
    if kind in ("xfs", "btrfs"):
        disk = folder / "disk.raw"
        _partitioned(disk, ["83"], [_FS_BYTES])
        _copy(folder / "fs.raw", disk, _MIB)
        return [disk]
    if kind == "luks":
        disk = folder / "disk.raw"
        _partitioned(disk, ["83", "83"], [_BOOT_BYTES, _FS_BYTES + 16 * _MIB])
        _copy(folder / "boot.raw", disk, _MIB)
        _in_appliance(_SEAL, appliance, folder, [disk])
        return [disk]
    disks = [folder / "disk1.raw", folder / "disk2.raw"]
    for disk in disks:
        _partitioned(disk, ["fd"], [_FS_BYTES + 64 * _MIB])
    _in_appliance(_MIRROR, appliance, folder, disks)
    return disks


# Each has `sh`, which runs in the appliance, and the disks as /dev/sda …; the last one is the file system to be copied.
# The key is made with little memory: the machine that opens it later has no more. The master key is told, so that a
# test can look for it.
_SEAL = f"""
sh("printf %s {PASSPHRASE!r} >/tmp/key")
sh("cryptsetup luksFormat --batch-mode --type luks2 --uuid {_UUIDS['sealed']} --pbkdf argon2id --pbkdf-memory 65536"
   " --pbkdf-force-iterations 4 --pbkdf-parallel 1 --key-file /tmp/key /dev/sda2")
sh("cryptsetup luksDump --batch-mode --dump-volume-key --volume-key-file /tmp/master --key-file /tmp/key /dev/sda2"
   " >/dev/null; od -An -v -tx1 /tmp/master | tr -d ' \\n' | sed 's/.*/master=&=/'")
sh("cryptsetup open --key-file /tmp/key /dev/sda2 inside")
sh("dd if=/dev/sdb of=/dev/mapper/inside bs=1M && sync && cryptsetup close inside")
"""
_MIRROR = """
sh("mdadm --create /dev/md0 --run --level=1 --metadata=1.2 --assume-clean --raid-devices=2 /dev/sda1 /dev/sdb1")
sh("dd if=/dev/sdc of=/dev/md0 bs=1M conv=sparse && sync && mdadm --stop /dev/md0")
"""


def _in_appliance(script: str, appliance: Path, folder: Path, disks: list[Path]) -> None:
    program = f"""
import sys
import guestfs
g = guestfs.GuestFS(python_return_dict=True)
for path in sys.argv[1:]:
    g.add_drive_opts(path, format="raw", cachemode="unsafe")
g.launch()
def sh(command):
    print(g.debug("sh", [f"set -e; {{command}}; echo is-done"]))
{script}
g.shutdown()
"""
    # libguestfs looks for KVM whatever it is told; in the private world there is none.
    environment = {**os.environ, "LIBGUESTFS_PATH": str(appliance), "LIBGUESTFS_BACKEND": "direct",
                   "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg", "LIBGUESTFS_MEMSIZE": "768", "TMPDIR": str(folder),
                   "LIBGUESTFS_CACHEDIR": str(folder), "LIBGUESTFS_HV": str(_hv(folder))}  # fmt: skip
    command = [sys.executable, "-c", program, *disks, folder / "fs.raw"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or done.stdout.count("is-done") != script.count("\nsh("):
        raise RuntimeError(f"in the appliance: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    if master := re.search("master=([0-9a-f]+)=", done.stdout):
        (folder / "master.hex").write_text(master[1])
    for left in (folder / "qemu.sh", *folder.glob(".guestfs-*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def _hv(folder: Path) -> Path:
    """QEMU without a question for KVM."""
    wrapper = folder / "qemu.sh"
    wrapper.write_text('#!/bin/bash\nexec qemu-system-x86_64 "${@//accel=kvm:tcg/accel=tcg}"\n')
    wrapper.chmod(0o755)
    return wrapper


def _sized(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)


def _partitioned(disk: Path, kinds: list[str], sizes: list[int]) -> None:
    rows = "".join(f"size={size // 512}, type={kind}\n" for kind, size in zip(kinds, sizes, strict=True))
    _sized(disk, sum(sizes) + 2 * _MIB)
    subprocess.run(["sfdisk", "-q", disk], input=f"label: dos\n{rows}", text=True, check=True)


def _copy(part: Path, disk: Path, at: int) -> None:
    words = [f"if={part}", f"of={disk}", "bs=1M", f"seek={at // _MIB}", "conv=notrunc,sparse", "status=none"]
    subprocess.run(["dd", *words], check=True)
