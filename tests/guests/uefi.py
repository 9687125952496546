"""Builds a client that was installed for UEFI: GPT, an ESP with shim and GRUB, netplan, an SSH server.

Its origin is a q35 with OVMF, virtio-blk and virtio-net; of its own beside `clients` so that those are not built anew
when this one changes. It has Debian's signed chain, GRUB's files for a BIOS, and what settling wants for an entry of
the firmware (efibootmgr) and for partitions (fdisk).

    disk.qcow2      pristine: boot it through an overlay only
    client.json     its kernel, and what `proof state` said of it
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.guests import clients, packages
from tests.guests.clients import ClientFiles
from tests.support.limits import limit

__all__ = ["MAC", "build"]

MAC = "52:54:00:c1:1e:09"
_HERE = Path(__file__).with_name("uefi_files")
_THEIRS = Path(__file__).with_name("client_files")
_OVMF = Path("/usr/share/OVMF")
_MIB = 1 << 20
_DISK = 1536 * _MIB
_ESP = (1 * _MIB, 64 * _MIB)
_ROOT = (65 * _MIB, _DISK - 66 * _MIB)
_PACKAGES = [
    "systemd-sysv", "udev", "iproute2", "iputils-ping", "zstd", "initramfs-tools", "netplan.io", "openssh-server",
    "grub-pc-bin", "grub-efi-amd64-bin", "grub-efi-amd64-signed", "shim-signed", "grub2-common", "efibootmgr",
    "dosfstools", "fdisk",
]  # fmt: skip


def build() -> ClientFiles:
    """From the cache if it is there. Thread-safe, also between processes."""
    names = ["proof", "ledgerd", "proof.service", "ledgerd.service", "ledger-audit.service", "setup"]
    sources = [Path(__file__), *sorted(_HERE.iterdir()), *(_THEIRS / name for name in names)]
    folder = packages.cached(f"uefi-{packages.sources_digest(sources)}", _build)
    told = json.loads((folder / "client.json").read_text())
    return ClientFiles("mbr", folder, told["kernel"], {"first": told["state"]})


def _build(folder: Path) -> None:
    root, raw = folder / "root", folder / "disk.raw"
    kernel = _make_root(root)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(root / f"boot/{name}-{kernel}", folder / name)
    spec = _write(root, raw)
    shutil.rmtree(root)
    state = _finish(folder, spec)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, folder / "disk.qcow2"], check=True)
    (folder / "client.json").write_text(json.dumps({"kernel": kernel, "state": state}, indent=1))
    for name in ("disk.raw", "vmlinuz", "initrd.img", "vars.fd", "console", "said"):
        (folder / name).unlink()


def _make_root(root: Path) -> str:
    """A Debian in a folder; the release of its kernel, which is not the newest: a template has that one."""
    package = clients._kernel_package("amd64", 1)
    packages.bootstrap(root, packages.release(), [*_PACKAGES, package], clients._LEFT_OUT)
    for name in ("proof", "ledgerd"):
        _install(_THEIRS / name, root / "usr/local/sbin" / name, 0o755)
        _install(_THEIRS / f"{name}.service", root / f"etc/systemd/system/{name}.service", 0o644)
    _install(_THEIRS / "ledger-audit.service", root / "etc/systemd/system/ledger-audit.service", 0o644)
    _install(_HERE / "finish", root / "usr/local/lib/client/finish", 0o755)
    _install(_THEIRS / "setup", root / "root/setup", 0o755)
    packages.in_root(root, "/root/setup", "uefi")
    _install(_HERE / "setup", root / "root/setup", 0o755)
    packages.in_root(root, "/root/setup", MAC)
    (root / "root/setup").unlink()
    return package.removeprefix("linux-image-")


def _install(source: Path, target: Path, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    target.chmod(mode)


def _write(root: Path, raw: Path) -> str:
    with raw.open("wb") as file:
        file.truncate(_DISK)
    places = ((*_ESP, "U"), (*_ROOT, "L"))
    rows = "".join(f"start={start // 512}, size={size // 512}, type={kind}\n" for start, size, kind in places)
    subprocess.run(["sfdisk", "-q", raw], input=f"label: gpt\n{rows}", text=True, check=True)
    # `-s 1`: it takes the size of its clusters from the whole file, and with fewer of them firmware sees no FAT32.
    place = ("--offset", str(_ESP[0] // 512), raw, str(_ESP[1] // 1024))
    subprocess.run(["mkfs.vfat", "-F", "32", "-s", "1", "-i", "5AFE0EF1", *place], check=True, capture_output=True)
    identity = clients._new_uuid()
    fstab = f"UUID={identity} / ext4 errors=remount-ro 0 1\nUUID=5AFE-0EF1 /boot/efi vfat umask=0077 0 1\n"
    (root / "etc/fstab").write_text(fstab)
    clients._write_ext4(root, raw, *_ROOT, identity)
    return f"UUID={identity}"


def _finish(folder: Path, root: str) -> object:
    variables, console, said = folder / "vars.fd", folder / "console", folder / "said"
    shutil.copy(_OVMF / "OVMF_VARS_4M.fd", variables)
    append = f"root={root} console=ttyS0 init=/usr/local/lib/client/finish mitigations=off no_timer_check"
    # fmt: off
    command = [
        "qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "768", "-smp", "2",
        "-nodefaults", "-display", "none", "-no-reboot",
        "-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_OVMF / 'OVMF_CODE_4M.fd'}",
        "-drive", f"if=pflash,unit=1,format=raw,file={variables}",
        "-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img"), "-append", append,
        "-serial", f"file:{console}", "-serial", f"file:{said}",
        "-drive", f"if=none,id=disk,file={folder / 'disk.raw'},format=raw,cache=unsafe",
        "-device", "virtio-blk-pci,drive=disk", "-netdev", "user,id=net,restrict=on",
        "-device", f"virtio-net-pci,netdev=net,mac={MAC},romfile=",
    ]
    # fmt: on
    subprocess.run(command, check=True, timeout=limit(600))
    lines = said.read_text(errors="replace").splitlines()
    if not lines or lines[-1] != "done":
        raise RuntimeError(f"client of UEFI: {lines}\n{console.read_text(errors='replace')[-6000:]}")
    return json.loads(lines[-2])
