"""Boots a machine of software on throw-away layers over a view, where it can harm nobody, and keeps what it showed.

    Stage ─► QEMU (stage.py: own user, sandbox, low priority) ─► console, report, screenshot ─► Outcome

Nothing of it outlives the call. What is bounded, and by what:

    reach     network cards with `restrict=on`, a system call filter, a user without rights; it can open
              no file of ours but what it is handed as a descriptor
    memory    the guest's; the host must have it free, and its kernel takes this QEMU first when it runs out
    disk      what the guest writes: half of what is free, at most 8 GiB
    time      the caller's limit
    output    8 MiB of console, 1 MiB of report

A reset or power-off of the guest stops the machine, so that no kernel gets a second try and the screen can still be
seen. Each call has its own QEMU; any thread may call it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import ConnectError, DomainBusy, DomainLost, ImageError, MonitorError, NoSpace
from appliance.hypervisor.qmp import Connection
from appliance.process import Child
from appliance.restore.stage import Files, Stage, command

__all__ = ["Outcome", "rehearse"]

log = logging.getLogger(__name__)

_CONSOLE, _REPORT, _SCREEN = 8 << 20, 1 << 20, 16 << 20
_MOST_SPACE = 8 << 30
_LEAST_SPACE = 256 << 20
# The host's own: what is left for it beside the guest's memory.
_HOST_MEMORY = 512 << 20
_START = 60.0
_LOOK = 0.5


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


def rehearse(
    stage: Stage, folder: Path, *, timeout: float, over: Callable[[bytes, bytes, float], str]
) -> Outcome:
    """Boot it, until `over(console, report, now)` says why it need not go on, `timeout` seconds have passed, or it
    stopped by itself. `folder` is empty and of this call alone; `now` is the clock `time.monotonic`.

    Raises ImageError when the host has not the memory, or QEMU does not start; NoSpace; ToolFailed. Nothing runs then.
    """
    _refuse_if_short(stage, folder)
    with ExitStack() as stack:
        space = _space(folder)
        files = Files(stack, folder)
        argv, accelerator = command(stage, files)
        child = stack.enter_context(Child(argv, name="qemu-verify", pass_fds=files.descriptors))
        files.handed_over()
        begun = time.monotonic()
        monitor = _connect(child, files.monitor, begun + _START)
        stack.callback(monitor.close)
        files.forget_names()
        ended = _watch(monitor, child, files, space, begun + timeout, over)
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
    monitor: Connection, child: Child, files: Files, space: int, limit: float,
    over: Callable[[bytes, bytes, float], str],
) -> str:  # fmt: skip
    """Why it is over."""
    while True:
        now = time.monotonic()
        if ended := over(files.read("console", _CONSOLE), files.read("report", _REPORT), now):
            return ended
        if too_much := _too_much(files, space):
            return too_much
        if stopped := _stopped(monitor, child):
            # What it wrote last may be what was waited for.
            return over(files.read("console", _CONSOLE), files.read("report", _REPORT), now) or stopped
        if now > limit:
            return "the time was over"
        time.sleep(_LOOK)


def _too_much(files: Files, space: int) -> str:
    if files.written() > space:
        return f"it wrote more than {space >> 20} MiB to its disks"
    if files.size("console") > _CONSOLE:
        return f"it wrote more than {_CONSOLE >> 20} MiB to its console"
    if files.size("report") > _REPORT:
        return f"it wrote more than {_REPORT >> 20} MiB where its report is expected"
    return ""


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
