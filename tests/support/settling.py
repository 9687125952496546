"""A root of its own for the steps of `images.settle`: this machine's files under a layer that is thrown away.

    with Root(tmp_path) as root:
        root.write("/etc/hostname", "ledger\n")
        root.program("update-initramfs", "echo made >$3")
        done = root.run(plan, {"host-name": {"name": "other"}}, "identity")
        assert root.read("/etc/hostname") == "other\n"

Each run has its own mounts and host name; what it wrote stays in the layer. Devices are not this machine's: /dev and
/sys are as the test makes them (`settled_disk`). `debian_files` are those of real packages, for `Root.take`.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from images.model import Client, Firmware, Generator, Inventory, Layer, Plan
from images.model import Root as RootFs
from images.settle.lay import lay
from tests.guests import packages

__all__ = ["INITRD", "RELEASE", "Done", "Root", "debian_files", "plan"]

RELEASE = os.uname().release
INITRD = f"/boot/initrd.img-{RELEASE}"
_ROOT = RootFs("UUID=1", "ext4", "1", ("vda",), (Layer.PARTITION,))

_RUN = """
mount -t overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" overlay "$1/root"
mount -t proc proc "$1/root/proc"
shift
exec chroot "$0/root" "$@"
"""
# Sourced by bash before a script: counts what a shell is about to do, and is killed with all that it started instead of
# doing the one that is asked for. All but the namespace's first process, which nobody in it can kill.
_KILLER = r"""
set -T
__cut() {
    read -r __n </run/count
    __n=$((__n + 1))
    echo $__n >/run/count
    [ "$__n" -lt "$CUT" ] || { echo "$BASH_COMMAND" >/run/cut; kill -KILL -1; kill -KILL $BASHPID; }
}
trap __cut DEBUG
"""


def plan(generator: Generator = Generator.INITRAMFS_TOOLS, firmware: Firmware = Firmware.BIOS, **changes: Any) -> Plan:
    """Of a Debian that runs the kernel of this machine. `changes` are made to the plan."""
    client = Client(
        host="ledger.example.org", os_id="debian", os_name="Debian", release=RELEASE, kernel=f"/boot/vmlinuz-{RELEASE}",
        initrd=INITRD, modules=f"/lib/modules/{RELEASE}", command_line="root=UUID=1 ro", root=_ROOT,
        generator=generator, firmware=Firmware.BIOS,
    )  # fmt: skip
    target = Inventory(name="rack", source="script", firmware=firmware, devices=())
    made = Plan(client=client, inventory=target, decisions=(), load=(), command_line="root=UUID=1 ro")
    return replace(made, **changes)


def debian_files() -> Path:
    """What Debian's own packages for networks, SSH and clouds install, from the cache."""
    bookworm = packages.release() == "bookworm"
    netplan = ("netplan.io", "libnetplan0") if bookworm else ("netplan-generator", "libnetplan1")
    names = (*netplan, "cloud-init", "python3-jinja2", "python3-markupsafe", "ifupdown", "openssh-server")

    def unpack(folder: Path) -> None:
        for name in names:
            packages.unpack(name, folder / "files")

    return packages.cached(f"settle-files-{packages.release()}-2", unpack) / "files"


class Root:
    """For one thread. `folder` is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._up = folder, folder / "up"

    def __enter__(self) -> Root:
        for name in ("up", "work", "root"):
            (self.folder / name).mkdir()
        for name in ("/dev", "/sys", "/etc/network", "/etc/ssh", "/etc/NetworkManager", "/etc/systemd/network"):
            self._empty(name)
        for name in ("/dev/console", "/dev/null", "/dev/kmsg"):
            self.write(name, "")
        # The real one would wait for all of this machine's disks.
        self.program("sync", 'for one in "$@"; do [ -e "$one" ] || exit 1; done')
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _empty(self, path: str) -> None:
        """A folder with nothing of the machine below it."""
        where = self._up / path.lstrip("/")
        where.mkdir(parents=True, exist_ok=True)
        os.setxattr(where, "trusted.overlay.opaque", b"y")

    def path(self, path: str) -> Path:
        return self._up / path.lstrip("/")

    def write(self, path: str, text: str | bytes, mode: int = 0o644) -> None:
        where = self.path(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(text.encode() if isinstance(text, str) else text)
        where.chmod(mode)

    def link(self, path: str, target: str) -> None:
        where = self.path(path)
        where.parent.mkdir(parents=True, exist_ok=True)
        where.symlink_to(target)

    def program(self, name: str, text: str, shell: str = "sh") -> None:
        """A program that is found before the machine's own of that name. In one of bash `cut` can end, too."""
        self.write(f"/usr/local/sbin/{name}", f"#!/bin/{shell}\n{text}\n", 0o755)

    def hide(self, *names: str) -> None:
        """Programs of the machine that are not there."""
        for name in names:
            if (found := shutil.which(name)) is not None:
                where = self.path(os.path.realpath(found))
                where.parent.mkdir(parents=True, exist_ok=True)
                os.mknod(where, stat.S_IFCHR, os.makedev(0, 0))  # overlayfs: nothing there

    def read(self, path: str) -> str:
        return self.path(path).read_text()

    def take(self, files: Path, *names: str) -> None:
        """These files or folders of unpacked packages, at the same paths."""
        for name in names:
            source, where = files / name.lstrip("/"), self.path(name)
            where.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, where, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(source, where)

    def run(self, plan: Plan, choice: Mapping[str, Mapping[str, Any]], *phases: str, seed: str = "s") -> Done:
        """One start of the system: these phases, as the units of systemd run them, with a /run that is new. What the
        last one came to."""
        self._new_run(plan, choice, seed)
        for phase in phases:
            done = self._apart("exec", "/bin/sh", "/run/rewind/settle/run", phase)
        report = self.path("/run/rewind/settle/report")
        return Done(done.returncode, report.read_text() if report.exists() else "", done.stdout + done.stderr)

    def cut(self, plan: Plan, choice: Mapping[str, Mapping[str, Any]], phase: str, at: int) -> str:
        """The same, but all its processes are killed when the shell is about to do its command number `at`, counted
        from 1: that command, or "" when it ended before."""
        self._new_run(plan, choice, "s")
        self.write("/run/killer", _KILLER)
        self.write("/run/count", "0\n")
        self._apart("env", f"CUT={at}", "BASH_ENV=/run/killer", "bash", "/run/rewind/settle/run", phase)
        where = self.path("/run/cut")
        return where.read_text().strip() if where.exists() else ""

    def inside(self, *command: str) -> str:
        """What a command says that is run in this root."""
        done = self._apart("exec", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _new_run(self, plan: Plan, choice: Mapping[str, Mapping[str, Any]], seed: str) -> None:
        for name in ("rewind", "cut", "count", "killer"):
            where = self.path(f"/run/{name}")
            shutil.rmtree(where, ignore_errors=True) if where.is_dir() else where.unlink(missing_ok=True)
        for name, data in lay(plan, choice, seed).run.items():
            self.write(f"/run/{name}", data)

    def _apart(self, how: str, *command: str) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        (self.folder / "work").mkdir()
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--"]
        # A namespace whose first process is the shell here has one that survives `kill -1` and can tell of it.
        run = _RUN if how == "exec" else _RUN.replace("exec chroot", "chroot") + "\nexit $?"
        words = command if how == "exec" else (how, *command)
        return subprocess.run(
            [*own, "sh", "-euc", run, str(self.folder), str(self.folder), *words], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip


class Done:
    """What a run came to. `report` are its lines; `said` all that went to the journal."""

    def __init__(self, code: int, report: str, said: str) -> None:
        self.code, self.report, self.said = code, report.splitlines(), said

    def __repr__(self) -> str:
        return f"<{self.code}: {self.report}\n{self.said}>"
