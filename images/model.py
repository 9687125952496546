"""The nouns of a bootable image. Frozen values; any thread may share them.

    Inventory   the target: firmware, devices by modalias, NICs          (images.hardware)
    Client      the system in the point: kernel, command line, root     (images.guest)
    Plan        each driver with its verdict and reason                 (images.drivers)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "Client", "Decision", "Device", "Firmware", "Generator", "Inventory", "Layer", "Mount", "Nic", "Plan", "Role",
    "Root", "Verdict",
]  # fmt: skip


# --- the target -----------------------------------------------------------------------------------------------------


class Firmware(Enum):
    BIOS = "bios"
    UEFI = "uefi"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Device(_Strict):
    """One device of the target. `modalias` as the kernel writes it (`pci:v0000…`, `virtio:d…`); `slot` is where it sits
    (`0000:02:00.0`), empty when unknown; `carries` names the restored disks (targets: `vda`) that will hang on it."""

    modalias: str = Field(pattern=r"^[a-z0-9_]+:\S*$")
    slot: str = ""
    description: str = ""
    carries: tuple[str, ...] = ()


class Nic(_Strict):
    """A network card. `mac` in lower case with colons, empty when the target gives it later; `wanted`: it must work."""

    modalias: str = Field(pattern=r"^[a-z0-9_]+:\S*$")
    mac: str = Field(default="", pattern=r"^(([0-9a-f]{2}:){5}[0-9a-f]{2})?$")
    slot: str = ""
    wanted: bool = True


class Inventory(_Strict):
    """The hardware of a target. `devices` holds every device with an alias, NICs too; `nics` are told apart besides.

    `source`: how it was found. `disk_bus` is how the restored disks will be attached where the target is a description
    and not a machine (profiles); empty otherwise. `console` is the kernel's name of the serial line to speak on
    (`ttyS0`).
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    source: Literal["libvirt", "xml", "qemu", "script", "redfish", "profile"]
    firmware: Firmware
    arch: Literal["x86_64"] = "x86_64"
    secure_boot: bool = False
    tpm: bool = False
    devices: tuple[Device, ...]
    nics: tuple[Nic, ...] = ()
    console: str = ""
    disk_bus: str = ""
    memory_bytes: int = Field(default=0, ge=0)
    notes: tuple[str, ...] = ()


# --- the system in the point ----------------------------------------------------------------------------------------


class Generator(Enum):
    """Which tool made the client's initramfs."""

    INITRAMFS_TOOLS = "initramfs-tools"
    DRACUT = "dracut"
    UNKNOWN = "unknown"


class Layer(Enum):
    """What lies between a disk and the root file system, from the disk up."""

    PARTITION = "partition"
    MD = "md"
    LUKS = "luks"
    LVM = "lvm"


@dataclass(frozen=True, slots=True)
class Root:
    """The root file system. `spec` is what the client's command line calls it (`UUID=…`, `/dev/mapper/vg-root`);
    `disks` the targets that it lies on. `offset` and `length` in bytes are its place on `disks[0]` when its only layer
    is PARTITION, else 0. `flags` are mount options that it needs (`subvol=@`). `volume` is `vg/lv` for LVM.
    `containers` are those of LUKS below the root and /usr, each with the name that crypttab has for it and its UUID;
    empty where crypttab does not name all of them."""

    spec: str
    fs: str
    uuid: str
    disks: tuple[str, ...]
    layers: tuple[Layer, ...]
    offset: int = 0
    length: int = 0
    flags: str = ""
    volume: str = ""
    containers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of fstab, as it stands there."""

    spec: str
    where: str
    fs: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Client:
    """The system in a point, as its boot loader would start it. Paths are of the client's own tree, absolute and with
    symbolic links resolved. `command_line` is without `BOOT_IMAGE=` and `initrd=`. `nics` maps the interface names
    that its network configuration speaks of to MAC addresses ("" when it does not say). `firmware` is what its disk is
    set up for. `usr_layers` is what a /usr of its own lies on, as Root's `layers`. `origin` are the modaliases of the
    hardware it came from, where the point's definition tells them."""

    host: str
    os_id: str
    os_name: str
    release: str
    kernel: str
    initrd: str
    modules: str
    command_line: str
    root: Root
    generator: Generator
    firmware: Firmware
    fstab: tuple[Mount, ...] = ()
    nics: Mapping[str, str] = field(default_factory=dict)
    crypttab: tuple[str, ...] = ()
    usr_layers: tuple[Layer, ...] = ()
    origin: tuple[str, ...] = ()
    signed_kernel: bool = False
    shim: str = ""
    grub: str = ""
    warnings: tuple[str, ...] = ()


# --- the plan -------------------------------------------------------------------------------------------------------


class Role(Enum):
    """What a driver is for. The first four must work, or there is no image."""

    DISK = "disk"
    UPPER = "upper"
    ROOT = "root"
    NIC = "nic"
    CONSOLE = "console"
    DEPENDENCY = "dependency"
    OTHER = "other"


class Verdict(Enum):
    """`IN`: goes into the image. `OUT`: a default of the template (or of the client's own initramfs) that this target
    has no use for. `BUILT_IN`: part of the client's kernel. `LATER`: the system on the root disk loads it by itself.
    `MISSING`: nobody has it for this kernel release."""

    IN = "in"
    OUT = "out"
    BUILT_IN = "built-in"
    LATER = "later"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Decision:
    """One driver. `module` is its name with underscores (the alias itself when MISSING); `path` is relative to the
    release's folder (`kernel/drivers/nvme/host/nvme.ko.xz`) when IN; `origin` is `client` or the name of the package or
    folder in the driver store; `alias` is the device that asked for it, empty for dependencies."""

    module: str
    verdict: Verdict
    role: Role
    reason: str
    path: str = ""
    origin: str = ""
    alias: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one client on one target. `load` are the paths of all modules that go in, in the order in which
    they can be inserted. `missing` are the decisions that forbid to build; `warnings` are sentences for the admin.
    `mode` is `template`, or `append` where our own init does not know the root. `rename` maps MAC addresses of the
    target to the interface names that the client's configuration expects; `command_line` is what the kernel gets."""

    client: Client
    inventory: Inventory
    decisions: tuple[Decision, ...]
    load: tuple[str, ...]
    mode: Literal["template", "append"] = "template"
    rename: Mapping[str, str] = field(default_factory=dict)
    command_line: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Decision, ...]:
        return tuple(one for one in self.decisions if one.verdict is Verdict.MISSING)
