"""One process at a time in a domain's block graph, whichever home it works for: all use the same names in there, and
one that lets a guest go on inside another's pause can kill it.

    /run/rewind/lock/          (root; another user: below XDG_RUNTIME_DIR, or a folder of its own among temporary files)
      domain-UUID              held by whoever works on the domain
      image-DEVICE-INODE       and on each of its disks: the same guest may be known under another UUID
      device-MAJOR-MINOR

The locks are `flock`, so they are gone the moment their holder is, however it died; the files stay, or two could hold
one. Their text names the holder; nothing decides by it. They lie beside the images and not in them: opening a block
device for writing makes udev look at it, and an image may lie where we may not write. Not excluded are users of
different names, and rewinds in containers that do not share /run.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from appliance.errors import Locked, PermissionDenied
from appliance.hypervisor.base import Domain, DomainState
from appliance.hypervisor.graph import nodes

__all__ = ["folder", "hold", "names_of", "of_domain"]

# Nodes of these drivers have a path of this host.
_LOCAL = frozenset({"file", "host_device"})
_POLL = 0.05
# Whoever looks on for a moment shall not make anybody fail.
_GLANCE = 0.3


def folder() -> Path:
    """Where the locks of this user lie on this host; made when it is not there. Raises PermissionDenied."""
    user = os.getuid()
    if user == 0:
        path = Path("/run/rewind/lock")
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "rewind" / "lock"
    else:
        path = Path(tempfile.gettempdir()) / f"rewind-lock-{user}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise PermissionDenied(url=str(path), name="the locks of this host", reason=str(error)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user:
        # Among temporary files anybody could have put something there.
        raise PermissionDenied(url=str(path), name="the locks of this host", reason="it belongs to somebody else")
    return path


def names_of(uuid: str, sources: Iterable[str]) -> tuple[str, ...]:
    """The locks of a domain with those images. Sorted, so that two who take several never wait for each other. What is
    no file or device of this host has no lock of its own."""
    found = {f"domain-{uuid}"}
    for source in sources:
        try:
            image = os.stat(source)
        except (OSError, ValueError):
            continue
        if stat.S_ISBLK(image.st_mode):
            found.add(f"device-{os.major(image.st_rdev)}-{os.minor(image.st_rdev)}")
        else:
            found.add(f"image-{image.st_dev}-{image.st_ino}")
    return tuple(sorted(found))


def of_domain(domain: Domain) -> tuple[str, ...]:
    """The locks of a domain as it is now. Works on whatever a dead process left: a running domain is asked for the
    images that it has open for writing, not for its disks. Raises what looking at the domain raises."""
    if domain.state() is DomainState.SHUTOFF:
        return names_of(domain.uuid, [disk.source for disk in domain.disks() if not disk.refusal])
    found = nodes.read(domain.monitor()).nodes.values()
    images = [one for one in found if one.driver in _LOCAL and not (one.read_only or one.ours)]
    return names_of(domain.uuid, [one.path for one in images])


@contextmanager
def hold(
    names: Sequence[str], domain: str, home: Path, purpose: str, wait: float = 0.0,
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[None]:  # fmt: skip
    """Hold all of them. Waits up to `wait` seconds, telling through `say` whom for; then raises Locked, which names the
    home and the process at work, and nothing is held. Threads of one process exclude each other as well."""
    handles = _await(names, domain, wait, say)
    try:
        _sign(handles, home, purpose)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _await(names: Sequence[str], domain: str, wait: float, say: Callable[[str], None]) -> list[int]:
    end, told = time.monotonic() + max(wait, _GLANCE), False
    while isinstance(held := _try(names), str):
        if time.monotonic() >= end:
            raise Locked(url=f"domain {domain!r}", holder=held, hint="try again when it has ended, or give --wait")
        if wait > 0 and not told:
            say(f"waiting for {held}")
            told = True
        time.sleep(_POLL)
    return held


def _try(names: Sequence[str]) -> list[int] | str:
    """The locks' descriptors; or, when one is taken, none of them and its holder in words."""
    place = folder()
    handles: list[int] = []
    for name in names:
        handle = os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        handles.append(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = _holder(handle)
            for one in handles:
                os.close(one)
            return words
    return handles


def _sign(handles: Sequence[int], home: Path, purpose: str) -> None:
    # Local, as every other time that people are shown.
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "home": str(home), "purpose": purpose, "since": now}).encode()
    for handle in handles:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)


def _holder(handle: int) -> str:
    try:
        held = json.loads(os.pread(handle, 4096, 0))
        return f"`rewind {held['purpose']}` of home {held['home']} (process {held['pid']}, since {held['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and signing it.
        return "another rewind"
