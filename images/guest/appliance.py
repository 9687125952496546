"""libguestfs' appliance: the small system that its virtual machine runs, made beforehand and never by a reader.

    build_appliance   by supermin, of this host's packages and a kernel, in a folder that readers only see
    kept              the one that is there
    fitting           the same for a reader, refused when it is not of this host's libguestfs and QEMU

So no guest's reader can leave anything for the next one, and the first reader does not wait for it. libguestfs' library
and the daemon in the appliance talk a protocol of their own, and QEMU's devices are what its kernel has to drive: after
an upgrade of either it is made anew, by whoever is told so. A newer kernel of the host is no reason to refuse: the old
one reads as well as before.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from appliance.errors import ConfigError
from appliance.process import run
from appliance.scratch import scratch_folder
from images.guest.confine import user
from images.guest.grub import version_key
from images.guest.reader import ConfinedTree
from images.guest.sources import serve_disks

__all__ = ["Appliance", "Unfit", "build_appliance", "fitting", "host_kernel", "kept", "prove", "remove"]

_PARTS = Path("/usr/lib") / f"{platform.machine()}-linux-gnu" / "guestfs" / "supermin.d"
_ROOT = Path("/")
_MANIFEST = "rewind.json"
_NAME = "appliance-"
# supermin looks for the folder even where it is told another one, and a machine without a kernel has none.
_SCRIPT = """
if [ ! -d /lib/modules ]; then
    mount -t overlay overlay -o "lowerdir=/usr/lib,upperdir=$1/upper,workdir=$1/work" /usr/lib
    mkdir -p /usr/lib/modules
fi
exec supermin --build --copy-kernel -f ext2 --host-cpu "$2" "$3" -o "$4"
"""


class Unfit(Exception):
    """There is no appliance for a reader; the text says why."""


class Manifest(BaseModel):
    """What is in `rewind.json`. `created` in seconds since 1970; `kernel` its release; `parts` a digest of libguestfs'
    own ones; `qemu` as QEMU calls itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    created: float
    kernel: str
    parts: str
    qemu: str


@dataclass(frozen=True, slots=True)
class Appliance:
    """One that lies in `folder`. `unfit`: why no reader may use it, empty when it may."""

    folder: Path
    manifest: Manifest
    unfit: str

    @property
    def size(self) -> int:
        """In bytes, as it takes room on the disk."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.iterdir())


def build_appliance(
    folder: Path,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    check: Callable[[Path], None] = lambda made: None,
) -> Appliance:
    """Make one in `folder`, in the place of the one that is there; some 15 s and 700 MiB. `kernel` and `modules` (the
    folder of its release, with its tables) instead of this host's newest. `check` may refuse it by raising.

    Needs root. Any thread and process may call it at once. Raises ConfigError, ToolFailed, and what `check` raises:
    what was there stays then, and nothing is left of the new one. What a build has left that was killed goes.
    """
    if not _PARTS.is_dir():
        raise ConfigError(reason="libguestfs is not installed", hint="apt install python3-guestfs")
    if kernel is None or modules is None:
        kernel, modules = host_kernel()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with scratch_folder(folder, ".made-") as scratch:
        made = _made(scratch, kernel, modules)
        check(made)
        told = _loaded(made)
        target = folder / f"{_NAME}{time.time_ns():x}"
        os.rename(made, target)
    _remove(folder, before=target.name)
    return replace(told, folder=target)


def host_kernel(root: Path = _ROOT) -> tuple[Path, Path]:
    """(kernel, folder of its modules) that is the newest below a root. Raises ConfigError when there is none."""
    found = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: version_key(path.name), reverse=True)
    for kernel in found:
        for base in ("usr/lib/modules", "lib/modules"):
            modules = root / base / kernel.name.removeprefix("vmlinuz-")
            if modules.is_dir():
                return kernel, modules
    raise ConfigError(
        reason=f"there is no kernel with its modules in {root / 'boot'}",
        hint="`rewind image reader build --kernel linux-image-amd64` takes Debian's",
    )


def kept(folder: Path) -> Appliance | None:
    """The newest one that is whole, fit or not."""
    for path in sorted(folder.glob(f"{_NAME}*"), reverse=True):
        try:
            return _loaded(path)
        except (OSError, ValidationError):
            continue  # being removed, or of another version of ours
    return None


@contextmanager
def fitting(folder: Path | None) -> Iterator[Path]:
    """The folder of the appliance that a reader uses meanwhile. Raises Unfit."""
    if folder is None or not folder.is_dir():
        raise Unfit("this host has no reader for more than ext4 and FAT")
    with _lock(folder, fcntl.LOCK_SH):
        found = kept(folder)
        if found is None:
            raise Unfit("this host has no reader for more than ext4 and FAT")
        if found.unfit:
            raise Unfit(f"the reader that was built for more than ext4 and FAT is {found.unfit}")
        yield found.folder


def remove(folder: Path) -> bool:
    """Remove it, unless a reader uses it. Whether it is gone."""
    return not folder.is_dir() or _remove(folder)


def prove(appliance: Path, folder: Path, accelerator: str) -> None:
    """Let a reader start with it, on a disk that is empty. Raises GuestUnreadable, ToolFailed."""
    with tempfile.TemporaryDirectory(prefix=".prove-", dir=folder) as name:
        disk = Path(name) / "disk"
        with disk.open("wb") as file:
            file.truncate(1 << 20)
        with (
            serve_disks({"vda": f"raw:{disk}"}, Path(name), user()) as sockets,
            ConfinedTree.general(sockets, appliance, accelerator=accelerator) as tree,
        ):
            tree.volumes()


def _made(scratch: Path, kernel: Path, modules: Path) -> Path:
    for part in ("upper", "work"):
        (scratch / part).mkdir()
    made = scratch / "made"
    environment = {**os.environ, "SUPERMIN_KERNEL": str(kernel), "SUPERMIN_MODULES": str(modules),
                   "SUPERMIN_KERNEL_VERSION": modules.name}  # fmt: skip
    words = [str(scratch), platform.machine(), str(_PARTS), str(made)]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _SCRIPT, "sh", *words]
    run(command, timeout=600, env=environment)
    (made / "README.fixed").write_text("libguestfs takes a folder with this file as it is\n")
    told = Manifest(created=time.time(), kernel=modules.name, parts=_parts(), qemu=_qemu())
    (made / _MANIFEST).write_text(told.model_dump_json(indent=1) + "\n")
    made.chmod(0o755)
    for file in made.iterdir():
        file.chmod(0o644)
    return made


def _loaded(path: Path) -> Appliance:
    manifest = Manifest.model_validate_json((path / _MANIFEST).read_bytes())
    return Appliance(path, manifest, _unfit(manifest))


def _unfit(manifest: Manifest) -> str:
    if not _PARTS.is_dir():
        return "of no use: libguestfs is not installed any more"
    if manifest.parts != _parts():
        return "of another libguestfs than this host has now"
    if manifest.qemu != (qemu := _qemu()):
        return f"of {manifest.qemu!r}, and this host has {qemu!r} now"
    return ""


def _parts() -> str:
    """Of what libguestfs brings for its appliance, by name, size and time."""
    parts = [(path.name, path.stat()) for path in sorted(_PARTS.iterdir())]
    told = "\0".join(f"{name}:{found.st_size}:{found.st_mtime_ns}" for name, found in parts)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _qemu() -> str:
    """Raises ToolFailed."""
    return run([f"qemu-system-{platform.machine()}", "--version"], timeout=60).partition("\n")[0].strip()


def _remove(folder: Path, before: str = "~") -> bool:
    """All with lower names: their names are in the order in which they were made. Where a reader uses one, they stay
    for the next time."""
    try:
        with _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for old in folder.glob(f"{_NAME}*"):
                if old.name < before:
                    shutil.rmtree(old, ignore_errors=True)
            return True
    except BlockingIOError:
        return False


@contextmanager
def _lock(folder: Path, how: int) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield
