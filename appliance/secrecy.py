"""Memory that holds somebody's passphrase: it must not reach this host's swap, nor a core dump.

    guard                this process from now on; before the passphrase is read
    swaps                whether this host has any swap: without it nothing has to be locked
    let_children_lock    for children that lose their privileges before they read it

A lock is of one process: it ends with `exec`, and a fork has none. What it cannot keep: an image of the whole memory,
which hibernation writes, and a hypervisor's below this host.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from appliance.errors import ConfigError

__all__ = ["guard", "let_children_lock", "swaps"]

_SWAPS = Path("/proc/swaps")
_CURRENT, _FUTURE, _ON_FAULT = 1, 2, 4
_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)


def swaps() -> bool:
    """Also where nobody can tell."""
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except OSError:
        return True


def guard() -> None:
    """No page of this process goes to swap and no core dump is written of it, whatever the system does with those.

    Raises ConfigError where this host has swap and the kernel does not let us lock memory: then nothing secret may be
    read. May be repeated.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A program that takes core dumps by a pipe gets them whatever the limit is.
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if _libc.mlockall(_CURRENT | _FUTURE | _ON_FAULT) != 0 and swaps():
        raise _refusal(os.strerror(ctypes.get_errno()))


def let_children_lock() -> None:
    """Children without privileges may lock as much as they like. Raises ConfigError when we may not grant that."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError) as error:
        raise _refusal("nobody may lock enough memory here") from error


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        reason=f"a passphrase could get into this host's swap: {reason}",
        hint="run it as root, or without swap: `swapoff -a`",
    )
