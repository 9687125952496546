"""libguestfs' appliance: the small system that its virtual machine runs, made beforehand and never by a reader.

Made by supermin of this machine's packages and a kernel, in a folder that readers only see. So no guest's reader can
leave anything for the next one, and the first reader does not wait for it. It is made anew when libguestfs or the
kernel has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

from appliance.errors import ConfigError
from appliance.process import run

__all__ = ["build_appliance"]

_PARTS = Path("/usr/lib") / f"{platform.machine()}-linux-gnu" / "guestfs" / "supermin.d"
# supermin looks for the folder even where it is told another one, and a machine without a kernel has none.
_SCRIPT = """
if [ ! -d /lib/modules ]; then
    mount -t overlay overlay -o "lowerdir=/usr/lib,upperdir=$1/upper,workdir=$1/work" /usr/lib
    mkdir -p /usr/lib/modules
fi
exec supermin --build --copy-kernel -f ext2 --host-cpu "$2" "$3" -o "$4"
"""


def build_appliance(folder: Path, *, kernel: Path | None = None, modules: Path | None = None) -> Path:
    """The appliance in `folder`, made if it is not there; some 15 s and 700 MiB. `kernel` and `modules` (the folder of
    its release) are for machines that have none in /boot and /lib/modules. Needs root there. Any thread and process may
    call it at once. Raises ConfigError, ToolFailed; nothing new is in the folder then."""
    if not _PARTS.is_dir():
        raise ConfigError(reason="libguestfs is not installed", hint="install the package python3-guestfs")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"appliance-{_digest(kernel, modules)}"
    with (folder / "appliance.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _build(folder, target, kernel, modules)
    return target


def _build(folder: Path, target: Path, kernel: Path | None, modules: Path | None) -> None:
    environment = dict(os.environ)
    if kernel and modules:
        environment |= {"SUPERMIN_KERNEL": str(kernel), "SUPERMIN_MODULES": str(modules),
                        "SUPERMIN_KERNEL_VERSION": modules.name}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix=".appliance-", dir=folder) as name:
        scratch = Path(name)
        for part in ("upper", "work"):
            (scratch / part).mkdir()
        made = scratch / "made"
        words = [str(scratch), platform.machine(), str(_PARTS), str(made)]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _SCRIPT, "sh", *words]
        run(command, timeout=600, env=environment)
        (made / "README.fixed").write_text("libguestfs takes a folder with this file as it is\n")
        made.chmod(0o755)
        for file in made.iterdir():
            file.chmod(0o644)
        os.rename(made, target)
    for old in folder.glob("appliance-????????????????"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def _digest(kernel: Path | None, modules: Path | None) -> str:
    """Of what it is made from, by name and time."""
    paths = [*sorted(_PARTS.iterdir()), *(path for path in (kernel, modules) if path)]
    if not kernel:
        paths += sorted(Path("/boot").glob("vmlinuz-*"))
    told = "\0".join(f"{path}:{path.stat().st_mtime_ns}" for path in paths)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
