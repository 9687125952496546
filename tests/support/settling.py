"""A root of its own for the steps of `images.settle`: this machine's files under a layer that is thrown away.

    with Root(tmp_path) as root:
        root.write("/etc/hostname", "ledger\n")
        root.program("update-initramfs", "echo made >$3")
        done = root.run(plan, {"host-name": {"name": "other"}}, "identity")
        assert root.read("/etc/hostname") == "other\n"

Each run has its own mounts and host name; what it wrote stays in the layer. Devices are not this machine's: /dev and
/sys are as the test makes them.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from images.model import Plan
from images.settle.lay import lay

__all__ = ["Root"]

_RUN = """
mount -t overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" overlay "$1/root"
mount -t proc proc "$1/root/proc"
exec chroot "$1/root" /bin/sh /run/rewind/settle/run "$2"
"""


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

    def program(self, name: str, text: str) -> None:
        """A program that is found before the machine's own of that name."""
        self.write(f"/usr/local/sbin/{name}", f"#!/bin/sh\n{text}\n", 0o755)

    def hide(self, *names: str) -> None:
        """Programs of the machine that are not there."""
        for name in names:
            if (found := shutil.which(name)) is not None:
                where = self.path(os.path.realpath(found))
                where.parent.mkdir(parents=True, exist_ok=True)
                os.mknod(where, stat.S_IFCHR, os.makedev(0, 0))  # overlayfs: nothing there

    def read(self, path: str) -> str:
        return self.path(path).read_text()

    def run(self, plan: Plan, choice: Mapping[str, Mapping[str, Any]], phase: str, seed: str = "s") -> Done:
        """One phase, as the unit of systemd runs it, with a /run that is new."""
        shutil.rmtree(self.path("/run/rewind"), ignore_errors=True)
        for name, data in lay(plan, choice, seed).run.items():
            self.write(f"/run/{name}", data)
        shutil.rmtree(self.folder / "work")
        (self.folder / "work").mkdir()
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--"]
        command = [*own, "sh", "-euc", _RUN, "run", self.folder, phase]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        report = self.path("/run/rewind/settle/report")
        return Done(done.returncode, report.read_text() if report.exists() else "", done.stdout + done.stderr)


class Done:
    """What a run came to. `report` are its lines; `said` all that went to the journal."""

    def __init__(self, code: int, report: str, said: str) -> None:
        self.code, self.report, self.said = code, report.splitlines(), said

    def __repr__(self) -> str:
        return f"<{self.code}: {self.report}\n{self.said}>"
