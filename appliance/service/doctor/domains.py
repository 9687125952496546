"""Checks of each domain: whether its disks can be protected, and what endangers it on this QEMU."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from appliance.errors import RewindError
from appliance.hypervisor.base import Domain, DomainState
from appliance.service.doctor import known
from appliance.service.doctor.finding import Check, fail, ok, warn
from appliance.service.underway import abandoned, under_way

if TYPE_CHECKING:
    from appliance.capture.protection import Protection
    from appliance.service.session import Session

__all__ = ["check"]


def check(session: Session, only: str | None) -> Iterator[Check]:
    """Every domain at the URI, or one of them. Reverts come first: they are known without the hypervisor, and also of
    a domain that it does not know any more."""
    yield from _reverts(session, only)
    names = [only] if only else list(session.hypervisor().domains())
    for name in names:
        try:
            yield from _domain(session, session.hypervisor().domain(name) if only is None else session.domain(name))
        except RewindError as error:
            yield fail(f"domain {name}", error.message, error.hint)
    if not names:
        yield ok("domains", f"none at {session.uri}")


def _reverts(session: Session, only: str | None) -> Iterator[Check]:
    """Until it has ended the guest may be paused, and its disks alone are neither the old state nor the new one."""
    left = {one.uuid for one in abandoned(session)}
    for one in under_way(session):
        if only not in (None, one.domain, one.uuid):
            continue
        remedy = f"`rewind resume {quote(one.domain)}`"
        if one.uuid in left:
            finding = f"a revert to {one.target} is half-way and nobody goes on with it: the guest may be paused"
            yield fail(f"domain {one.domain}", finding, remedy)
        else:
            finding = f"a revert to {one.target} is under way and goes on by itself"
            yield warn(f"domain {one.domain}", finding, f"{remedy} waits for its end")


def _domain(session: Session, domain: Domain) -> Iterator[Check]:
    name = f"domain {domain.name}"
    there = session.home.instance_file.exists()
    yield from _disks(name, domain, session.record(domain.uuid) if there else None)
    if domain.managed_save():
        finding = "libvirt holds its saved memory (a managed save): no revert is possible while it does"
        remedy = f"`virsh start {domain.name}` goes on from it, `virsh managedsave-remove {domain.name}` gives it up"
        yield warn(name, finding, remedy)
    if domain.state() is DomainState.SHUTOFF:
        return
    process = domain.process()
    iothread = any(disk.iothread for disk in domain.disks())
    for one in known.defects(process.version, iothread):
        yield warn(name, f"QEMU {'.'.join(map(str, process.version))}: {one.what}", one.remedy)
    yield from _confined(name, domain, session.home.path)
    for obstacle in _obstacles(session.home.path / "run", process.uid, process.gid):
        yield fail(name, f"QEMU (user {process.uid}) cannot pass through {obstacle}", f"chmod o+x {obstacle}")
    yield from _leftovers(session, name, domain)


def _disks(name: str, domain: Domain, record: Protection | None) -> Iterator[Check]:
    """A refused disk is a failure only where it was to be protected."""
    for disk in domain.disks():
        if not disk.refusal:
            kind = (
                "its bitmap survives shutdown"
                if disk.persistent
                else "its bitmap does not survive shutdown, so the next point compares"
            )
            yield ok(name, f"{disk.target} ({disk.format} on {disk.bus or 'unknown bus'}) can be protected; {kind}")
        elif record is not None and not disk.read_only and (not record.disks or disk.target in record.disks):
            yield fail(
                name,
                f"{disk.target} cannot be protected: {disk.refusal}",
                f"`rewind protect {quote(domain.name)} --disk OTHERS`",
            )
        else:
            yield warn(
                name,
                f"{disk.target} cannot be protected: {disk.refusal}",
                "protect the other disks with --disk, or change this one",
            )


def _confined(name: str, domain: Domain, home: Path) -> Iterator[Check]:
    """Mandatory access control refuses paths that libvirt did not hand out."""
    definition = domain.definition()
    if "model='apparmor'" in definition or 'model="apparmor"' in definition:
        line = f"{home}/{{run,reverts}}/** rwk,"
        yield warn(
            name,
            f"AppArmor confines this QEMU: it must be allowed our sockets and scratch files under {home}",
            f"echo '{line}' >> /etc/apparmor.d/local/abstractions/libvirt-qemu, then restart the domain",
        )
    if "model='selinux'" in definition or 'model="selinux"' in definition:
        yield warn(
            name,
            f"SELinux confines this QEMU: our sockets and scratch files under {home} must carry its label",
            f"semanage fcontext -a -t virt_image_t '{home}/(run|reverts)(/.*)?' && restorecon -R {home}",
        )


def _obstacles(folder: Path, uid: int, gid: int) -> Iterator[Path]:
    """Folders on the way that the user may not pass through (extended attributes and ACLs are not looked at)."""
    if uid == 0:
        return
    for path in (*reversed(folder.resolve().parents), folder.resolve()):
        try:
            about = path.stat()
        except OSError:
            continue
        bit = stat.S_IXUSR if about.st_uid == uid else stat.S_IXGRP if about.st_gid == gid else stat.S_IXOTH
        if not about.st_mode & bit:
            yield path


def _leftovers(session: Session, name: str, domain: Domain) -> Iterator[Check]:
    """Nodes of ours in the graph although nobody works on the domain. A tap that runs is none."""
    from appliance.hypervisor.graph import tap
    from appliance.hypervisor.graph.base import leftovers

    if session.busy(domain.uuid) or any(one.uuid == domain.uuid for one in under_way(session)):
        return
    monitor = domain.monitor()
    found = leftovers(monitor)
    taps = [one for one in found if one.startswith(tap.TAP)]
    if taps and tap.TapState.RUNNING in tap.state(monitor, domain.disks()).values():
        found = [one for one in found if one not in taps]
    if found:
        # Taps are left to whoever captures; stepping aside takes them out.
        typed = quote(domain.name)
        aside = f"`rewind pause {typed}`, then `rewind pause {typed} --end`"
        remedy = aside if taps else f"`rewind point {typed}`"
        yield warn(name, f"left over from an interrupted point: {', '.join(map(str, found))}", remedy)
