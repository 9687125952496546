"""Proof that a fresh Debian needs nothing typed first:  ./dev soak fresh [--keep] [--verb VERB]… [RELEASE]…

For each release a new root is made by mmdebstrap with Debian's base alone, a clone of what is committed is put into it,
and `./dev demo --tiny` and `./dev test` (or the verbs given) are run there in namespaces of their own. Only how this
machine reaches its registries is carried over: name servers, certificates, settings of apt and pip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.guests import packages

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ["bookworm", "trixie"]
VERBS = ["demo --tiny --json", "test"]

_CARRIED = [
    "/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip", "/usr/local/share/ca-certificates",
    "/etc/ssl/certs/ca-certificates.crt",
]  # fmt: skip
# Without an init in there, packages must not try to start their daemons.
_POLICY = "#!/bin/sh\nexit 101\n"
# A root that is only changed to is none to the kernel: nobody may make a user namespace in it.
_ENTER = """
mount --bind "$0" "$0"
cd "$0"
mount -t proc proc proc
mount -t sysfs sys sys
mount --rbind /dev dev
mkdir -p .machine
pivot_root . .machine
exec chroot . sh -ec 'umount -l /.machine && cd /srv/rewind && exec "$@"' sh "$@"
"""


def make(release: str, root: Path) -> None:
    """A new root with nothing but the base, and the clone in it."""
    packages.bootstrap(root, release, ["apt"])
    (root / "etc/apt/sources.list").write_text("\n".join(packages.apt_sources(release)) + "\n")
    (root / "etc/apt/apt.conf.d/99machine").write_text("\n".join(_apt_settings()) + "\n")
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text(_POLICY)
    policy.chmod(0o755)
    for name in _CARRIED:
        source, target = Path(name), root / name[1:]
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(root / "srv/rewind")], check=True)


def _apt_settings() -> list[str]:
    shown = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    wanted = ("Acquire::http", "Acquire::https", "Acquire::Check-")
    return [line for line in shown.splitlines() if line.startswith(wanted)]


def run(root: Path, *command: str) -> int:
    """Run in the root with a bare environment, as in a new login of root."""
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {"PATH": path, "HOME": "/root", "TERM": "dumb"}
    return subprocess.run([*apart, "sh", "-ec", _ENTER, str(root), *command], env=environment, check=False).returncode


def prove(release: str, verbs: list[str], keep: bool) -> bool:
    """True when every verb ended well in a fresh root."""
    folder = Path(tempfile.mkdtemp(prefix=f"rewind-fresh-{release}-", dir="/var/tmp"))
    folder.chmod(0o755)
    root = folder / "root"
    good = True
    try:
        started = time.monotonic()
        make(release, root)
        print(f"fresh: {release}: base installed in {time.monotonic() - started:.0f} s: {root}", flush=True)
        for verb in verbs:
            started = time.monotonic()
            code = run(root, "./dev", *verb.split())
            print(f"fresh: {release}: ./dev {verb}: exit code {code}, {time.monotonic() - started:.0f} s", flush=True)
            good = good and code == 0
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev soak fresh", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the roots for a look")
    parser.add_argument("--verb", action="append", help=f"instead of {VERBS}")
    parser.add_argument("release", nargs="*", default=RELEASES)
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("fresh: needs root", file=sys.stderr)
        return 1
    results = [prove(release, options.verb or VERBS, options.keep) for release in options.release]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
