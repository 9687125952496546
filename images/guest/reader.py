"""The parent of a confined child: a Tree (see `images.tree`) whose every answer comes from there, and is checked.

The child may crash, hang, or answer anything: each becomes GuestUnreadable, and the reader is over then. Names, paths
and text that it tells are limited and never used on the host.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from appliance import secrecy
from appliance.errors import ConfigError, GuestUnreadable, RewindError
from images.guest import confine, wire
from images.guest.accelerator import kvm_group
from images.guest.blocks import Blocks, check_inside
from images.guest.files import Unsupported
from images.guest.volumes import Volume
from images.guest.windows import Windows
from images.tree import Kind

__all__ = ["ConfinedTree"]

_PATH = 4096
# A pipe takes 64 KiB, and hexadecimal digits twice the room.
_KEYS = 16 << 10
_VOLUMES = TypeAdapter(tuple[Volume, ...])


class ConfinedTree:
    """Not thread-safe. `seconds` is how long one answer may take, with all its parts; all answers together may let us
    wait for ten times as long."""

    def __init__(
        self,
        program: list[str],
        disks: Mapping[str, Blocks],
        *,
        seconds: float = 120,
        log: Path | None = None,
        pass_fds: Sequence[int] = (),
        group: int | None = None,
    ) -> None:
        """Start it. Raises ToolFailed, GuestUnreadable; nothing runs then."""
        self._disks = disks
        self._seconds = seconds
        self._patience = seconds * 10
        self._over: str = ""
        self._child, self._socket = confine.start(program, name="guest-reader", log=log, pass_fds=pass_fds, group=group)

    @classmethod
    def fast(cls, disks: Mapping[str, Blocks], *, seconds: float = 120) -> Self:
        """The reader for ext2 to ext4 and FAT, on partitions and linear volumes of LVM."""
        sizes = json.dumps({name: disk.size for name, disk in disks.items()})
        return cls([sys.executable, "-P", "-m", "images.guest.child", sizes], disks, seconds=seconds)

    @classmethod
    def general(
        cls,
        sockets: Mapping[str, Path],
        appliance: Path,
        keys: Sequence[bytes] = (),
        *,
        accelerator: str = "tcg",
        seconds: float = 600,
        writable: bool = False,
    ) -> Self:
        """libguestfs, with the disks at these sockets of NBD servers. Its start takes 15 to 60 s where it is emulated,
        in the first answer. The keys go through a pipe: not on a command line, not in a file. `accelerator` as in
        `accelerator.kvm_group`. `writable`: the servers let the disks be written, which only
        a change of ours needs. Raises also ConfigError when the keys are too long, or could get into swap."""
        secret = bool(keys) and secrecy.swaps()
        if secret:
            secrecy.let_children_lock()
        order = json.dumps({
            "sockets": {name: str(path) for name, path in sockets.items()}, "appliance": str(appliance),
            "kvm": (group := kvm_group(accelerator)), "secret": secret,
            "writable": writable,
        })  # fmt: skip
        reading, writing = os.pipe()
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(_in_a_pipe(keys))
            program = [sys.executable, "-P", "-m", "images.guest.general_child", order, str(reading)]
            return cls(program, {}, seconds=seconds, pass_fds=[reading], group=group)
        finally:
            os.close(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process outside that waits for the one inside."""
        return self._child.pid

    def close(self) -> None:
        """End the child. May be repeated."""
        self._socket.close()
        self._child.stop(grace=1)

    def volumes(self) -> tuple[Volume, ...]:
        """What lies on the disks."""
        try:
            return _VOLUMES.validate_python(self._ask({"do": "volumes"}), strict=False)
        except ValidationError as error:
            raise self._end(f"its reader tells no volumes: {error.errors()[0]['msg']}") from error

    def mount(self, volume: str, where: str) -> None:
        """Put a volume's files at a path; at `/` all others go. Raises Unsupported, GuestUnreadable."""
        self._ask({"do": "mount", "volume": volume, "where": where})

    def windows(self, volume: str) -> Windows | None:
        """What Windows is on it, by the general reader; None where there is none. It is mounted then."""
        try:
            found = self._ask({"do": "windows", "volume": volume})
            return None if found is None else Windows.model_validate(found)
        except FileNotFoundError as error:  # what a damaged hive may lead to
            raise self._end("its reader misses a file of its Windows") from error
        except ValidationError as error:
            raise self._end(f"its reader tells no Windows: {error.errors()[0]['msg']}") from error

    def start_at_boot(self, volume: str, control_set: str, names: Sequence[str]) -> None:
        """Have Windows start these drivers with its kernel, on disks that may be written. It is the last thing that is
        asked; only when it returns has all of it reached the disks' servers."""
        try:
            self._ask({"do": "start_at_boot", "volume": volume, "control_set": control_set, "names": [*names]})
        except FileNotFoundError as error:
            raise self._end("its reader misses a file of its Windows") from error

    # --- Tree ---

    def read(self, path: str, limit: int) -> bytes:
        parts = bytearray()
        self._ask({"do": "read", "path": path, "limit": limit}, parts, limit)
        return bytes(parts)

    def list(self, path: str) -> tuple[str, ...]:
        names = self._ask({"do": "list", "path": path})
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_name(name) for name in names):
            raise self._end(f"its reader tells no names of {path!r}")
        return tuple(sorted(names))

    def kind(self, path: str) -> Kind:
        try:
            return Kind(self._ask({"do": "kind", "path": path}))
        except ValueError as error:
            raise self._end(f"its reader does not tell what {path!r} is") from error

    def resolve(self, path: str) -> str:
        found = self._ask({"do": "resolve", "path": path})
        if not isinstance(found, str) or not _is_resolved(found):
            raise self._end(f"its reader does not tell where {path!r} is")
        return found

    # --- the conversation ---

    def _ask(self, question: dict[str, Any], parts: bytearray | None = None, limit: int = 0) -> Any:
        path = question.get("path", "")
        if self._over:
            raise GuestUnreadable(what="the point", reason=self._over)
        if "\0" in path or len(path) > _PATH:
            raise FileNotFoundError(path)
        try:
            return self._conversation(question, path, bytearray() if parts is None else parts, limit)
        except wire.Closed as error:
            raise self._end(f"its reader ended: {self._last_words()}") from error
        except wire.Garbage as error:
            raise self._end(f"its reader sent {error}") from error
        except TimeoutError as error:
            within = f"{self._seconds:g} s" if self._patience > 0 else f"{self._seconds * 10:g} s, all answers together"
            raise self._end(f"its reader gave no answer within {within}") from error

    def _conversation(self, question: dict[str, Any], path: str, parts: bytearray, limit: int) -> Any:
        deadline = time.monotonic() + self._seconds
        self._send(deadline, question)
        while True:
            answer, data = self._receive(deadline)
            if "need" in answer:
                self._send(deadline, *self._block(answer))
            elif "part" in answer and len(parts) + len(data) <= limit:
                parts += data
            elif "done" in answer:
                return answer["done"]
            elif "missing" in answer:
                raise FileNotFoundError(path)
            elif "failed" in answer:
                raise _failure(answer)
            else:
                raise wire.Garbage("what was not asked for")

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        """The time that passes here is the child's alone, not that of disks that we read."""
        begun = time.monotonic()
        try:
            return wire.receive(self._socket, min(deadline, begun + self._patience))
        finally:
            self._patience -= time.monotonic() - begun

    def _send(self, deadline: float, message: dict[str, Any], data: bytes = b"") -> None:
        wire.set_limit(self._socket, deadline)
        wire.send(self._socket, message, data)

    def _block(self, need: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        name, offset, length = need["need"], need.get("offset"), need.get("length")
        disk = self._disks.get(name) if isinstance(name, str) else None
        if disk is None or not isinstance(offset, int) or not isinstance(length, int) or length > wire.CHUNK:
            raise wire.Garbage("a wish for blocks of no disk")
        try:
            check_inside(disk, offset, length)
            return {}, disk.read(offset, length)
        except RewindError as error:
            return {"failed": str(error)}, b""

    def _last_words(self) -> str:
        last = self._child.tail().rpartition("\n")[2]
        try:
            code = self._child.wait(1)
        except TimeoutError:
            code = None
        return _text(last) or f"status {code}"

    def _end(self, reason: str) -> GuestUnreadable:
        """The child is of no use any more."""
        self._over = reason
        self._child.kill()
        return GuestUnreadable(what="the point", reason=reason)


def _in_a_pipe(keys: Sequence[bytes]) -> bytes:
    """What a pipe takes at once: nobody reads from it yet. Raises ConfigError."""
    if sum(map(len, keys)) > _KEYS or any(b"\0" in key for key in keys):
        raise ConfigError(reason=f"a passphrase of LUKS has zero bytes in it, or all have more than {_KEYS} bytes")
    return b"\n".join(key.hex().encode() for key in keys)


def _failure(answer: dict[str, Any]) -> GuestUnreadable:
    kind = Unsupported if answer.get("unsupported") is True else GuestUnreadable
    return kind(what=_text(answer.get("what")), reason=_text(answer.get("failed")))


def _text(value: object) -> str:
    """What the child says of an error, fit for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:300])


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 255 and "/" not in name and "\0" not in name and name not in (".", "..")


def _is_resolved(path: str) -> bool:
    return path == "/" or (path[:1] == "/" and len(path) <= 4 * _PATH and all(map(_is_name, path[1:].split("/"))))
