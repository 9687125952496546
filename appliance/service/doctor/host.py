"""Checks of the host and of this instance: what every domain depends on."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from appliance.errors import RewindError, WrongKey
from appliance.process import run
from appliance.service import keys
from appliance.service.doctor import known
from appliance.service.doctor.finding import Check, fail, ok, warn
from appliance.service.locks import daemon_lock
from appliance.store.backend.place import NEARLY_NOTHING, folder_of, on_this_host
from appliance.units import GiB, format_duration, format_size

if TYPE_CHECKING:
    from appliance.service.session import Session

__all__ = ["CHECKS", "FOR_EACH_DOMAIN", "WITHOUT_HOME"]

# Below the first a long epoch may fill the disk; below the second the next small one will.
_LITTLE = 5 * GiB
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def home(session: Session) -> Iterator[Check]:
    """That there is one, whose it is, and that its secrets are secret."""
    path = session.home.path
    if not session.home.instance_file.exists():
        yield fail("home", f"{path} is not a home of rewind", f"`rewind --home {quote(str(path))} init`")
        return
    session.instance  # noqa: B018  raises when it cannot be read
    for private in (session.home.instance_file, session.home.domains, session.home.cache, session.home.log):
        mode = stat.S_IMODE(private.stat().st_mode)
        if mode & 0o077:
            yield warn("home", f"{private} can be entered or read by others (mode {mode:o})", f"chmod go= {private}")
    owner = path.stat().st_uid
    if owner != os.geteuid():
        yield fail("home", f"{path} belongs to user {owner}, not to us ({os.geteuid()})", "run rewind as its owner")
    else:
        yield ok("home", f"{path}, ours")


def settings(session: Session) -> Iterator[Check]:
    """Raises ConfigError, which is the finding."""
    session.settings  # noqa: B018
    yield ok("settings", "readable, no unknown key")


def key(session: Session) -> Iterator[Check]:
    """A lost key loses everything, so a copy elsewhere is part of being protected."""
    if not session.instance.get("encrypted", True):
        yield warn("key", "the repository is not encrypted", "a new repository is, unless --no-encryption is given")
        return
    path = keys.key_path(session)
    if not path.exists():
        yield fail("key", f"{path} does not exist: no point can be read", f"put the exported key there as {path}")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield warn("key", f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
    try:
        session.repository  # noqa: B018  the only proof that it is the right key
    except WrongKey as error:
        yield fail("key", error.message, error.hint)
        return
    except RewindError:
        pass  # told by the check of the repository; nothing is wrong with the key as far as anybody knows
    if not keys.was_exported(session):
        yield warn("key", "no copy of the key was ever made: with this disk every point would be lost",
                   "`rewind key export FILE`, and keep FILE away from this host")  # fmt: skip
    else:
        yield ok("key", f"{path}, exported before")


def repository(session: Session) -> Iterator[Check]:
    """That it opens with our key, and can be listed."""
    began = time.monotonic()
    try:
        session.repository  # noqa: B018
    except WrongKey:
        if session.instance.get("encrypted", True):
            return  # told by the check of the key
        raise
    count = sum(session.catalogue.count().values())
    took = format_duration(time.monotonic() - began)
    url = str(session.instance["url"])
    yield ok("repository", f"{url} opens, {count} points listed in {took}")
    if kind := on_this_host(url):
        yield warn(
            "repository", f"{url} is on this host ({kind}): what takes the host takes every point with it",
            "keep a copy of that folder elsewhere, or begin in another home: `rewind --home DIR init --repository URL`"
            " with a folder of a network file system or s3://…",
        )  # fmt: skip


def space(session: Session) -> Iterator[Check]:
    """Of the home (scratch files, cache, patches) and of a repository in a folder."""
    places = {"home": session.home.path}
    folder = folder_of(str(session.instance.get("url", "")))
    if folder is not None and folder.is_dir() and folder.stat().st_dev != places["home"].stat().st_dev:
        places["repository"] = folder
    for name, path in places.items():
        free = shutil.disk_usage(path).free
        text = f"{format_size(free)} free at {path}"
        if free < NEARLY_NOTHING:
            yield fail("space", f"only {text} ({name})", "make room: `rewind forget`, then `rewind gc`")
        elif free < _LITTLE:
            yield warn("space", f"only {text} ({name})", "make room: `rewind forget`, then `rewind gc`")
        else:
            yield ok("space", f"{text} ({name})")


def clock(session: Session) -> Iterator[Check]:
    """Points are found by their time, so a wrong clock leads to wrong points. Why there are none to compare with is
    told by others."""
    points = session.catalogue.points(measure=False) if session.opened else []
    newest = max((one.time for one in points), default=None)
    ahead = (newest - datetime.now(UTC)).total_seconds() if newest else 0
    if ahead > 1:
        yield warn("clock", f"the newest point lies {format_duration(ahead)} in the future: the clock was set back",
                   "name points by id until the clock has caught up")  # fmt: skip
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(ctypes.create_string_buffer(512)) == _TIME_ERROR:
        yield warn("clock", "the clock is not synchronised", "apt install systemd-timesyncd (or chrony)")
    elif ahead <= 1:
        yield ok("clock", "synchronised")


def tools(_session: Session) -> Iterator[Check]:
    """The parts that we start."""
    wanted = {
        "nbdkit": (["nbdkit", "--version"], "nbdkit"),
        "nbdkit's Python plugin": (["nbdkit", "python", "--dump-plugin"], "nbdkit-plugin-python"),
        "qemu-storage-daemon": (["qemu-storage-daemon", "--version"], "qemu-system-common"),
        "qemu-img": (["qemu-img", "--version"], "qemu-utils"),
    }
    for name, (argv, package) in wanted.items():
        try:
            said = run(argv, timeout=10).strip().splitlines()[0]
        except (RewindError, OSError, IndexError):
            yield fail("tools", f"{name} cannot be run", f"apt install {package}")
        else:
            yield ok("tools", f"{name} can be loaded" if "plugin" in name else said.partition(" (")[0])
    try:
        import appliance.nbd  # noqa: F401
    except ImportError as error:
        yield fail("tools", f"libnbd's Python binding is missing: {error}", "apt install python3-libnbd")


def hypervisor(session: Session) -> Iterator[Check]:
    """That somebody answers at the URI, and in a version that we know."""
    versions = session.hypervisor().versions()
    if not versions:
        yield warn("hypervisor", f"QEMU does not run at {session.uri}", "start it, or look with the domain shut off")
    for name, minimum in (("qemu", known.MINIMUM_QEMU), ("libvirt", known.MINIMUM_LIBVIRT)):
        if name not in versions:
            continue
        text = ".".join(map(str, minimum[:2]))
        if known.parse(versions[name]) < minimum:
            yield fail("hypervisor", f"{name} {versions[name]} is older than {text}", f"use {name} {text} or newer")
        else:
            yield ok("hypervisor", f"{name} {versions[name]} at {session.uri}")


def fence(session: Session) -> Iterator[Check]:
    """The hook that keeps a domain from starting on a half-way disk; a revert needs it, a point does not."""
    from appliance.restore.fence import status

    if session.uri.startswith("qmp:"):
        yield ok("fence", "a bare QEMU is started by hand: only the image lock keeps it from a half-way disk")
        return
    found = status(session.home, Path(session.settings.hook_directory))
    if found.installed and found.active:
        yield ok("fence", f"libvirt runs our hook {found.path}")
    else:
        state = "is installed, but libvirt does not run it yet" if found.installed else "is not installed"
        yield warn("fence", f"the hook that reverts need {state}", found.remedy)


def image_reader(session: Session) -> Iterator[Check]:
    """What reads guests that are not on ext4, for whoever makes images; that it is not there hinders nobody else."""
    from appliance.service.image import readers

    found = readers.shown(session)
    remedy = "`rewind image reader build`"
    if found is None:
        yield ok("image reader", f"not built: no images of guests on xfs, btrfs, LUKS or md ({remedy})")
    elif found.unfit:
        yield warn("image reader", f"the one that was built is {found.unfit}", remedy)
    elif newer := readers.newer_kernel(found):
        yield warn("image reader", f"its kernel is {found.kernel}, and this host has {newer}", remedy)
    else:
        yield ok("image reader", f"for xfs, btrfs, LUKS and md, with kernel {found.kernel}")


def daemon(session: Session) -> Iterator[Check]:
    """Whether somebody takes the points that were scheduled, and starts capture again after the host."""
    from appliance.capture import protection

    records = protection.all_records(session.home)
    scheduled = [one.domain for one in records if one.every]
    continuous = [one.domain for one in records if one.continuous]
    if session.daemon_runs():
        if unit := _takes_all_along(session):
            yield warn(
                "daemon", f"whenever {unit} is stopped or restarted what records writes and what guests read from ends",
                f"systemctl edit {unit}, and put KillMode=process into its [Service]",
            )  # fmt: skip
        if both := dict.fromkeys(scheduled + continuous):
            yield ok("daemon", f"runs, for {', '.join(both)}")
        return
    if scheduled:
        yield warn(
            "daemon", f"does not run: nobody takes the scheduled points of {', '.join(scheduled)}", "`rewind daemon`"
        )
    if continuous:
        reason = "does not run: after the host, or the process that captures, has ended nobody starts it again for"
        yield warn("daemon", f"{reason} {', '.join(continuous)}", "`rewind daemon`")


def _takes_all_along(session: Session) -> str:
    """The unit of systemd that ends the daemon with all that it has started; empty when there is none."""
    with suppress(RewindError, OSError):
        group = Path(f"/proc/{daemon_lock(session.home).read_text()}/cgroup").read_text().rpartition("::")[2].strip()
        unit = group.rpartition("/")[2]
        if group.startswith("/system.slice/") and unit.endswith(".service"):
            mode = run(["systemctl", "show", "--property=KillMode", "--value", unit], timeout=10).strip()
            return unit if mode in ("control-group", "mixed") else ""
    return ""


CHECKS = (home, settings, key, repository, space, clock, tools, hypervisor, fence, daemon, image_reader)
# Nothing of a domain is protected without these, so they are looked at also when one domain is named.
FOR_EACH_DOMAIN = (key, repository)
# What can be looked at before there is a home: a new user's first question is whether this host will do.
WITHOUT_HOME = (home, settings, tools, hypervisor, fence)
