"""What a hypervisor driver must offer: the plug-in point `Hypervisor`, and the values it speaks in.

    Hypervisor ── domain(name) ──► Domain ── monitor() ──► Monitor      (QMP of the running QEMU)
                                      └───── offline() ──► Monitor      (QMP of a qemu-storage-daemon, domain shut off)

Drivers know how to find a domain, its disks and its monitor. They make no block-graph change: those are in
`hypervisor.graph`, once for all drivers. One Domain is used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = [
    "Changes", "Disk", "Domain", "DomainState", "Hypervisor", "Monitor", "Pulls", "QemuProcess", "offline_node",
]  # fmt: skip


def offline_node(target: str) -> str:
    """The node of a shut-off domain's disk inside the storage daemon. QEMU allows 31 characters."""
    return f"rw-off-{target}"[:31]


class DomainState(Enum):
    """`PAUSED` is the admin's own pause; a state that must be put back as it was found."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shutoff"


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of a domain as it is attached now.

    `target` is its name (`vda`). `source` is the path of the top image and `format` its format (`qcow2`, `raw`);
    `size` is in bytes. `node` is the block node that the guest's device sits on when nothing of ours is in between,
    `storage` the node of the top image, which keeps the bitmaps (another one than `node` only below libvirt's own
    filters), `device` the path for `qom-get`/`qom-set` of its `drive` (all empty when the domain is shut off).
    `refusal` is one sentence why this disk cannot be protected, or empty. `persistent` tells whether the top image
    can keep a dirty bitmap (qcow2 v3 can; qcow2 v2 and raw cannot).
    """

    target: str
    source: str
    format: str
    size: int
    bus: str = ""
    node: str = ""
    device: str = ""
    iothread: bool = False
    persistent: bool = False
    read_only: bool = False
    refusal: str = ""
    storage: str = ""


@dataclass(frozen=True, slots=True)
class QemuProcess:
    """The process behind a running domain, so that files and sockets can be made reachable for it."""

    pid: int
    uid: int
    gid: int
    version: tuple[int, int, int]


class Monitor(Protocol):
    """QMP of one QEMU. Argument names are written with `_` for `-`. Thread-safe: one command at a time."""

    domain: str
    # A storage daemon has no devices and no running state.
    storage_daemon: bool

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """The command's `return` value. Raises MonitorError (QEMU refused, nothing happened), DomainLost, or DomainBusy
        when QEMU does not answer for minutes: it may still do what it was told."""

    def execute_with_fd(self, command: str, fd: int, /, **arguments: Any) -> Any:
        """The same with a descriptor sent along (`getfd`, `add-fd`). The caller closes its own copy afterwards: an
        image lock belongs to the open file description and would outlive QEMU."""

    def close(self) -> None:
        """Let go of it. QEMU goes on."""


class Domain(Protocol):
    """One domain. `uuid` is stable over renames and is what everything of ours is kept under."""

    name: str
    uuid: str
    uri: str

    def state(self) -> DomainState:
        """As it is now."""

    def disks(self) -> Sequence[Disk]:
        """Every writable hard disk, in the order of the domain's definition; no cdrom, no floppy."""

    def definition(self) -> str:
        """The configuration that belongs to a recovery point: domain XML, or for bare QEMU a JSON of its devices."""

    def nvram(self) -> Path | None:
        """The UEFI variable store's file on this host."""

    def tpm_state(self) -> Path | None:
        """The folder of the emulated TPM's state on this host."""

    def managed_save(self) -> bool:
        """Whether the guest's memory is kept beside its disks and will be gone on from at the next start, so that the
        disks must not be changed meanwhile."""

    def process(self) -> QemuProcess:
        """Raises DomainLost when the domain does not run."""

    def monitor(self) -> Monitor:
        """QMP of the running domain. Raises DomainLost when it does not run."""

    def offline(self, disks: Sequence[Disk]) -> AbstractContextManager[Monitor]:
        """A `qemu-storage-daemon` that holds these disks' images open for writing under the node names
        `offline_node(target)`: its image lock keeps everyone else away meanwhile. Raises DomainBusy if someone has
        them open."""

    def freeze(self, timeout: float) -> int:
        """Freeze the guest's file systems through its agent; how many. Raises AgentUnavailable."""

    def thaw(self, timeout: float) -> None:
        """Undo `freeze`. Safe when nothing is frozen."""

    def reset(self) -> None:
        """Like the reset button."""

    def suspend(self) -> None: ...

    def resume(self) -> None: ...

    def start(self) -> None: ...

    def destroy(self) -> None:
        """Like pulling the plug."""


@runtime_checkable
class Pulls(Protocol):
    """A domain whose manager can fill an overlay from its backing file while the guest runs, and keeps its definition
    true to that. All raise HypervisorError, DomainNotFound."""

    def pull(self, target: str, rate: int) -> None:
        """Begin to fill the disk's top image from what is below it, at `rate` bytes a second (0: as fast as it goes).
        Returns at once."""
        ...

    def pulling(self, target: str) -> tuple[int, int] | None:
        """(done, total) bytes of the disk's job; None when it has none."""
        ...

    def backed(self, target: str) -> bool:
        """Whether the disk's top image still has something below it, now or at the next start. Of a disk that is in
        neither definition: False."""
        ...

    def stopped_by_error(self) -> bool:
        """Whether QEMU itself has paused the guest, at a read or write that failed."""
        ...

    def undefine(self) -> None:
        """End it if it runs, and have its manager forget it with its UEFI variables; its disks stay."""
        ...


@runtime_checkable
class Changes(Protocol):
    """A domain whose manager keeps its definition, and takes another one for it."""

    def change(self, edit: Callable[[str], str]) -> None:
        """Its next start is by what `edit` makes of its definition: of all of it, also of the passwords that
        `definition` leaves out, which go nowhere else. Raises HypervisorError, DomainNotFound, NotSupported, and what
        `edit` does; it is as before then."""
        ...


class Hypervisor(Protocol):
    """A place where domains run, opened by URI with `hypervisor.connect`."""

    uri: str

    def domains(self) -> Sequence[str]:
        """Names of all domains, running or not."""

    def domain(self, name: str) -> Domain:
        """By name or UUID. Raises DomainNotFound."""

    def define(self, definition: str) -> Domain:
        """Make a new domain from a definition. Raises NotSupported where the driver cannot."""

    def versions(self) -> dict[str, str]:
        """Of the parts below: `{"qemu": "7.2.22", "libvirt": "9.0.0"}`."""

    def close(self) -> None: ...
