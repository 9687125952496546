"""A libvirt daemon of our own, started by hand in the private world.

    python -m tests.support.libvirt      starts it anew, and returns once it answers: `systemctl restart libvirtd`

Debian 12 and 13 both ship the monolithic `libvirtd`. It runs without systemd when it is given a log daemon first.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.support import world
from tests.support.limits import limit

__all__ = ["URI", "start", "stop", "virsh"]

URI = "qemu:///system"

_SOCKET = Path("/run/libvirt/libvirt-sock")
_LOG_PID = Path("/run/libvirt/test-virtlogd.pid")
_OWN_PID = Path("/run/libvirt/test-libvirtd.pid")


def start(timeout: float = 60.0) -> str:
    """Start virtlogd and libvirtd unless they run; returns the URI once libvirt answers. Guests are not touched."""
    world.require()
    if not _alive(_LOG_PID):
        _daemon("virtlogd", _LOG_PID)
    if not _alive(_OWN_PID):
        _daemon("libvirtd", _OWN_PID)
    deadline = time.monotonic() + timeout
    while True:
        answer = virsh("version", check=False)
        if answer.returncode == 0:
            return URI
        if time.monotonic() > deadline:
            log = Path("/var/log/libvirt/libvirtd.log")
            tail = log.read_text()[-2000:] if log.exists() else "(no log)"
            raise RuntimeError(f"libvirt does not answer: {answer.stderr.strip()}\n{tail}")
        time.sleep(0.1)


def stop(timeout: float = limit(20)) -> None:
    """End libvirtd but not its guests, like `systemctl stop`; `start` again finds them."""
    pid = _read(_OWN_PID)
    if pid is None or not _alive(_OWN_PID):
        return
    subprocess.run(["kill", "-TERM", str(pid)], check=False)
    deadline = time.monotonic() + timeout
    while _alive(_OWN_PID):
        if time.monotonic() > deadline:
            raise RuntimeError(f"libvirtd (pid {pid}) does not end")
        time.sleep(0.05)
    _SOCKET.unlink(missing_ok=True)


def virsh(*words: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run virsh against our daemon, as an admin would."""
    return subprocess.run(
        ["virsh", "-q", "-c", URI, *words], check=check, capture_output=True, text=True, timeout=timeout
    )


def _daemon(name: str, pid_file: Path) -> None:
    # `-d` returns when the daemon has its sockets. Its files go to the private /run/libvirt, so that a libvirtd of the
    # machine keeps its own /run/libvirtd.pid.
    log = Path(f"/run/libvirt/test-{name}.log")
    with log.open("w") as out:
        done = subprocess.run([name, "-d", "-p", str(pid_file)], stdout=out, stderr=out, check=False, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")


def _read(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text())
    except (OSError, ValueError):
        return None


def _alive(pid_file: Path) -> bool:
    pid = _read(pid_file)
    if pid is None:
        return False
    try:
        # A zombie still has a folder in /proc; it counts as ended.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    stop()
    start()
