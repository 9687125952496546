"""A guest's disks as the parent reads them: an NBD export, or an image file through `qemu-nbd -r`.

A plain raw file is read as it is. Any other file goes through qemu-nbd: qcow2's tables and backing chains are QEMU's
own business. Which of the two a file is, is told by qcow2's magic and never by its name; a raw disk whose guest wrote
that magic at its beginning would be taken for one, so say `raw:PATH` or `qcow2:PATH` where it is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from appliance import nbd
from appliance.errors import ConfigError, GuestUnreadable, NbdFailed, RewindError
from appliance.process import Child
from images.guest.blocks import Blocks

__all__ = ["NbdDisk", "image_format", "open_disks", "serve_disks", "split_uri"]

_QCOW2 = b"QFI\xfb"


class NbdDisk:
    """Blocks (see there) of an NBD export."""

    def __init__(self, name: str, connection: nbd.Connection) -> None:
        self.name = name
        self.size = connection.size()
        self._connection = connection

    def read(self, offset: int, length: int) -> bytes:
        try:
            return bytes(self._connection.pread(length, offset))
        except NbdFailed as error:
            raise GuestUnreadable(what=f"disk {self.name!r}", reason=str(error)) from error


class _File:
    def __init__(self, name: str, handle: int) -> None:
        self.name = name
        self._handle = handle
        self.size = os.lseek(handle, 0, os.SEEK_END)  # also of a block device

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._handle, length, offset)
        except OSError as error:
            raise GuestUnreadable(what=f"disk {self.name!r}", reason=str(error)) from error
        return data


@contextmanager
def open_disks(disks: Mapping[str, str], folder: Path) -> Iterator[dict[str, Blocks]]:
    """The disks, in the order given. Sockets of servers that are needed are in `folder`. Raises ConfigError for what is
    no disk, ConnectError, ToolFailed; nothing runs then, nor after it."""
    with ExitStack() as opened:
        yield {name: _open(name, spec, folder, opened) for name, spec in disks.items()}


@contextmanager
def serve_disks(
    disks: Mapping[str, str], folder: Path, owner: tuple[int, int], *, writable: bool = False
) -> Iterator[dict[str, Path]]:
    """The disks as sockets in `folder`, which `owner` (uid, gid) may connect to and nobody can write through,
    unless they are `writable`. Raises as `open_disks`."""
    with ExitStack() as opened:
        sockets: dict[str, Path] = {}
        for number, (name, spec) in enumerate(disks.items()):
            kind, image = ("raw", spec) if spec.startswith("nbd") else image_format(spec)
            sockets[name] = opened.enter_context(
                _server(folder / f"general.{number}.sock", kind, str(image), writable=writable)
            )
            os.chown(sockets[name], *owner)
        yield sockets


def split_uri(uri: str) -> tuple[Path, str]:
    """(socket, export) of `nbd+unix:///EXPORT?socket=PATH`. Raises ConfigError."""
    parts = urlsplit(uri)
    socket = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(socket) != 1:
        raise ConfigError(reason=f"{uri!r} is not a URI like nbd+unix:///vda?socket=PATH")
    return Path(socket[0]), unquote(parts.path).removeprefix("/")


def image_format(spec: str) -> tuple[str, Path]:
    """(`raw` or `qcow2`, path) of a file's specification. Raises ConfigError."""
    kind, _, rest = spec.partition(":")
    if kind in ("raw", "qcow2"):
        return kind, Path(rest)
    path = Path(spec)
    try:
        with path.open("rb") as file:
            return ("qcow2" if file.read(4) == _QCOW2 else "raw"), path
    except OSError as error:
        raise ConfigError(reason=f"disk {spec!r} cannot be opened: {error.strerror}") from error


def _open(name: str, spec: str, folder: Path, opened: ExitStack) -> Blocks:
    if spec.startswith("nbd"):
        return NbdDisk(name, opened.enter_context(nbd.connect(*split_uri(spec), contexts=())))
    kind, path = image_format(spec)
    if kind == "qcow2":
        return _served(name, path, folder, opened)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(reason=f"disk {spec!r} cannot be opened: {error.strerror}") from error
    opened.callback(os.close, handle)
    return _File(name, handle)


def _served(name: str, path: Path, folder: Path, opened: ExitStack) -> Blocks:
    socket = opened.enter_context(_server(folder / f"{name}.qcow2.sock", "qcow2", str(path)))
    return NbdDisk(name, opened.enter_context(nbd.connect(socket, contexts=())))


@contextmanager
def _server(socket: Path, kind: str, image: str, *, writable: bool = False) -> Iterator[Path]:
    """A server that does not let its clients write unless told so."""
    socket.unlink(missing_ok=True)
    options = [f"--format={kind}", "--persistent", "--shared=8", f"--socket={socket}"]
    argv = ["qemu-nbd", *([] if writable else ["--read-only"]), *options, image]
    with Child(argv, name="qemu-nbd") as child:
        try:
            nbd.connect_when_ready(socket, child.alive).close()
        except RewindError as error:
            raise ConfigError(reason=f"disk {image!r} cannot be opened: {child.tail() or error}") from error
        try:
            yield socket
        finally:
            socket.unlink(missing_ok=True)
