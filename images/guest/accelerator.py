"""Whether libguestfs' virtual machine runs by KVM or is emulated.

libguestfs looks for KVM whatever it is told (its probe has `accel=kvm:tcg`), and uses what it finds. So it is decided
here: a cage shows /dev/kvm, or it has none. The device is looked at and never opened by us.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from appliance.errors import ToolFailed
from images.guest.confine import NOBODY

__all__ = ["kvm_group"]

_KVM = Path("/dev/kvm")
_DEVICE = (10, 232)  # Linux, Documentation/admin-guide/devices.txt
_OTHERS, _GROUP = 0o006, 0o060


def kvm_group(accelerator: str) -> int | None:
    """The group in which the user nobody may open /dev/kvm; None: emulate. `auto` is KVM where it can be used, `tcg`
    never looks for it, `kvm` raises ToolFailed where it cannot be used."""
    if accelerator == "tcg":
        return None
    group = _usable()
    if group is None and accelerator == "kvm":
        raise ToolFailed(
            tool="the reader of guests", reason=f"{_KVM} is not there, or not for its group",
            hint="set `accelerator: auto` in rewind.yaml",
        )  # fmt: skip
    return group


def _usable() -> int | None:
    """Root goes into the cage as nobody, so its own rights do not count."""
    try:
        found = os.stat(_KVM)
    except OSError:
        return None
    if not stat.S_ISCHR(found.st_mode) or (os.major(found.st_rdev), os.minor(found.st_rdev)) != _DEVICE:
        return None
    if os.getuid():
        return os.getgid() if os.access(_KVM, os.R_OK | os.W_OK) else None
    if found.st_mode & _OTHERS == _OTHERS:
        return NOBODY
    return found.st_gid or None if found.st_mode & _GROUP == _GROUP else None
