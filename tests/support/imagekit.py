"""A template and a client so small that a test can build and boot an image of it in seconds.

    template()   of Debian's cloud kernel                 (made once, kept in the cache)
    client()     Debian's generic kernel with some of its modules, and a root disk whose init tells what it sees
    plan(...)    what images.drivers would say, made by hand
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.errors import GuestUnreadable
from images.model import (
    Client,
    Decision,
    Device,
    Firmware,
    Generator,
    Inventory,
    Layer,
    Nic,
    Plan,
    Role,
    Root,
    Verdict,
)
from images.template import apt, build, loaders, userland
from images.template.build import Template, build_template, load_template
from images.template.modules import plain
from images.tree import Kind
from tests.guests import packages

__all__ = ["MAC", "UUID", "FolderTree", "TinyClient", "client", "inventory", "plan", "template"]

UUID = "5d1c2f0e-9a6b-4f5e-8c37-1f2e3d4c5b6a"
MAC = "52:54:00:aa:bb:01"
_MODULES = {
    "nvme": "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02",
    "ahci": "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01",
    "virtio_pci": "pci:v00001AF4d00001001sv00001AF4sd00000002bc01sc00i00",
    "virtio_blk": "virtio:d00000002v00001AF4",
    "e1000e": "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00",
}
# For roots that are more than a partition.
_LAYERS = ("raid1", "dm_mod", "dm_crypt", "ecb", "xts", "aes_generic", "sha256_generic")
# For roots that come over the network.
_STREAM = ("nbd", "dm_multipath", "dm_round_robin", "dm_mirror")
# What is above: the disk's own driver, the file system, and the checksums it asks for by name.
_ABOVE = ("sd_mod", "sr_mod", "crc32c_generic", "ext4")

_INIT = r"""#!/bin/busybox sh
exec >/dev/ttyS1 2>&1
echo "marker: hello from $(busybox hostname -F /etc/hostname; busybox hostname)"
echo "release: $(busybox uname -r)"
echo "command line: $(busybox cat /proc/cmdline)"
echo "root: $(busybox grep ' / ' /proc/mounts | busybox tail -n 1)"
for nic in /sys/class/net/*; do echo "nic: ${nic##*/} $(busybox cat "$nic/address")"; done
for file in $(busybox find /run -type f); do echo "run: $file"; done
while read -r _ where _; do echo "mounted: $where"; done </proc/mounts
echo "arguments: $*"
echo "pid: $$"
echo "end"
busybox sync
busybox poweroff -f
"""


def template(flavour: str = "cloud-amd64") -> Template:
    """A template with Debian's kernel of this flavour, from the cache."""
    sources = [Path(one.__file__) for one in (apt, build, loaders, userland)]
    sources.append(Path(userland.__file__).with_name("init.sh"))
    name = f"template-{flavour}-{packages.sources_digest(sources)}"
    folder = packages.cached(name, lambda scratch: _template(scratch, flavour))
    return load_template(folder / "template")


@dataclass(frozen=True, slots=True)
class TinyClient:
    """`root`: its files as a folder; `disk`: the same as an ext4 without a partition table, to be copied."""

    root: Path
    disk: Path
    release: str

    def tree(self) -> FolderTree:
        return FolderTree(self.root)

    def load(self, *names: str) -> tuple[str, ...]:
        """Paths of these modules and what they need, in the order in which they can be loaded."""
        base = self.root / "usr/lib/modules" / self.release
        files = {_named(path): path for path in base.rglob("*.ko*")}
        order: list[str] = []

        def add(name: str) -> None:
            path = str(files[name].relative_to(base))
            if path not in order:
                for need in _needs(files[name]):
                    add(need)
                order.append(path)

        for name in names:
            if name in files:  # or it is built in
                add(name)
        return tuple(order)


def client() -> TinyClient:
    """Debian's generic kernel, from the cache."""
    folder = packages.cached(f"imageclient-{packages.sources_digest([Path(__file__)])}", _client)
    (kernel,) = (folder / "root/boot").glob("vmlinuz-*")
    return TinyClient(folder / "root", folder / "disk.img", kernel.name.removeprefix("vmlinuz-"))


def inventory(firmware: Firmware = Firmware.UEFI, *, secure_boot: bool = False, console: str = "ttyS0") -> Inventory:
    devices = tuple(Device(modalias=alias) for alias in _MODULES.values())
    nic = Nic(modalias=_MODULES["e1000e"], mac=MAC)
    return Inventory(
        name="test-target", source="script", firmware=firmware, devices=devices, nics=(nic,), console=console,
        secure_boot=secure_boot,
    )  # fmt: skip


def plan(tiny: TinyClient, target: Inventory, *drivers: str, **changes: object) -> Plan:
    """These drivers and what is above them go in; the card is named `lan7`; `changes` to the client."""
    root = Root(spec=f"UUID={UUID}", fs="ext4", uuid=UUID, disks=("vda",), layers=(Layer.PARTITION,))
    system = Client(
        host="tiny", os_id="debian", os_name="Debian", release=tiny.release, kernel=f"/boot/vmlinuz-{tiny.release}",
        initrd="", modules=f"/usr/lib/modules/{tiny.release}", command_line=f"root=UUID={UUID} ro", root=root,
        generator=Generator.INITRAMFS_TOOLS, firmware=Firmware.BIOS, signed_kernel=True,
    )  # fmt: skip
    load = tiny.load(*drivers, *_ABOVE)
    decisions = tuple(
        Decision(module=_named(Path(path)), verdict=Verdict.IN, role=Role.DEPENDENCY, reason="asked for", path=path,
                 origin="client")
        for path in load
    )  # fmt: skip
    line = f"root=UUID={UUID} ro console=ttyS0 client.setting=42 panic=1"
    return Plan(
        client=replace(system, **changes), inventory=target, decisions=decisions, load=load, rename={MAC: "lan7"},
        command_line=line,
    )  # fmt: skip


class FolderTree:
    """A Tree over a folder of this machine, for tests: links are followed inside it."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def read(self, path: str, limit: int) -> bytes:
        found = self._find(path)
        if not found.is_file() or found.stat().st_size > limit:
            raise GuestUnreadable(what=path, reason="no file, or too large")
        return found.read_bytes()

    def list(self, path: str) -> tuple[str, ...]:
        return tuple(sorted(os.listdir(self._find(path))))

    def kind(self, path: str) -> Kind:
        found = self._root / path.lstrip("/")
        if found.is_symlink():
            return Kind.LINK
        self._find(path)
        return Kind.FILE if found.is_file() else Kind.FOLDER

    def resolve(self, path: str) -> str:
        return "/" + str(self._find(path).relative_to(self._root))

    def _find(self, path: str) -> Path:
        found = (self._root / path.lstrip("/")).resolve(strict=True)
        if not found.is_relative_to(self._root):
            raise FileNotFoundError(path)
        return found


def _template(scratch: Path, flavour: str) -> None:
    build_template(scratch / "template", kernel=f"linux-image-{flavour}")


def _client(folder: Path) -> None:
    unpacked, root = folder / "unpacked", folder / "root"
    packages.unpack(packages.kernel_package("amd64"), unpacked)
    packages.unpack("busybox-static", unpacked)
    (kernel,) = unpacked.glob("boot/vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    _system(root, unpacked)
    _disk(root, folder / "disk.img")
    (root / "boot").mkdir()
    for name in (kernel.name, f"config-{release}"):
        shutil.copy(unpacked / "boot" / name, root / "boot" / name)
    (modules,) = [path for path in (unpacked / "usr/lib/modules", unpacked / "lib/modules") if path.is_dir()]
    whole = TinyClient(folder / "whole", folder, release)
    (folder / "whole/usr/lib").mkdir(parents=True)
    os.rename(modules, folder / "whole/usr/lib/modules")
    for path in whole.load(*_MODULES, *_ABOVE, *_LAYERS, *_STREAM):
        target = root / "usr/lib/modules" / release / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "whole/usr/lib/modules" / release / path, target)
    for leftover in ("unpacked", "whole"):
        shutil.rmtree(folder / leftover)


def _system(root: Path, unpacked: Path) -> None:
    for name in ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "tmp"):
        (root / name).mkdir(parents=True)
    (busybox,) = [path for path in (unpacked / "bin/busybox", unpacked / "usr/bin/busybox") if path.exists()]
    shutil.copy(busybox, root / "bin/busybox")
    (root / "etc/hostname").write_text("tiny\n")
    (root / "sbin/init").write_text(_INIT)
    (root / "sbin/init").chmod(0o755)


def _disk(root: Path, disk: Path) -> None:
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-U", UUID, "-d", root, disk], check=True, capture_output=True)


def _named(path: Path) -> str:
    return path.name.split(".", 1)[0].replace("-", "_")


def _needs(path: Path) -> list[str]:
    found = re.search(rb"(?:^|\0)depends=([^\0]*)\0", plain(path.name, path.read_bytes()))
    return [name.replace("-", "_") for name in (found[1].decode() if found else "").split(",") if name]
