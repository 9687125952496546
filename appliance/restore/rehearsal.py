"""Boots a machine of software on throw-away layers over a view, where it can harm nobody, and keeps what it showed.

    Stage ─► overlays, descriptors ─► QEMU (own user, sandbox, low priority) ─► console, report, screenshot ─► Outcome

Nothing of it outlives the call. What is bounded, and by what:

    reach     network cards with `restrict=on`, a system call filter, a user without rights; every file is opened here
              and handed over as a descriptor, so QEMU can open no other of ours
    memory    the guest's; the host must have it free, and its kernel takes this QEMU first when it runs out
    disk      what the guest writes: half of what is free, at most 8 GiB
    time      the caller's limit
    output    8 MiB of console, 1 MiB of report

A reset or power-off of the guest stops the machine, so that no kernel gets a second try and the screen can still be
seen. Each call has its own QEMU; any thread may call it.
"""

from __future__ import annotations

import grp
import json
import logging
import os
import pwd
import shutil
import socket
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.errors import ConnectError, DomainBusy, DomainLost, ImageError, MonitorError, NoSpace
from appliance.hypervisor.qmp import Connection
from appliance.process import Child, run

__all__ = ["Layer", "Outcome", "Stage", "guest_user", "rehearse"]

log = logging.getLogger(__name__)

_KVM = Path("/dev/kvm")
_KVM_DEVICE = (10, 232)  # Documentation/admin-guide/devices.txt
_CONSOLE, _REPORT, _SCREEN = 8 << 20, 1 << 20, 16 << 20
_MOST_SPACE = 8 << 30
_LEAST_SPACE = 256 << 20
# The host's own: what is left for it beside the guest's memory.
_HOST_MEMORY = 512 << 20
_START = 60.0
_LOOK = 0.5
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """`ended` is why nobody waited longer; `screenshot` a PNG, empty when there is none; `written` are the bytes that
    the guest wrote to its layers."""

    console: bytes
    report: bytes
    screenshot: bytes
    ended: str
    seconds: float
    written: int
    accelerator: str


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


def rehearse(
    stage: Stage, folder: Path, *, timeout: float, over: Callable[[bytes, bytes, float], str]
) -> Outcome:
    """Boot it, until `over(console, report, now)` says why it need not go on, `timeout` seconds have passed, or it
    stopped by itself. `folder` is empty and of this call alone; `now` is the clock `time.monotonic`.

    Raises ImageError when the host has not the memory, or QEMU does not start; NoSpace; ToolFailed. Nothing runs then.
    """
    _refuse_if_short(stage, folder)
    with ExitStack() as stack:
        files = _Files(stack, folder)
        argv, accelerator = _argv(stage, files)
        child = stack.enter_context(Child(argv, name="qemu-verify", pass_fds=files.descriptors))
        files.handed_over()
        begun = time.monotonic()
        monitor = _connect(child, files.monitor, begun + _START)
        stack.callback(monitor.close)
        files.forget_names()
        ended = _watch(monitor, child, files, begun + timeout, over)
        seconds = time.monotonic() - begun
        screenshot = _screenshot(monitor) if child.alive() else b""
        child.kill()
        console, report = files.read("console", _CONSOLE), files.read("report", _REPORT)
        return Outcome(console, report, screenshot, ended, seconds, files.written(), accelerator)


# --- before it starts -----------------------------------------------------------------------------------------------


def _refuse_if_short(stage: Stage, folder: Path) -> None:
    free = _available_memory()
    if free < stage.memory + _HOST_MEMORY:
        raise ImageError(
            reason=f"the host has {free >> 20} MiB of memory left, too little for a test with {stage.memory >> 20} MiB",
            hint="give it less with --memory, or wait until the host has more",
        )
    if _space(folder) < _LEAST_SPACE:
        raise NoSpace(url=str(folder), name="layers of a test")


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _space(folder: Path) -> int:
    """How much a guest may write."""
    found = os.statvfs(folder)
    return min(found.f_bavail * found.f_frsize // 2, _MOST_SPACE)


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


# --- files as descriptors -------------------------------------------------------------------------------------------


class _Files:
    """Everything that QEMU may open, opened by us. Their names go away once it runs: nothing stays when we die."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self._handles: dict[str, int] = {}
        self._layers: list[int] = []
        self._limit = _space(folder)
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
        return self.given(name, self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def layer(self, name: str, disk: Layer) -> str:
        path = self._folder / name
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=on", path, str(disk.size)])
        text = self.given(name, path, os.O_RDWR)
        self._layers.append(self._handles[name])
        return text

    def copy(self, name: str, path: Path) -> str:
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
        return os.pread(self._handles[f"read {name}"], most, 0)

    def written(self) -> int:
        return sum(os.fstat(handle).st_blocks * 512 for handle in self._layers)

    def too_much(self) -> str:
        if self.written() > self._limit:
            return f"it wrote more than {self._limit >> 20} MiB to its disks"
        if os.fstat(self._handles["console"]).st_size > _CONSOLE:
            return f"it wrote more than {_CONSOLE >> 20} MiB to its console"
        if os.fstat(self._handles["report"]).st_size > _REPORT:
            return f"it wrote more than {_REPORT >> 20} MiB where its report is expected"
        return ""


# --- the command line -----------------------------------------------------------------------------------------------


def _argv(stage: Stage, files: _Files) -> tuple[list[str], str]:
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


def _flash(stage: Stage, files: _Files) -> tuple[str, list[str]]:
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


# --- while it runs --------------------------------------------------------------------------------------------------


def _connect(child: Child, path: Path, limit: float) -> Connection:
    while True:
        try:
            return Connection(path, "rewind-verify")
        except (ConnectError, DomainBusy) as error:
            # The socket takes us before QEMU has begun to look at it.
            if isinstance(error, ConnectError) or not child.alive():
                child.kill()
                raise ImageError(reason=f"QEMU does not start a test: {_last_words(child) or error}") from None
            if time.monotonic() > limit:
                raise ImageError(reason=f"QEMU has not answered for {_START:g} s", hint="is the host busy?") from None


def _last_words(child: Child) -> str:
    return " ".join(line for line in child.tail().splitlines() if "warning:" not in line)[-600:]


def _watch(
    monitor: Connection, child: Child, files: _Files, limit: float, over: Callable[[bytes, bytes, float], str]
) -> str:
    """Why it is over."""
    while True:
        now = time.monotonic()
        if ended := over(files.read("console", _CONSOLE), files.read("report", _REPORT), now):
            return ended
        if too_much := files.too_much():
            return too_much
        if stopped := _stopped(monitor, child):
            # What it wrote last may be what was waited for.
            return over(files.read("console", _CONSOLE), files.read("report", _REPORT), now) or stopped
        if now > limit:
            return "the time was over"
        time.sleep(_LOOK)


def _stopped(monitor: Connection, child: Child) -> str:
    try:
        status = monitor.execute("query-status")
    except (DomainLost, DomainBusy) as error:
        return f"QEMU went away: {_last_words(child) or error}"
    if status["running"]:
        return ""
    return "it went off, or started anew" if status["status"] == "shutdown" else f"it stopped ({status['status']})"


def _screenshot(monitor: Connection) -> bytes:
    """A PNG. Empty when QEMU cannot make one."""
    handle = os.memfd_create("screen", os.MFD_CLOEXEC)
    # QEMU takes only a descriptor that was opened as it would open the file.
    writer = os.open(f"/proc/self/fd/{handle}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        given = monitor.execute_with_fd("add-fd", writer)
        monitor.execute("screendump", filename=f"/dev/fdset/{given['fdset-id']}", format="png")
        return os.pread(handle, _SCREEN, 0)
    except (MonitorError, DomainLost, DomainBusy) as error:
        log.info("no screenshot: %s", error)
        return b""
    finally:
        os.close(writer)
        os.close(handle)
