"""Every error that Rewind raises, and the exit code of each.

    RewindError                     2
      ConfigError                   3   a setting or argument that makes no sense
      ToolFailed                    4   a program that we run did not do its work
      NbdFailed                     5   an NBD server refused a request or went away; `errno` is its own
      Interrupted                 130
      HypervisorError              10
        ConnectError               11   nobody answers at the URI or socket
        DomainNotFound             12
        DiskNotFound               13
        AgentUnavailable           14   quiesce was required and the guest agent does not answer
        NotSupported               15   this disk or domain cannot be protected, with the reason
        MonitorError               16   QEMU refused a command
        DomainBusy                 17   somebody else's job or backup is in the way: try again later
        DomainLost                 18   QEMU went away while we were talking to it
        LeftPaused                 19   the guest was not resumed: its device is not on its own disk
      CaptureError                 20
        PushFailed                 21   the epoch did not reach the intake; its changes are kept for the next one
        NotProtected               22
        AlreadyProtected           23
      StoreError                   30   (30 is also: there is no repository)
        RepositoryNotFound         30
        Locked                     31
        IntegrityError             32
        WrongKey                   33   the key is missing or is not this repository's
        ObjectNotFound             34
        AlreadyExists              35
        Temporary                  36   worth another try
        NoSpace                    37
        PermissionDenied           38
        VersionUnsupported         39
      TimelineError                40
        NoSuchPoint                41
        InGap                      42   that time was not captured
        AmbiguousPoint             43
        NotRecoverable             44
        JournalError               45   the journal of a tap refused a request
          SegmentCorrupt           46
          SequenceMissing          47   the journal does not hold that write any more, or not yet
          JournalSilent            48   the process that writes a journal does not answer
      RestoreError                 50
        RevertUnderWay             51
        NothingToUndo              52
        NothingToResume            53
        FenceError                 54
        TargetExists               55
        NotConfirmed               56
      ImageError                   60   a bootable image cannot be made, with the reason
        NoSuchTarget               61
        NoSuchTemplate             62
        BadInventory               63   a target's description is wrong; the field is named
        DriversMissing             64   no driver for hardware that has to work; nothing was written
        GuestUnreadable            65   what the point holds cannot be read or is not a system that we know
        NotSigned                  66   Secure Boot would refuse it
        NotBooted                  67   a point was booted as a test and did not come up
        NotForWindows              69   a Windows cannot be brought up on that hardware; nothing was written

Classes are named for what the caller can do. A class holds a template; the fields fill it, stay readable on the
exception, and go into the JSON form. Messages are lower case, name the object and the value, and have no full stop.
"""

from __future__ import annotations

import errno
import os
import shlex
from typing import Any, ClassVar

__all__ = [
    "AgentUnavailable", "AlreadyExists", "AlreadyProtected", "AmbiguousPoint", "BadInventory", "CaptureError",
    "ConfigError", "ConnectError", "DiskNotFound", "DomainBusy", "DomainLost", "DomainNotFound", "DriversMissing",
    "FenceError", "GuestUnreadable", "HypervisorError", "ImageError", "InGap", "IntegrityError", "Interrupted",
    "JournalError", "JournalSilent", "LeftPaused", "Locked", "MonitorError", "NbdFailed", "NoSpace", "NoSuchPoint",
    "NoSuchTarget", "NoSuchTemplate", "NotBooted", "NotConfirmed", "NotForWindows", "NotProtected", "NotRecoverable",
    "NotSigned",
    "NotSupported", "NothingToResume", "NothingToUndo", "ObjectNotFound", "PermissionDenied", "PushFailed",
    "RepositoryNotFound", "RestoreError", "RevertUnderWay", "RewindError", "SegmentCorrupt", "SequenceMissing",
    "StoreError", "TargetExists", "Temporary", "TimelineError", "ToolFailed", "VersionUnsupported", "WrongKey",
    "exit_codes", "of_the_system",
]  # fmt: skip


class RewindError(Exception):
    """Root of the tree. `fields` fill the class's template; `hint` says what the operator can do."""

    exit_code: ClassVar[int] = 2
    template: ClassVar[str] = "{reason}"
    default_hint: ClassVar[str] = ""

    def __init__(self, *, hint: str = "", **fields: Any) -> None:
        self.fields = fields
        self.hint = hint or _filled(self.default_hint, fields)
        super().__init__(self.template.format_map(_Filling(fields)))

    @property
    def message(self) -> str:
        """One sentence that names the object and the value."""
        return str(self)

    @property
    def id(self) -> str:
        """The class's name in kebab case: stable, for programs that read `--json`."""
        name = type(self).__name__
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only arguments do not survive pickling otherwise, and child processes send them.
        return _rebuild, (type(self), self.hint, self.fields)


class _Filling(dict[str, Any]):
    """A field that was forgotten shows as `?`: an error about an error would hide the first one."""

    def __missing__(self, key: str) -> str:
        return "?"


def _filled(hint: str, fields: dict[str, Any]) -> str:
    """What stands in a command is typed as it is, whatever a name has in it."""
    typed = {name: shlex.quote(value) if isinstance(value, str) else value for name, value in fields.items()}
    pieces = enumerate(hint.split("`"))
    return "`".join(piece.format_map(_Filling(typed if number % 2 else fields)) for number, piece in pieces)


def _rebuild(kind: type[RewindError], hint: str, fields: dict[str, Any]) -> RewindError:
    return kind(hint=hint, **fields)


class ConfigError(RewindError):
    exit_code = 3


class ToolFailed(RewindError):
    exit_code = 4
    template = "{tool} failed: {reason}"


class NbdFailed(RewindError):
    exit_code = 5
    template = "{operation} of {length} bytes at {offset} of NBD export {export!r} failed: {reason}"


class Interrupted(RewindError):
    exit_code = 130
    template = "interrupted: {reason}"


class HypervisorError(RewindError):
    exit_code = 10


class ConnectError(HypervisorError):
    exit_code = 11
    template = "cannot connect to {uri}: {reason}"
    default_hint = "is libvirtd (or virtqemud) running, or the QEMU that is meant, and may this user use it?"


class DomainNotFound(HypervisorError):
    exit_code = 12
    template = "no domain {domain!r} at {uri}"
    default_hint = "`rewind status --all` lists the domains there"


class DiskNotFound(HypervisorError):
    exit_code = 13
    template = "domain {domain!r} has no disk {disk!r}; it has {disks}"


class AgentUnavailable(HypervisorError):
    exit_code = 14
    template = "the guest agent of {domain!r} does not freeze file systems: {reason}"
    default_hint = "install qemu-guest-agent in the guest, or use --quiesce auto"


class NotSupported(HypervisorError):
    exit_code = 15
    template = "{object}: {reason}"


class MonitorError(HypervisorError):
    """QEMU answered a command with an error. `error_class` and `reason` are QEMU's own words."""

    exit_code = 16
    template = "QEMU of {domain!r} refused {command}: {reason}"


class DomainBusy(HypervisorError):
    exit_code = 17
    template = "{domain!r} is busy: {reason}"
    default_hint = "try again when it has ended"


class DomainLost(HypervisorError):
    exit_code = 18
    template = "QEMU of {domain!r} went away: {reason}"


class LeftPaused(HypervisorError):
    """Going on would lose what the guest writes, so it waits for a person."""

    exit_code = 19
    template = "{domain!r} stays paused: {disk} is not on its own disk image, {reason}"
    default_hint = "`rewind resume {domain}` tries again; shutting it off by force is safe for the disk"


class CaptureError(RewindError):
    exit_code = 20


class PushFailed(CaptureError):
    exit_code = 21
    template = "the epoch of {domain!r} did not complete on {disk}: {reason}"
    default_hint = "nothing is lost: the next point takes these changes too"


class NotProtected(CaptureError):
    exit_code = 22
    template = "domain {domain!r} is not protected"
    default_hint = "`rewind protect {domain}` begins"


class AlreadyProtected(CaptureError):
    exit_code = 23
    template = "domain {domain!r} is already protected"


class StoreError(RewindError):
    exit_code = 30


class RepositoryNotFound(StoreError):
    exit_code = 30
    template = "no repository at {url}"
    # Not `rewind init`: whoever looks for a repository knows of one there, and a new one would hide its points.
    default_hint = "is it mounted, or reachable?"


class Locked(StoreError):
    exit_code = 31
    template = "{url} is locked by {holder}"
    default_hint = "wait for it; a lock whose holder died is taken over after {stale}"


class IntegrityError(StoreError):
    exit_code = 32
    template = "{object} is damaged: {reason}"
    default_hint = "`rewind check` names everything that is affected"


class WrongKey(StoreError):
    exit_code = 33
    template = "{url}: {reason}"
    default_hint = "put a copy of the right key in its place: `rewind key export` made it"


class ObjectNotFound(StoreError):
    exit_code = 34
    template = "{url} has no object {name!r}"


class AlreadyExists(StoreError):
    exit_code = 35
    template = "{url} already has {name!r}"


class Temporary(StoreError):
    """Worth another try; the retrying backend does so before anyone sees it."""

    exit_code = 36
    template = "{url} does not answer properly for {name!r}: {reason}"


class NoSpace(StoreError):
    exit_code = 37
    template = "no space left at {url} for {name!r}"
    default_hint = "`rewind forget` and `rewind gc` free space, or make it larger; nothing that was stored is affected"


class PermissionDenied(StoreError):
    exit_code = 38
    template = "no permission at {url} for {name!r}: {reason}"


class VersionUnsupported(StoreError):
    exit_code = 39
    template = "{object} has format version {version}, this program reads up to {supported}"
    default_hint = "use a newer rewind"


class TimelineError(RewindError):
    exit_code = 40


class NoSuchPoint(TimelineError):
    exit_code = 41
    template = "{domain!r} has no recovery point {when!r}"
    default_hint = "`rewind points {domain}` lists them"


class InGap(TimelineError):
    exit_code = 42
    template = "{when} of {domain!r} was not captured: {reason}"
    default_hint = "nearest: {nearest}"


class AmbiguousPoint(TimelineError):
    exit_code = 43
    template = "{when!r} names {count} recovery points of {domain!r}: {candidates}"
    default_hint = "give the id of the one that you mean"


class NotRecoverable(TimelineError):
    exit_code = 44
    template = "point {point} cannot be recovered: {reason}"


class JournalError(TimelineError):
    exit_code = 45


class SegmentCorrupt(JournalError):
    exit_code = 46
    template = "segment {path} is damaged at byte {position}: {reason}"
    default_hint = "everything before that record can be used"


class SequenceMissing(JournalError):
    exit_code = 47
    template = "the journal in {path} does not hold write {sequence}: {reason}"


class JournalSilent(JournalError):
    """`reason` is the system's word; nothing is known about whether the request was done."""

    exit_code = 48
    template = "the journal at {socket} does not answer: {reason}"


class RestoreError(RewindError):
    exit_code = 50


class RevertUnderWay(RestoreError):
    exit_code = 51
    template = "a revert of {domain!r} to {point} is under way"
    default_hint = "`rewind resume {domain}` ends it"


class NothingToUndo(RestoreError):
    exit_code = 52
    template = "{domain!r} has no revert that could be undone"
    default_hint = "what a revert kept first is a point with the reason `safety`: `rewind points {domain}` lists them"


class NothingToResume(RestoreError):
    exit_code = 53
    template = "no revert of {domain!r} is under way"


class FenceError(RestoreError):
    exit_code = 54
    template = "cannot keep {domain!r} from starting on a half-way disk: {reason}"
    default_hint = "`rewind doctor` tells how the libvirt hook is installed; nothing was changed"


class TargetExists(RestoreError):
    exit_code = 55
    template = "{path} already exists"
    default_hint = "name another path, or remove it first"


class NotConfirmed(RestoreError):
    exit_code = 56
    template = "{action} was not confirmed"


class ImageError(RewindError):
    exit_code = 60


class NoSuchTarget(ImageError):
    exit_code = 61
    template = "there is no target {target!r}"
    default_hint = "`rewind image target list` lists them, `rewind image target add` adds one"


class NoSuchTemplate(ImageError):
    exit_code = 62
    template = "there is no template {called}"
    default_hint = "`rewind image template build` makes one"


class BadInventory(ImageError):
    exit_code = 63
    template = "target {target!r}: {field}: {reason}"


class DriversMissing(ImageError):
    exit_code = 64
    template = "kernel {release} of {host!r} has no driver for {devices} of target {target!r}"
    default_hint = "add the driver package of exactly that release: `rewind image drivers add`; nothing was written"


class GuestUnreadable(ImageError):
    exit_code = 65
    template = "{what} cannot be read: {reason}"


class NotSigned(ImageError):
    exit_code = 66
    template = "target {target!r} starts only what is signed, and {what} is not"
    default_hint = "nothing was switched off; see `rewind image plan` for what can be signed and how"


class NotSettled(ImageError):
    exit_code = 68
    template = "domain {name!r} has not settled: {reason}"


class NotForWindows(ImageError):
    exit_code = 69
    template = "{product} of the point cannot be brought up on target {target!r}: {reasons}"
    default_hint = "`rewind image plan` tells each driver; nothing was written"


class NotBooted(ImageError):
    exit_code = 67
    template = "point {point} of {domain!r} did not boot: {reason}"
    default_hint = "`rewind image evidence` has its console and its screen"


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, id, message template) of every class, ascending; `rewind help exit-codes` prints it."""
    found: list[tuple[int, str, str]] = []
    waiting: list[type[RewindError]] = [RewindError]
    while waiting:
        kind = waiting.pop()
        # A private refinement somewhere else is told as what it refines.
        waiting += [one for one in kind.__subclasses__() if one.__module__ == __name__]
        name = "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("-")
        found.append((kind.exit_code, name, kind.template))
    return sorted(found)


_FULL = (errno.ENOSPC, errno.EDQUOT)
# Only with a path: what no path was named for, the owner of the home may do, and it is a bug more often.
_FORBIDDEN = (errno.EACCES, errno.EPERM)
# Of a path that somebody has named, or of the disk below it. Not that there is nothing: that is a bug more often.
_UNUSABLE = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE)


def of_the_system(error: OSError) -> RewindError | None:
    """What the system refused, as an error of ours that names the path; None for what is a bug, as far as we know."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""  # or a number
    reason = (error.strerror or "refused").lower()
    if error.errno in _FULL:
        return NoSpace(url="this host", name=path or "a file")
    if error.errno == errno.EROFS or error.errno in _FORBIDDEN and path:
        return _forbidden(error.errno == errno.EROFS, path, reason)
    if error.errno in _UNUSABLE and path:
        # What is at fault is the path, or what lies above it.
        seen = path if os.path.lexists(path) else os.path.dirname(path) or "."
        hint = f"`stat {shlex.quote(seen)}` tells what is there"
        return ConfigError(reason=f"{path!r} cannot be used: {reason}", hint=hint)
    return None


def _forbidden(to_all: bool, path: str, reason: str) -> RewindError:
    """`to_all`: no other user could do it either."""
    if not path:  # a kernel that has met errors does that to files that are open
        hint = "`findmnt -O ro` tells what is mounted so"
        return PermissionDenied(url="this host", name="a file", reason=reason, hint=hint)
    folder = os.path.dirname(path) or "."
    hint = f"`findmnt -T {shlex.quote(folder)}` tells how that is mounted"
    if not to_all and os.geteuid() != 0:
        hint = "run it as the owner of the home, usually root"
    return PermissionDenied(url=folder, name=os.path.basename(path) or "?", reason=reason, hint=hint)
