"""Debian packages unpacked without installing them: kernels and programs for guests.

The packages come from wherever this machine's apt takes its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support.world import cache_folder

__all__ = [
    "apt_sources", "bootstrap", "cached", "in_root", "kernel_package", "release", "sources_digest", "unpack", "version",
]  # fmt: skip


def release() -> str:
    """Code name of this Debian."""
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip('"')
    raise RuntimeError("this is not a Debian release: no VERSION_CODENAME in /etc/os-release")


def kernel_package(flavour: str) -> str:
    """Name of the package that `linux-image-<flavour>` stands for now."""
    shown = _apt("apt-cache", "depends", f"linux-image-{flavour}")
    found = re.search(r"Depends: (linux-image-\S+)", shown)
    if not found:
        raise RuntimeError(f"linux-image-{flavour} depends on no kernel package:\n{shown}")
    return found.group(1)


def version(package: str) -> str:
    """The newest version of a package that apt knows."""
    found = re.search(r"^Version: (\S+)$", _apt("apt-cache", "show", "--no-all-versions", package), re.MULTILINE)
    if not found:
        raise RuntimeError(f"apt tells no version of {package}")
    return found.group(1)


def unpack(package: str, into: Path) -> None:
    """Download a package (its name, or NAME=VERSION) and unpack it into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        # apt would drop its privileges and then cannot write into a folder of root.
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
        _apt(*command, cwd=scratch)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(into)], check=True)


def apt_sources(wanted: str) -> list[str]:
    """Lines of a sources.list for the release `wanted`, with this machine's own mirrors of Debian."""
    here = release()
    lines = []
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    for found in sorted(set(_apt("apt-get", "indextargets", "--format", form, "Identifier: Packages").splitlines())):
        origin, uri, suite, component = found.split("|")
        if origin == "Debian" and component == "main" and suite.split("-")[0] == here:
            lines.append(f"deb {uri} {suite.replace(here, wanted, 1)} main")
    if not lines:
        raise RuntimeError("this machine's apt knows no mirror of Debian")
    return lines


def bootstrap(root: Path, wanted: str, install: Iterable[str], left_out: Iterable[str] = ()) -> None:
    """A new Debian root of the release `wanted` with these packages and what they depend on, nothing recommended."""
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(install)}"]
    command += ["--aptopt=APT::Install-Recommends false"]
    command += [f"--dpkgopt=path-exclude=/{pattern}" for pattern in left_out]
    done = subprocess.run([*command, wanted, str(root), *apt_sources(wanted)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"mmdebstrap {wanted}: {done.stderr[-3000:]}")


def in_root(root: Path, *command: str) -> None:
    """Run a command inside another root, with /proc and /dev but apart from this machine's processes and mounts."""
    script = 'mount --bind "$0" "$0"; cd "$0"; mount -t proc proc proc; mount --rbind /dev dev; exec chroot . "$@"'
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root"}
    done = subprocess.run(
        [*apart, "sh", "-ec", script, str(root), *command], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} in {root}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def sources_digest(paths: Iterable[Path], *extra: str) -> str:
    """Names what was built from these files on this Debian, so that a changed source is built anew."""
    digest = hashlib.sha256(release().encode())
    for path in paths:
        digest.update(path.read_bytes())
    digest.update("\0".join(extra).encode())
    return digest.hexdigest()[:12]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the guests' cache; `build(folder)` fills it when it is not there.

    It appears whole or not at all, and two runs at once build it once. Older builds of the same guest are removed: a
    name is GUEST-DIGEST.
    """
    guests = cache_folder() / "guests"
    guests.mkdir(parents=True, exist_ok=True)
    target = guests / name
    kind = name.rsplit("-", 1)[0]
    if target.exists():
        return target
    with (guests / f".{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=guests))
            try:
                build(scratch)
                scratch.chmod(0o755)
                for old in guests.glob(f"{kind}-????????????"):
                    shutil.rmtree(old, ignore_errors=True)
                os.rename(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


def _apt(*command: str, cwd: str | None = None) -> str:
    for attempt in (1, 2):
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
        if attempt == 1:
            # Fresh machines have no package lists, and old lists name packages that are gone.
            subprocess.run(["apt-get", "-q", "update"], check=False, capture_output=True)
    raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or 'says nothing'}")
