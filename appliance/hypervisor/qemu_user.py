"""Under which user libvirt on this host will run a QEMU that does not run yet."""

from __future__ import annotations

import grp
import os
import pwd
import re
from pathlib import Path

__all__ = ["qemu_user"]

_CONF = Path("/etc/libvirt/qemu.conf")
# What Debian, and what Fedora, build it with.
_DEFAULTS = ("libvirt-qemu", "qemu")


def qemu_user(uri: str, conf: Path = _CONF) -> tuple[int, int]:
    """(uid, gid) for a domain at that URI: ours, but for the system's libvirt what its `qemu.conf` says, else what the
    distribution's build has. A running domain's process tells it better."""
    if not uri.partition("://")[2].startswith("/system"):
        return os.getuid(), os.getgid()
    said = _settings(conf)
    user = _user(said.get("user", ""))
    group = _group(said.get("group", ""))
    return (user.pw_uid, user.pw_gid if group is None else group) if user is not None else (os.getuid(), os.getgid())


def _settings(conf: Path) -> dict[str, str]:
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r'^\s*(user|group)\s*=\s*"\+?([^"]*)"', text, re.MULTILINE))


def _user(name: str) -> pwd.struct_passwd | None:
    for one in (name,) if name else _DEFAULTS:
        try:
            return pwd.getpwuid(int(one)) if one.isdecimal() else pwd.getpwnam(one)
        except KeyError:
            continue
    return None


def _group(name: str) -> int | None:
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid if name else None
    except KeyError:
        return None
