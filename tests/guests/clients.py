"""Builds the clients that bootable images are tested with: real systems that boot from their own disk by GRUB.

    mbr      one ext4, initramfs-tools with MODULES=dep, ifupdown;              origin: i440fx, virtio-blk, virtio-net
    dracut   /boot beside a root on LVM, dracut, networkd, an older kernel;     origin: q35, both behind root ports
    cloud    as mbr, with the kernel for clouds, which lacks most drivers;      origin: as mbr

The root is made by mmdebstrap and written into partitions of an MBR without mounting anything. Then the disk boots
once on its origin's hardware, under emulation, to make what only a running system can make: an initramfs of just this
hardware, GRUB in the gap, GRUB's menu. A second boot changes the system; its overlay is the *second instant*.

    disk.qcow2       first instant: ledger-notes 1, client.setting=42
    second.qcow2     on disk.qcow2: ledger-notes 2, client.setting=43, one more user, service and file in /etc
    client.json      what the client is, and for both instants what must be equal after a restore

Each takes some minutes once and is kept in the cache. The disks are pristine: boot them through an overlay only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.guests import lvm, packages
from tests.support.limits import limit

__all__ = ["ClientFiles", "Instant", "Name", "ORIGINS", "Origin", "build", "overlay"]

DISK_BYTES = 2 << 30

Name = Literal["mbr", "dracut", "cloud"]
Instant = Literal["first", "second"]


@dataclass(frozen=True, slots=True)
class Origin:
    """The hardware a client comes from, as values of QEMU's `-device`. `disk` lacks its drive and `nic` its netdev;
    `nic_name` is what the client calls its network card."""

    machine: Literal["pc", "q35"]
    disk: str
    nic: str
    mac: str
    nic_name: str
    controllers: tuple[str, ...] = ()


_PORTS = tuple(f"pcie-root-port,id=port{number},chassis={number},slot={number},bus=pcie.0" for number in (1, 2))
ORIGINS: dict[Name, Origin] = {
    "mbr": Origin("pc", "virtio-blk-pci,addr=0x4", "virtio-net-pci,addr=0x3", "52:54:00:c1:1e:07", "ens3"),
    "cloud": Origin("pc", "virtio-blk-pci,addr=0x4", "virtio-net-pci,addr=0x3", "52:54:00:c1:1e:09", "ens3"),
    "dracut": Origin(
        "q35", "scsi-hd,bus=scsi.0", "virtio-net-pci,bus=port2", "52:54:00:c1:1e:08", "enp2s0",
        (*_PORTS, "virtio-scsi-pci,id=scsi,bus=port1"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """A built client. `kernel` is its release; `expected` has for each instant what `proof state` said of it."""

    name: Name
    folder: Path
    kernel: str
    expected: dict[Instant, dict[str, Any]]

    def disk(self, instant: Instant = "first") -> Path:
        """The pristine qcow2 image of an instant; never to be written."""
        return self.folder / ("disk.qcow2" if instant == "first" else "second.qcow2")


def build(name: Name = "mbr") -> ClientFiles:
    """The files of a client, from the cache if they are there. Thread-safe, also between processes."""
    others = tuple(f"-{other}" for other in ORIGINS if other != _LIKE.get(name, name))
    sources = [path for path in sorted(_FILES.iterdir()) if not path.name.endswith(others)]
    digest = packages.sources_digest([*sources, Path(__file__), Path(lvm.__file__)])
    folder = packages.cached(f"client-{name}-{digest}", lambda scratch: _build(scratch, name))
    told = json.loads((folder / "client.json").read_text())
    return ClientFiles(name, folder, told["kernel"], told["expected"])


def overlay(client: ClientFiles, path: Path, instant: Instant = "first") -> Path:
    """A new disk at `path` that begins as the client at an instant."""
    base = client.disk(instant)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path], check=True)
    return path


# --- the root -------------------------------------------------------------------------------------------------------

_FILES = Path(__file__).with_name("client_files")
_PACKAGES = ["systemd-sysv", "udev", "iproute2", "iputils-ping", "grub-pc-bin", "grub2-common", "zstd"]
_OWN_PACKAGES = {
    "mbr": ["initramfs-tools", "ifupdown"],
    # dracut makes an initramfs with the tools it finds; lvm2 is one of them, and the root's.
    "dracut": ["dracut", "lvm2", "dmsetup"],
}
# What else a client has in common with one that has files of its own.
_LIKE: dict[Name, Name] = {"cloud": "mbr"}
# Flavour of the kernel, and how many updates of Debian it is behind. A template has the newest: none must be mistaken.
_KERNELS = {"mbr": ("amd64", 1), "dracut": ("amd64", 2), "cloud": ("cloud-amd64", 1)}
# Documentation, and drivers that no machine of these tests has. `depmod` runs after this, so nothing speaks of them.
_NO_DRIVERS = [
    "sound", "drivers/media", "drivers/net/wireless", "drivers/infiniband", "drivers/staging", "drivers/iio",
    "drivers/gpu/drm/amd", "drivers/gpu/drm/radeon", "drivers/gpu/drm/nouveau", "drivers/gpu/drm/i915",
]  # fmt: skip
_LEFT_OUT = ["usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*"]
_LEFT_OUT += [f"{usr}lib/modules/*/kernel/{folder}/*" for usr in ("", "usr/") for folder in _NO_DRIVERS]


def _build(folder: Path, name: Name) -> None:
    root, raw = folder / "root", folder / "disk.raw"
    kernel = _make_root(root, name)
    shutil.copy(root / f"boot/vmlinuz-{kernel}", folder / "vmlinuz")
    shutil.copy(root / f"boot/initrd.img-{kernel}", folder / "initrd")
    root_spec = {"mbr": _write_plain, "dracut": _write_lvm}[_LIKE.get(name, name)](root, raw)
    shutil.rmtree(root)
    disk, second = folder / "disk.qcow2", folder / "second.qcow2"
    first_state = _finish(folder, name, root_spec, raw, "first")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, disk], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "qcow2", second], check=True)
    second_state = _finish(folder, name, root_spec, second, "second")
    told = {"kernel": kernel, "expected": {"first": first_state, "second": second_state}}
    (folder / "client.json").write_text(json.dumps(told, indent=1))
    for path in (raw, folder / "vmlinuz", folder / "initrd"):
        path.unlink()


def _make_root(root: Path, name: Name) -> str:
    """A Debian in a folder, with the kernel whose release is returned."""
    package, like = _kernel_package(*_KERNELS[name]), _LIKE.get(name, name)
    packages.bootstrap(root, packages.release(), [*_PACKAGES, *_OWN_PACKAGES[like], package], _LEFT_OUT)
    _install("proof", root / "usr/local/sbin/proof", 0o755)
    _install("ledgerd", root / "usr/local/sbin/ledgerd", 0o755)
    for unit in ("proof", "ledgerd", "ledger-audit"):
        _install(f"{unit}.service", root / f"etc/systemd/system/{unit}.service", 0o644)
    _install("finish", root / "usr/local/lib/client/finish", 0o755)
    _install(f"initramfs-{like}", root / "usr/local/lib/client/initramfs", 0o755)
    for script in ("setup", f"setup-{like}"):
        _install(script, root / "root" / script, 0o755)
        packages.in_root(root, f"/root/{script}", name)
        (root / "root" / script).unlink()
    return package.removeprefix("linux-image-")


def _kernel_package(flavour: str, age: int) -> str:
    """Debian's kernel of this release, `age` updates older than the newest, as far as apt still has them."""
    newest = packages.kernel_package(flavour)
    series = re.match(r"linux-image-\d+\.\d+\.", newest)
    assert series is not None, newest
    pattern = f"^{re.escape(series.group())}.*[0-9]-{flavour}$"
    done = subprocess.run(["apt-cache", "search", "--names-only", pattern], capture_output=True, text=True, check=True)
    found = {line.split()[0] for line in done.stdout.splitlines()} | {newest}
    ordered = sorted(found, key=lambda package: [int(number) for number in re.findall(r"\d+", package)])
    upto = ordered[: ordered.index(newest) + 1]
    return upto[max(0, len(upto) - 1 - age)]


def _install(source: str, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_FILES / source, target)
    target.chmod(mode)


# --- the disk -------------------------------------------------------------------------------------------------------

_MIB = 1 << 20
# From 1 MiB on: GRUB's own image lies in the gap before it.
_BOOT = (1 * _MIB, 255 * _MIB)
_VOLUME = (256 * _MIB, DISK_BYTES - 256 * _MIB)


def _write_plain(root: Path, raw: Path) -> str:
    """One bootable partition with the root in it; what its kernel calls it."""
    _partition(raw, f"start={_MIB // 512}, type=83, bootable\n")
    identity = _new_uuid()
    (root / "etc/fstab").write_text(f"UUID={identity} / ext4 errors=remount-ro 0 1\n")
    _write_ext4(root, raw, _MIB, DISK_BYTES - _MIB, identity)
    return f"UUID={identity}"


def _write_lvm(root: Path, raw: Path) -> str:
    """A bootable partition for /boot, and one that is a physical volume of the root's group."""
    rows = ((*_BOOT, "83, bootable"), (*_VOLUME, "8e"))
    _partition(raw, "".join(f"start={start // 512}, size={size // 512}, type={kind}\n" for start, size, kind in rows))
    place = lvm.make_volume(raw, *_VOLUME, "vg", "root")
    identity, spec = _new_uuid(), "/dev/mapper/vg-root"
    (root / "etc/fstab").write_text(f"{spec} / ext4 errors=remount-ro 0 1\nUUID={identity} /boot ext4 defaults 0 2\n")
    _write_ext4(root / "boot", raw, *_BOOT, identity)
    shutil.rmtree(root / "boot")
    (root / "boot").mkdir()
    _write_ext4(root, raw, *place, _new_uuid())
    return spec


def _partition(raw: Path, rows: str) -> None:
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["sfdisk", "-q", raw], input=f"label: dos\n{rows}", text=True, check=True)


def _write_ext4(root: Path, raw: Path, offset: int, length: int, identity: str) -> None:
    # A lazily initialised file system would be written to by the guest's kernel for minutes after its first mount.
    options = f"lazy_itable_init=0,lazy_journal_init=0,nodiscard,offset={offset}"
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=32", "-U", identity, "-E", options]
    subprocess.run([*command, "-d", str(root), str(raw), str(length // 4096)], check=True)


def _new_uuid() -> str:
    return Path("/proc/sys/kernel/random/uuid").read_text().strip()


# --- the boot that finishes it --------------------------------------------------------------------------------------


def _finish(folder: Path, name: Name, root: str, disk: Path, what: Instant) -> dict[str, Any]:
    """Boot the disk on its origin's hardware into `finish`; what it says of itself.

    With a kernel and a general initramfs from outside: at first the disk has no GRUB.
    """
    said, console = folder / "said", folder / "console"
    append = f"root={root} console=ttyS0 init=/usr/local/lib/client/finish mitigations=off no_timer_check -- {what}"
    origin = ORIGINS[name]
    # fmt: off
    command = [
        "qemu-system-x86_64", "-machine", origin.machine, "-accel", "tcg", "-cpu", "qemu64", "-m", "768", "-smp", "2",
        "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd"), "-append", append,
        "-serial", f"file:{console}", "-serial", f"file:{said}",
        "-drive", f"if=none,id=disk,file={disk},format={disk.suffix[1:]},cache=unsafe",
        "-netdev", "user,id=net,restrict=on",
    ]
    # fmt: on
    devices = [*origin.controllers, f"{origin.disk},drive=disk", f"{origin.nic},netdev=net,mac={origin.mac},romfile="]
    for device in devices:
        command += ["-device", device]
    subprocess.run(command, check=True, timeout=limit(600))
    lines = said.read_text(errors="replace").splitlines()
    if not lines or lines[-1] != "done":
        raise RuntimeError(f"client {name}, {what}: {lines}\n{console.read_text(errors='replace')[-3000:]}")
    state: dict[str, Any] = json.loads(lines[-2])
    console.unlink()
    said.unlink()
    return state
