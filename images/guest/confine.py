"""The cage in which a guest's bytes are parsed: what a process inside can still reach is one socket.

    start    parent: starts a program with one end of a socket pair, and gives it its user in its namespace
    enter    child: goes in, before it has seen a byte of the guest; there is no way back

What `enter` does, in this order, each a wall of its own:

    user namespace of one user (nobody)     no privilege outside, whatever it gets inside
    mount namespace on an empty, read-only memory file system, or on a few read-only folders that were asked for
    pid, network, IPC, UTS, cgroup namespaces    no process to signal or trace, no network, nobody's shared memory
    no capability, no new privileges        also no way to them
    limits                                  memory, processor seconds, descriptors, size of files, core dumps
    seccomp                                 `Seccomp.READER`: only to use its socket and its memory; EPERM for all else

Namespaces are made by system calls through ctypes: Python has `os.unshare` from 3.12 on, and `unshare` (the program)
cannot drop the user after the mounts. seccomp's filter is built by libseccomp (Debian: python3-seccomp), which knows
the numbers of system calls. Linux only, any architecture that libseccomp knows.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import platform
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from appliance.errors import GuestUnreadable, ToolFailed
from appliance.process import Child

__all__ = ["NOBODY", "Cage", "Limits", "Seccomp", "enter", "start", "user"]

NOBODY = 65534
_CLONE = {"NS": 0x20000, "CGROUP": 0x2000000, "UTS": 0x4000000, "IPC": 0x8000000, "USER": 0x10000000,
          "PID": 0x20000000, "NET": 0x40000000}  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "s390x": 217, "riscv64": 41}
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 24, 38, 4
_CAPABILITY_VERSION_3 = 0x20080522

_READER_CALLS = (
    "read", "readv", "recvfrom", "recvmsg", "write", "writev", "sendto", "sendmsg", "poll", "ppoll", "close", "fstat",
    "lseek", "brk", "munmap", "mremap", "madvise", "futex", "exit", "exit_group", "getpid", "gettid", "getrandom",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "sched_yield", "restart_syscall",
    "clock_gettime", "clock_nanosleep", "getrusage",
)  # fmt: skip
# What QEMU and libguestfs have no use for and an attacker has.
_FORBIDDEN_CALLS = (
    "ptrace", "process_vm_readv", "process_vm_writev", "mount", "umount2", "pivot_root", "chroot", "unshare", "setns",
    "fsopen", "fsmount", "fsconfig", "fspick", "move_mount", "open_tree", "mount_setattr", "open_by_handle_at",
    "name_to_handle_at", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "init_module",
    "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff", "acct", "quotactl",
    "mknod", "mknodat", "syslog", "io_uring_setup", "personality", "pidfd_getfd", "kcmp",
)  # fmt: skip


class Seccomp(Enum):
    """`READER`: only what parsing needs. `PROGRAMS`: not what no program of ours needs. `NONE`: for tests of the other
    walls."""

    READER = "reader"
    PROGRAMS = "programs"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Limits:
    """Of each process inside. `memory` in bytes of address space, 0: none; `seconds` of processor time; `files` open at
    once; `file_bytes` that it can write to one file; `processes`: whether it may start any."""

    memory: int = 1 << 30
    seconds: int = 600
    files: int = 16
    file_bytes: int = 64 << 10
    processes: bool = False


@dataclass(frozen=True, slots=True)
class Cage:
    """`see` maps paths inside to what is there of the host, read-only: folders, files, sockets and devices. `links` are
    symbolic links to make. `scratch`: a folder /tmp in memory of so many bytes, 0: none. `group` is that outside, None:
    nobody's. `secret`: /tmp is never in swap; its size then has no bound but that of one file."""

    limits: Limits = field(default_factory=Limits)
    seccomp: Seccomp = Seccomp.READER
    see: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    scratch: int = 0
    group: int | None = None
    secret: bool = False


# --- the parent's part ----------------------------------------------------------------------------------------------


def user(group: int | None = None) -> tuple[int, int]:
    """(uid, gid) that a process inside has outside: nobody's, or ours when we are not root. Root may choose a group."""
    if os.getuid():
        return os.getuid(), os.getgid()
    return NOBODY, NOBODY if group is None else group


def start(
    program: Sequence[str],
    *,
    name: str,
    log: Path | None = None,
    pass_fds: Sequence[int] = (),
    group: int | None = None,
) -> tuple[Child, socket.socket]:
    """Start a program that calls `enter` with the descriptor that is its last argument; it is inside when this
    returns. It gets nothing of our environment. It ends when the socket is closed, and dies with us. `group` as in the
    Cage that the program goes into.

    Raises ToolFailed, or GuestUnreadable with its last words when it did not get in; nothing runs then.
    """
    ours, theirs = socket.socketpair()
    try:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        child = Child(
            [*program, str(theirs.fileno())], name=name, log=log, env=environment,
            pass_fds=[theirs.fileno(), *pass_fds],
        )  # fmt: skip
    except BaseException:  # also Ctrl-C: it is handed out only with its child
        ours.close()
        raise
    finally:
        theirs.close()
    try:
        ours.settimeout(60)
        _let_in(child, ours, group)
    except BaseException as error:  # also Ctrl-C
        child.kill()
        ours.close()
        if isinstance(error, (OSError, ValueError)):
            reason = child.tail().rpartition("\n")[2] or str(error)
            raise GuestUnreadable(what="the point", reason=f"its reader could not be confined: {reason}") from error
        raise
    return child, ours


def _let_in(child: Child, ours: socket.socket, chosen: int | None) -> None:
    """It has left our namespaces (U), gets its user (M), and tells when all walls stand (I)."""
    _expect(ours, b"U")
    uid, group = user(chosen)
    Path(f"/proc/{child.pid}/setgroups").write_text("deny")
    Path(f"/proc/{child.pid}/uid_map").write_text(f"{uid} {uid} 1")
    Path(f"/proc/{child.pid}/gid_map").write_text(f"{group} {group} 1")
    ours.sendall(b"M")
    _expect(ours, b"I")


def _expect(ours: socket.socket, letter: bytes) -> None:
    found = ours.recv(1)
    if found != letter:
        raise ValueError(f"it says {found!r} where {letter!r} is due")


# --- the child's part -----------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def enter(ours: socket.socket, cage: Cage) -> None:
    """Go in, in a fork of this process. Import everything before: there are no files inside. This process has one
    thread, and waits outside for the end of the fork. Raises OSError where a wall cannot be built."""
    seccomp_library = _import_seccomp() if cage.seccomp is not Seccomp.NONE else None
    uid, group = user(cage.group)
    if os.getuid() == 0:
        os.setgroups([])
    _call("unshare", sum(_CLONE.values()))
    ours.sendall(b"U")
    if ours.recv(1) != b"M":
        os._exit(1)
    # Still with the rights of who started us: what is to be seen may lie in folders of root.
    opened = {inside: os.open(outside, os.O_PATH | os.O_CLOEXEC) for inside, outside in cage.see.items()}
    os.setresgid(group, group, group)
    os.setresuid(uid, uid, uid)
    _fork()
    _new_root(cage, opened)
    _limit(cage.limits)
    _drop_privileges()
    if seccomp_library is not None:
        _filter(seccomp_library, cage.seccomp)
    ours.sendall(b"I")


def _fork() -> None:
    """Be process 1 of the new process namespace. The one before stays as its parent, and each dies with its own."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # changing the user took it back
    inside = os.fork()
    if inside:
        os.closerange(3, 1 << 16)
        _, status = os.waitpid(inside, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _new_root(cage: Cage, opened: Mapping[str, int]) -> None:
    """The mount point is one that exists everywhere; only this process sees what is on it."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "size=1m,mode=755")
    for inside, handle in opened.items():
        _show("/tmp" + inside, handle)
    for inside, target in cage.links.items():
        os.makedirs(os.path.dirname("/tmp" + inside), exist_ok=True)
        os.symlink(target, "/tmp" + inside)
    if cage.scratch:
        os.makedirs("/tmp/tmp")
        # A tmpfs may go to swap, and in a user namespace it cannot be told not to; a ramfs never does.
        kind, size = ("ramfs", "") if cage.secret else ("tmpfs", f"size={cage.scratch},")
        _mount(kind, "/tmp/tmp", kind, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, f"{size}mode=700")
    os.chdir("/tmp")
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _call("umount2", b".", _MNT_DETACH)  # the host's, which lies on top
    _mount("none", "/", "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir("/")


def _show(where: str, handle: int) -> None:
    source = f"/proc/self/fd/{handle}"
    os.makedirs(os.path.dirname(where), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(where, exist_ok=True)
    else:
        os.close(os.open(where, os.O_CREAT | os.O_WRONLY))
    _mount(source, where, "", _MS_BIND)
    _mount("none", where, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _kept_flags(where))
    os.close(handle)


def _kept_flags(where: str) -> int:
    """A namespace may not take away what the host has set for that mount."""
    flags, found = os.statvfs(where).f_flag, 0
    for host, ours in ((os.ST_NOSUID, _MS_NOSUID), (os.ST_NODEV, _MS_NODEV), (os.ST_NOEXEC, _MS_NOEXEC)):
        found |= ours if flags & host else 0
    for host, ours in ((os.ST_NOATIME, 1024), (os.ST_NODIRATIME, 2048), (os.ST_RELATIME, 1 << 21)):
        found |= ours if flags & host else 0
    return found | _MS_NOSUID


def _limit(limits: Limits) -> None:
    bounds = {
        resource.RLIMIT_CPU: limits.seconds,
        resource.RLIMIT_NOFILE: limits.files,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CORE: 0,
    }
    if limits.memory:
        bounds[resource.RLIMIT_AS] = limits.memory
    if not limits.processes:
        bounds[resource.RLIMIT_NPROC] = 0
    for kind, most in bounds.items():
        resource.setrlimit(kind, (most, most))


def _drop_privileges() -> None:
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break  # the kernel knows no more of them
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def _import_seccomp() -> Any:
    try:
        return importlib.import_module("seccomp")
    except ImportError as error:
        hint = "install the package python3-seccomp"
        raise ToolFailed(tool="the reader of guests", reason="libseccomp's binding is missing", hint=hint) from error


def _filter(library: Any, which: Seccomp) -> None:
    refuse = library.ERRNO(1)  # EPERM
    if which is Seccomp.PROGRAMS:
        rules = library.SyscallFilter(library.ALLOW)
        for call in _known(library, _FORBIDDEN_CALLS):
            rules.add_rule(refuse, call)
        # A child in a user namespace of its own would have every capability there, and with them more of the kernel.
        rules.add_rule(refuse, "clone", library.Arg(0, library.MASKED_EQ, _CLONE["USER"], _CLONE["USER"]))
        rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")  # its flags are in memory; the C library takes clone then
    else:
        rules = library.SyscallFilter(refuse)
        for call in _known(library, _READER_CALLS):
            rules.add_rule(library.ALLOW, call)
        for call in ("mmap", "mprotect"):  # memory, but no code
            rules.add_rule(library.ALLOW, call, library.Arg(2, library.MASKED_EQ, 4, 0))
    rules.load()


def _known(library: Any, calls: Sequence[str]) -> list[str]:
    """Those that this architecture and this libseccomp have."""
    arch = library.Arch()
    return [call for call in calls if library.resolve_syscall(arch, call) >= 0]


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() or None, flags, options.encode() or None)
    _check(_libc.mount(*arguments), f"mount {target}")


def _call(name: str, *arguments: Any) -> None:
    _check(getattr(_libc, name)(*arguments), name)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
