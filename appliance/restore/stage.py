"""The machine of a rehearsal: what QEMU is started with, and all that it may open, opened here.

    Stage ─► Files: layers, medium, firmware, output as descriptors ─► command: own user, sandbox, low priority

Every file is handed over as a descriptor, so QEMU can open no other of ours. How long it runs is rehearsal.py.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import socket
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.errors import ImageError
from appliance.process import run

__all__ = ["Files", "Layer", "Stage", "command", "guest_user"]

_KVM = Path("/dev/kvm")
_KVM_DEVICE = (10, 232)  # Documentation/admin-guide/devices.txt
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# Five-level page tables only cost time in emulation; both are of no use to a guest of a few GiB.
_CPU = "max,la57=off"
# Where distributions have UEFI: (code, variables), without and with Microsoft's keys.
_OVMF = Path("/usr/share/OVMF")
_FIRMWARE = {
    False: (_OVMF / "OVMF_CODE_4M.fd", _OVMF / "OVMF_VARS_4M.fd"),
    True: (_OVMF / "OVMF_CODE_4M.ms.fd", _OVMF / "OVMF_VARS_4M.ms.fd"),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A disk: a layer that is thrown away over the export `export` of an NBD server at `socket`, of `size` bytes."""

    socket: Path
    export: str
    size: int


@dataclass(frozen=True, slots=True)
class Stage:
    """`words` are devices for QEMU; they name the nodes `disk0`, `disk1` … and `medium`, and the chardevs `console`,
    `report` and `unheard`. `memory` in bytes. `uefi` and `secure_boot` choose the firmware."""

    machine: str
    words: Sequence[str]
    disks: Sequence[Layer]
    medium: Path
    memory: int
    uefi: bool = False
    secure_boot: bool = False
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"


class Files:
    """Everything that QEMU may open, opened by us. Their names go away once it runs: nothing stays when we die."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self._handles: dict[str, int] = {}
        self._layers: list[int] = []
        self.monitor = folder / "monitor"
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(self.monitor))
        self._listener.listen(1)

    @property
    def descriptors(self) -> list[int]:
        return [self._listener.fileno(), *self._handles.values()]

    def words(self) -> list[str]:
        """For QEMU: which descriptor is which set."""
        found = ["-chardev", f"socket,id=monitor,fd={self._listener.fileno()},server=on,wait=off"]
        for number, handle in enumerate(self._handles.values()):
            found += ["-add-fd", f"fd={handle},set={number}"]
        return [*found, "-mon", "chardev=monitor,mode=control"]

    def given(self, name: str, path: Path, flags: int) -> str:
        """Open it; what QEMU calls it."""
        handle = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._stack.callback(os.close, handle)
        self._handles[name] = handle
        return f"/dev/fdset/{len(self._handles) - 1}"

    def new(self, name: str) -> str:
        """An empty file, which QEMU appends to."""
        return self.given(name, self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def layer(self, name: str, disk: Layer) -> str:
        """An empty one."""
        path = self._folder / name
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", path, str(disk.size)])
        text = self.given(name, path, os.O_RDWR)
        self._layers.append(self._handles[name])
        return text

    def copy(self, name: str, path: Path) -> str:
        """A copy that it may write to."""
        shutil.copyfile(path, self._folder / name)
        return self.given(name, self._folder / name, os.O_RDWR)

    def handed_over(self) -> None:
        """QEMU has been started. Only it listens now, so that its end is seen at once."""
        self._listener.close()
        for name in ("console", "report"):
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._stack.callback(os.close, handle)
            self._handles[f"read {name}"] = handle

    def forget_names(self) -> None:
        """It has opened all that it needs."""
        for path in self._folder.iterdir():
            path.unlink()

    def read(self, name: str, most: int) -> bytes:
        """What was written to console or report so far."""
        return os.pread(self._handles[f"read {name}"], most, 0)

    def written(self) -> int:
        """Bytes that the layers take."""
        return sum(os.fstat(handle).st_blocks * 512 for handle in self._layers)

    def size(self, name: str) -> int:
        """How much was written to what `new` has made."""
        return os.fstat(self._handles[name]).st_size


def command(stage: Stage, files: Files) -> tuple[list[str], str]:
    """QEMU's, all that it opens opened by `files`; and the accelerators, the best first."""
    accelerators = _accelerator(stage.accelerator)
    argv = ["qemu-system-x86_64", "-name", "rewind-verify", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-no-shutdown", "-sandbox", _SANDBOX, "-cpu", _CPU]
    argv += ["-m", f"{stage.memory >> 20}M", "-smp", str(min(2, os.cpu_count() or 1))]
    for one in accelerators:
        argv += ["-accel", one]
    machine = stage.machine
    if stage.uefi:
        machine, flash = _flash(stage, files)
        argv += flash
    argv += ["-machine", machine]
    for name in ("console", "report"):
        argv += ["-chardev", f"file,id={name},path={files.new(name)},append=on"]
    argv += ["-chardev", "null,id=unheard"]
    for number, disk in enumerate(stage.disks):
        argv += ["-blockdev", json.dumps(_layered(f"disk{number}", files.layer(f"disk{number}", disk), disk))]
    medium = {"driver": "file", "filename": files.given("medium", stage.medium, os.O_RDONLY), "read-only": True}
    argv += ["-blockdev", json.dumps({"driver": "raw", "node-name": "medium", "read-only": True, "file": medium})]
    argv += stage.words
    return [*_confined(), *argv, *files.words()], "+".join(accelerators)


def _layered(name: str, layer: str, disk: Layer) -> dict[str, Any]:
    # Nobody needs what it writes after this: the host's disks are spared its flushes.
    spared = {"no-flush": True}
    server = {"type": "unix", "path": str(disk.socket)}
    below = {"driver": "nbd", "server": server, "export": disk.export, "read-only": True}
    above = {"driver": "file", "filename": layer, "locking": "off", "cache": spared}
    return {"driver": "qcow2", "node-name": name, "file": above, "backing": below, "discard": "unmap", "cache": spared}


def _flash(stage: Stage, files: Files) -> tuple[str, list[str]]:
    code, variables = _FIRMWARE[stage.secure_boot]
    if not code.exists():
        raise ImageError(reason=f"there is no UEFI firmware at {code}", hint="install the package `ovmf`")
    own = {"driver": "file", "node-name": "variables", "filename": files.copy("variables", variables)}
    fixed = {"driver": "file", "node-name": "firmware", "filename": str(code), "read-only": True}
    machine = f"{stage.machine},pflash0=firmware,pflash1=variables"
    words = ["-blockdev", json.dumps(fixed), "-blockdev", json.dumps(own)]
    if stage.secure_boot:
        machine += ",smm=on"
        words += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    return machine, words


def _accelerator(choice: str) -> list[str]:
    """QEMU's names, the best first. The device is looked at and not opened: that is QEMU's part."""
    if choice != "auto":
        return [choice]
    with suppress(OSError):
        found = os.stat(_KVM)
        number = (os.major(found.st_rdev), os.minor(found.st_rdev))
        if stat.S_ISCHR(found.st_mode) and number == _KVM_DEVICE:
            return ["kvm", "tcg"]
    return ["tcg"]


def _confined() -> list[str]:
    """Programs that start it with fewer rights than ours, and behind everybody else."""
    words = ["choom", "-n", "1000", "--", "nice", "-n", "10"]
    if os.geteuid() != 0:
        return words
    uid, gid, name = guest_user()
    # --init-groups: of a group that may use KVM. A change of user takes the signal of the parent's death away.
    groups = ["--init-groups"] if any(name in group.gr_mem for group in grp.getgrall()) else ["--clear-groups"]
    user = ["setpriv", "--reuid", str(uid), "--regid", str(gid), *groups, "--no-new-privs", "--inh-caps=-all"]
    return [*words, *user, "--bounding-set=-all", "--pdeathsig", "KILL"]


def guest_user() -> tuple[int, int, str]:
    """(uid, gid, name) that QEMU runs as: libvirt's, or nobody; ourselves when we are not root and cannot choose."""
    if os.geteuid() != 0:
        one = pwd.getpwuid(os.geteuid())
        return one.pw_uid, one.pw_gid, one.pw_name
    for name in ("libvirt-qemu", "qemu", "nobody"):
        with suppress(KeyError):
            one = pwd.getpwnam(name)
            return one.pw_uid, one.pw_gid, one.pw_name
    raise ImageError(reason="there is no user that a test machine could run as", hint="add a user `nobody`")
