"""The fence: nobody starts a domain while its disk is neither the old state nor the new one.

Two fences stand side by side, each of which is enough:

    hook          a permanent script of libvirt's that refuses to start a domain whose marker file exists: holds across
                  reboots and without any process of ours, but only for libvirt's system daemon
    image lock    the lock by which QEMU itself refuses to open an image for writing: holds against everybody who
                  opens images with QEMU, but only while a process of ours (the keeper) lives

libvirt looks for hooks when its daemon starts: the first one ever installed on a host counts from the next start on.
A reboot ends the image lock, but also starts the daemon anew, so that one of both stands at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import struct
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from appliance.config import Home
from appliance.errors import FenceError

__all__ = [
    "FenceStatus", "ImageLock", "homes", "hook_path", "install", "put_up", "stands", "status", "take_down", "uninstall",
]  # fmt: skip

_TEMPLATE = Path(__file__).with_name("libvirt-hook.sh")
# How the template says whose a hook is.
_NAMED = re.compile("installed by Rewind for its home (.*); `rewind doctor`")
_DAEMONS = ("libvirtd", "virtqemud")

# How QEMU locks images (block/file-posix.c of QEMU 2.10 and later): a process that does not want others to write
# holds a shared lock on this byte, and whoever wants to write looks whether anyone does.
_UNSHARE_WRITE = 201
_UNSHARE_RESIZE = 203
_USES_WRITE = 101
_FLOCK = struct.Struct("hhqqi4x")
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37


@dataclass(frozen=True, slots=True)
class FenceStatus:
    """`installed`: the hook of this home is there and is this version's. `active`: libvirt's daemon runs it. `remedy`
    is a sentence for the admin, empty when all is well."""

    path: Path
    installed: bool
    active: bool
    remedy: str


# --- the hook -------------------------------------------------------------------------------------------------------


def hook_path(home: Home, directory: Path) -> Path:
    """Where the hook of this home lies; several homes on one host have one each."""
    name = hashlib.sha256(os.fsencode(home.path.resolve())).hexdigest()[:8]
    return directory / "qemu.d" / f"50-rewind-{name}"


def _text(home: Home) -> str:
    text = _TEMPLATE.read_text()
    path = home.path.resolve()
    return text.replace("@REVERTS@", shlex.quote(str(path / "reverts"))).replace("@HOME@", shlex.quote(str(path)))


def install(home: Home, directory: Path) -> FenceStatus:
    """Install the hook if it is not there, whole or not at all. Raises FenceError when that is not allowed."""
    path = hook_path(home, directory)
    try:
        if not _in_place(home, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, _text(home))
    except OSError as error:
        raise FenceError(
            domain="any domain", reason=f"the hook {path} cannot be installed: {error.strerror}",
            hint="run `rewind doctor` as root once",
        ) from error  # fmt: skip
    return status(home, directory)


def _replace(path: Path, text: str) -> None:
    # libvirt runs every executable file of the folder: an unfinished one must never carry the mode.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".rewind-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: no temporary file stays
        os.unlink(temporary)
        raise


def uninstall(home: Home, directory: Path) -> None:
    """Take the hook away, when the home is given up. Nothing happens if there is none."""
    hook_path(home, directory).unlink(missing_ok=True)


def status(home: Home, directory: Path) -> FenceStatus:
    """Whether the hook is there and libvirt runs it. Never raises: what cannot be read is not there."""
    path = hook_path(home, directory)
    if not _in_place(home, path):
        return FenceStatus(path, False, False, f"the libvirt hook {path} is missing: `rewind doctor --fix` installs it")
    if _noticed(directory):
        return FenceStatus(path, True, True, "")
    return FenceStatus(
        path, True, False, "libvirt has not noticed its first hook yet: restart libvirtd (running guests go on)"
    )


def homes(directory: Path) -> set[Path]:
    """Whose hooks lie there. Never raises: what cannot be read names none."""
    found = set()
    for hook in (directory / "qemu.d").glob("50-rewind-*"):
        try:
            named = _NAMED.search(hook.read_text())
            if named:
                found.add(Path(shlex.split(named[1])[0]))
        except (OSError, ValueError):
            continue
    return found


def _in_place(home: Home, path: Path) -> bool:
    try:
        return os.access(path, os.X_OK) and path.read_text() == _text(home)
    except OSError:
        return False


def _noticed(directory: Path) -> bool:
    """Whether the running daemon found any hook for QEMU when it started, which is when it decides to run them all."""
    started = _daemon_started()
    if started is None:
        return True  # whoever starts it next will find ours
    hooks = [directory / "qemu", *sorted((directory / "qemu.d").glob("*"))]
    return any(os.access(hook, os.X_OK) and hook.stat().st_ctime < started for hook in hooks if hook.is_file())


def _daemon_started() -> float | None:
    """When libvirt's daemon started, in seconds since the epoch; None if none runs."""
    tick = os.sysconf("SC_CLK_TCK")
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "comm").read_text().strip() in _DAEMONS:
                return booted + int((entry / "stat").read_text().rpartition(")")[2].split()[19]) / tick
        except OSError:
            continue  # it ended while we looked
    return None


# --- the marker -----------------------------------------------------------------------------------------------------


def put_up(home: Home, uuid: str) -> None:
    """From now on the hook refuses to start the domain; durable. May be repeated."""
    folder = home.revert(uuid)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(folder / "fence", "w") as file:
        os.fsync(file.fileno())
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_down(home: Home, uuid: str) -> None:
    """The domain may start again. May be repeated."""
    (home.revert(uuid) / "fence").unlink(missing_ok=True)


def stands(home: Home, uuid: str) -> bool:
    """Whether the hook would refuse the domain."""
    return (home.revert(uuid) / "fence").exists()


# --- the image lock -------------------------------------------------------------------------------------------------


class ImageLock:
    """Keeps every QEMU from opening these images for writing, until `release` or the end of this process.

    One that has them open already goes on: see `written_by_others`. Used by one thread.
    """

    def __init__(self, images: Iterable[Path]) -> None:
        """Raises OSError when an image cannot be opened; nothing is held then."""
        self._handles: list[int] = []
        try:
            for image in images:
                handle = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
                self._handles.append(handle)
                for byte in (_UNSHARE_WRITE, _UNSHARE_RESIZE):
                    # Of the open file description and not of the process, as QEMU's own: a fork does not share it out.
                    fcntl.fcntl(handle, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except BaseException:  # also Ctrl-C: all of the images are locked, or none
            self.release()
            raise

    def written_by_others(self) -> bool:
        """Whether somebody has one of the images open for writing at this moment."""
        return any(self._held(handle, _USES_WRITE) for handle in self._handles)

    @staticmethod
    def _held(handle: int, byte: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer: bytes = fcntl.fcntl(handle, _F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def release(self) -> None:
        """Let go. May be repeated."""
        while self._handles:
            os.close(self._handles.pop())
