"""One disk of a point as a new image file, or onto a block device.

    view ─► qemu-img convert ─► hidden file beside the target ─► fsync ─► rename

Only data moves and only data takes room. The wanted name appears when the image is complete; before, it is an empty
file that keeps the name, and after a failure it is gone.

Where the file system can, the image goes past the host's page cache: a large one would push out what the guests of the
host have there, and then hold up everybody's writes until it is on disk. Copying it there was also half of qemu-img's
work (1.9 s of processor a GiB, 0.7 without).
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from appliance import nbd
from appliance.errors import (
    ConfigError,
    ConnectError,
    IntegrityError,
    Interrupted,
    NoSpace,
    RestoreError,
    TargetExists,
    ToolFailed,
)
from appliance.model import MapRef
from appliance.process import Child
from appliance.restore.export import ViewServer
from appliance.units import CHUNK, chunks_of

if TYPE_CHECKING:
    from appliance.store import Map, Repository

__all__ = ["FORMATS", "verify_image", "write_image"]

FORMATS = ("qcow2", "raw")

_PROGRESS = re.compile(r"\((\d+(?:\.\d+)?)/100%\)")
_POLL = 0.05
_BLOCK = 4096
# Reads of the target in flight while it is verified, and chunks a request: 4 MiB in all.
_VERIFIERS = 4
_VERIFY_CHUNKS = 16


def write_image(
    view: ViewServer,
    export: str,
    target: Path,
    format: str = "qcow2",
    *,
    rate: int = 0,
    device: bool = False,
    progress: Callable[[float], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Copy an export into `target`; it is durable when this returns.

    `rate` in bytes a second (0: no limit). `device` allows a block device as target, whose content is lost; whatever
    else exists is refused. `progress` is told the share done, 0 to 1. Raises TargetExists, ConfigError, NoSpace,
    ToolFailed (view lost), Interrupted when `stop` was set; a file target does not exist then, a device is
    half-written.
    """
    if format not in FORMATS:
        raise ConfigError(reason=f"cannot write images of format {format!r}; there are {', '.join(FORMATS)}")
    if _is_device(target):
        if not device:
            raise TargetExists(path=target, hint="it is a block device: its content would be lost; say so explicitly")
        _convert(view.uri(export), target, "raw", ["-n", *_cache(target, view.size(export))], rate, progress, stop)
        _sync(target)
        return
    with _new_file(target) as hidden:
        _convert(view.uri(export), hidden, format, _cache(hidden, view.size(export)), rate, progress, stop)
        _sync(hidden)


def verify_image(repo: Repository, ref: MapRef, image: Path, format: str, run: Path) -> None:
    """Read the whole image back and compare it with the map, by hash. Raises IntegrityError that names the first place
    that differs. `run` is a folder for a socket."""
    socket = run / f"verify-{os.getpid()}.sock"
    server = Child(
        ["qemu-nbd", "--read-only", f"--socket={socket}", f"--format={format}", "--persistent",
         f"--shared={_VERIFIERS}", image],
        name="qemu-nbd",
    )  # fmt: skip
    try:
        with nbd.connect_when_ready(socket, server.alive) as first:
            # An image cannot have a size that is no multiple of a sector.
            if first.size() != -(-ref.size // 512) * 512:
                raise IntegrityError(object=f"image {image}", reason=f"it has {first.size()} bytes, not {ref.size}")
        _compare(repo, ref, image, socket)
    except ConnectError as error:
        raise ToolFailed(tool="qemu-nbd", reason=server.tail() or str(error)) from error
    finally:
        server.stop()
        socket.unlink(missing_ok=True)


def _compare(repo: Repository, ref: MapRef, image: Path, socket: Path) -> None:
    wanted = repo.map(ref)
    connections = [nbd.connect(socket) for _ in range(_VERIFIERS)]

    def lane(number: int) -> None:
        step = _VERIFIERS * _VERIFY_CHUNKS
        for index in range(number * _VERIFY_CHUNKS, chunks_of(ref.size), step):
            _compare_range(repo, wanted, image, connections[number], index)

    try:
        with ThreadPoolExecutor(_VERIFIERS) as pool:
            for done in [pool.submit(lane, number) for number in range(_VERIFIERS)]:
                done.result()
    finally:
        for connection in connections:
            connection.close()


def _compare_range(repo: Repository, wanted: Map, image: Path, connection: nbd.Connection, first: int) -> None:
    start, end = first * CHUNK, min((first + _VERIFY_CHUNKS) * CHUNK, connection.size())
    last = chunks_of(end)
    ids = dict(wanted.items(first, last))
    if not ids and all(extent.zero for extent in connection.extents(start, end - start)):
        return
    data = memoryview(connection.pread(end - start, start))
    for index in range(first, last):
        at = index * CHUNK - start
        if _id(repo, data[at : at + CHUNK]) != ids.get(index, b""):
            raise IntegrityError(object=f"image {image}", reason=f"bytes from {index * CHUNK} are not the point's")


def _id(repo: Repository, data: memoryview) -> bytes:
    whole = bytes(data).ljust(CHUNK, b"\0")
    return repo.codec.chunk_id(whole) if any(whole) else b""


def _convert(
    source: str,
    target: Path,
    format: str,
    options: list[str],
    rate: int,
    progress: Callable[[float], None] | None,
    stop: threading.Event | None,
) -> None:
    if rate:
        options = [*options, "-r", str(rate)]
    stop = stop or threading.Event()
    with Child(
        ["qemu-img", "convert", "-p", "-W", "-m", "8", "-f", "raw", "-O", format, *options, source,
         target],
        name="qemu-img",
    ) as child:  # fmt: skip
        while child.alive():
            if stop.wait(_POLL):
                child.kill()
                raise Interrupted(reason=f"restore into {target}")
            _tell(progress, child.tail())
        if child.wait() != 0:
            said = _PROGRESS.sub("", child.tail()).strip()
            if os.strerror(errno.ENOSPC) in said:
                raise NoSpace(url=str(target.parent), name=target.name, hint="make room there, or name another folder")
            raise ToolFailed(tool="qemu-img", reason=said or f"exit {child.wait()}")
        _tell(progress, child.tail())


def _cache(target: Path, size: int) -> list[str]:
    """How qemu-img shall write to the file, which exists. Its default ignores flushes: what it leaves is not durable.

    A size that is not whole blocks is left to the page cache: on disks with sectors of 4 KiB the file would get longer.
    """
    return ["-t", "none" if size % _BLOCK == 0 and _direct(target) else "writeback"]


def _direct(target: Path) -> bool:
    """Whether it can be read and written past the page cache; some file systems open it for that and then refuse."""
    try:
        file = os.open(target, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            block = mmap.mmap(-1, _BLOCK)
            if not os.preadv(file, [block], 0):
                os.pwritev(file, [block], 0)  # a new file, in which nothing can be read: qemu-img makes it anew
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def _tell(progress: Callable[[float], None] | None, text: str) -> None:
    found = _PROGRESS.findall(text)
    if progress is not None and found:
        progress(float(found[-1]) / 100)


@contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A hidden file beside `target` that takes its place at the end, or nothing at all."""
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise TargetExists(path=target) from None
    except OSError as error:
        raise RestoreError(reason=f"cannot make {target}: {error.strerror}") from error
    hidden = target.with_name(f".{target.name}.incomplete")
    try:
        # Made here, so that nobody else can read it: converting keeps the mode.
        os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        yield hidden
        os.replace(hidden, target)
        _sync(target.parent)
    except BaseException:  # also Ctrl-C: half an image must not be taken for one
        hidden.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        raise


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
