"""Child processes: helpers that live beside us, and tools that run to their end.

    Child   a helper (nbdkit, qemu-storage-daemon): own log, ended by its own descriptor, dies with us
    run     a tool (qemu-img, nbdcopy): its output, or ToolFailed with the tool's own last words

    process_key, lives   a process named so that nobody is taken for it who has its pid later
    alone                whether we are the only process that holds a lock file

All children are forked by one thread that lives as long as the process. The reason is `PR_SET_PDEATHSIG`: the kernel
sends it when the *thread* that forked ends, so a helper started from a worker thread would be killed when that worker
has done its part. Any thread may call everything here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from appliance.errors import ToolFailed

__all__ = ["Child", "alone", "lives", "process_key", "run", "signal_process", "wait_gone"]

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: the child of a fork in a process with threads must not load libraries.
_libc = ctypes.CDLL(None, use_errno=True)

_TAIL = 4096


class Child:
    """A running helper process.

    Its output (stdout and stderr) is appended to `log`, or kept in memory when there is none. Only this very
    process is ever signalled: a pid that the kernel gave to somebody else meanwhile is not touched. It has a session
    of its own, so that Ctrl-C at our terminal reaches us alone and we end it in order. With `die_with_parent` it is
    killed (SIGKILL) when this process ends, however that happens.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        name: str,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        die_with_parent: bool = True,
    ) -> None:
        """Start it. Raises ToolFailed when it cannot be executed; nothing runs then."""
        self.name = name
        self._log = os.memfd_create(name) if log is None else os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._start = os.fstat(self._log).st_size
        self._last: str | None = None
        self._lock = threading.Lock()  # guards the two descriptors: nobody may use them while they are closed
        try:
            self._process = _spawn(
                name,
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=_environment(env),
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()) if die_with_parent else None,
            )
            self._pidfd = self._opened()
        except BaseException:  # also Ctrl-C: no descriptor stays open
            os.close(self._log)
            raise

    def _opened(self) -> int:
        try:
            return os.pidfd_open(self._process.pid)
        except BaseException:  # nobody would ever end it, and it may have a port that the next one needs
            self._process.kill()
            self._process.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Its return code. Raises TimeoutError (the builtin) if it still runs after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} (pid {self.pid}) still runs after {timeout} s") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when it has ended."""
        with self._lock:
            if self._last is None and self.alive():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)

    def stop(self, grace: float = 5.0, patience: float | None = None) -> int:
        """Ask it to end, kill it after `grace` seconds; its return code. May be repeated. Raises as `kill`."""
        self.signal(signal.SIGTERM)
        try:
            code = self.wait(grace)
        except TimeoutError:
            return self.kill(patience)
        self._let_go()
        return code

    def kill(self, patience: float | None = None) -> int:
        """End it at once, also when it is stopped or hangs in user space; its return code. May be repeated. Raises
        TimeoutError when the kernel does not let it go within `patience` seconds (None: it is waited for): it dies as
        soon as its disk answers."""
        self.signal(signal.SIGKILL)
        code = self.wait(patience)
        self._let_go()
        return code

    def tail(self) -> str:
        """The end of what it has written since it was started, at most 4 KiB, for an error message."""
        with self._lock:
            if self._last is not None:
                return self._last
            end = os.fstat(self._log).st_size
            start = max(self._start, end - _TAIL)
            return os.pread(self._log, end - start, start).decode(errors="replace").strip()

    def leave(self) -> None:
        """Let it live on without us, one that does not die with us: we forget it, and keep no descriptor of it."""
        self._let_go()

    def _let_go(self) -> None:
        last = self.tail()
        with self._lock:
            if self._last is None:
                self._last = last
                os.close(self._log)
                os.close(self._pidfd)


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    input: str | bytes | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a tool to its end; what it wrote to stdout. It dies with us.

    Raises ToolFailed with the tool's last words when it returns non-zero, cannot be executed, or takes longer than
    `timeout` seconds (it is killed then).
    """
    name = Path(os.fspath(argv[0])).name
    process = _spawn(
        name,
        argv,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(env),
        start_new_session=True,
        preexec_fn=_die_with(os.getpid()),
    )
    with process:
        try:
            out, err = process.communicate(input.encode() if isinstance(input, str) else input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ToolFailed(tool=name, reason=f"no end after {timeout:g} s") from None
        except BaseException:  # also Ctrl-C: a tool does not go on without us
            process.kill()
            raise
    if process.returncode != 0:
        words = (err or out)[-_TAIL:].decode(errors="replace").strip()
        raise ToolFailed(tool=name, reason=words or f"exit status {process.returncode}", code=process.returncode)
    text: str = out.decode(errors="replace")
    return text


def process_key(pid: int) -> str:
    """`pid:start time`, or empty when there is no such process or it is only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{pid}:{fields[19]}" if fields[0] != "Z" else ""


@contextlib.contextmanager
def alone(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """Hold the lock file, which is made; whether nobody else holds it, after `wait` seconds at most. A lock ends with
    its process."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + wait
        while not (ours := _take(handle)) and time.monotonic() < end:
            time.sleep(0.02)
        yield ours
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lives(key: str) -> bool:
    """Whether the process of that key runs."""
    pid = key.partition(":")[0]
    return pid.isdigit() and process_key(int(pid)) == key


def signal_process(key: str, number: signal.Signals) -> None:
    """To the process of that key, and to nobody who has its pid now. Nothing happens when it has ended."""
    with contextlib.suppress(OSError, ValueError):
        handle = os.pidfd_open(int(key.partition(":")[0]))
        try:
            if lives(key):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def wait_gone(key: str, timeout: float) -> bool:
    """Whether the process of that key has ended within `timeout` seconds."""
    limit = time.monotonic() + timeout
    while lives(key):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    # Messages are parsed and shown as they are: always in one language.
    return {**(os.environ if env is None else env), "LC_ALL": "C.UTF-8"}


def _die_with(parent: int) -> Callable[[], None]:
    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # we died between fork and prctl: nobody would send the signal
            os._exit(1)

    return prepare


def _spawn(name: str, argv: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[bytes]:
    try:
        return _spawner.call(lambda: subprocess.Popen([os.fspath(word) for word in argv], **options))
    except OSError as error:
        hint = f"install the package that has {os.fspath(argv[0])!r}" if isinstance(error, FileNotFoundError) else ""
        raise ToolFailed(tool=name, reason=str(error), hint=hint) from error


class _Spawner:
    """The one thread that forks. It is a daemon thread: it must outlive every other and hold nobody up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()

    def call(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="spawner", daemon=True)
                self._thread.start()
        self._jobs.put((job, answer))
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        process: subprocess.Popen[bytes] = result
        return process

    def _work(self) -> None:
        while True:
            job, answer = self._jobs.get()
            try:
                answer.put(job())
            except BaseException as error:  # noqa: BLE001 -- handed to the caller, whose error it is
                answer.put(error)


_spawner = _Spawner()


def _renew() -> None:
    global _spawner
    _spawner = _Spawner()  # a fork has no threads but the one that forked


os.register_at_fork(after_in_child=_renew)
