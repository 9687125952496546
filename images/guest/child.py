"""The confined child that parses disks: asks its parent for blocks, answers its questions (see `wire`).

Started as `python -m images.guest.child DISKS DESCRIPTOR`, where DISKS is a JSON object of names and sizes. It has no
disk open: whatever it does wrong, the parent gives it bytes of these disks and takes answers, nothing else.
"""

from __future__ import annotations

import codecs
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any

from appliance.errors import GuestUnreadable
from images.guest import wire
from images.guest.blocks import Blocks, Cached, check_inside
from images.guest.confine import Cage, enter
from images.guest.files import Unsupported, Walker
from images.guest.volumes import Found, find_volumes, open_files

__all__ = ["Reader", "answer_all", "main"]


class _Asked:
    """A disk whose blocks the parent reads."""

    def __init__(self, parent: socket.socket, name: str, size: int) -> None:
        self._parent = parent
        self.name = name
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        check_inside(self, offset, length)
        parts: list[bytes] = []
        while length:
            part = min(length, wire.CHUNK)
            wire.send(self._parent, {"need": self.name, "offset": offset, "length": part})
            answer, data = wire.receive(self._parent)
            if len(data) != part:
                raise GuestUnreadable(what=f"disk {self.name!r}", reason=str(answer.get("failed", "too few bytes")))
            parts.append(data)
            offset, length = offset + part, length - part
        return b"".join(parts)


class Reader:
    """What a reader does for each question; the one that knows ext4, FAT and linear LVM."""

    def __init__(self, disks: Mapping[str, Blocks]) -> None:
        self._disks = disks
        self._found: dict[str, Found] = {}
        self._walker = Walker()

    def volumes(self) -> list[dict[str, Any]]:
        self._found = {one.volume.name: one for one in find_volumes(self._disks)}
        return [one.volume.model_dump(mode="json") for one in self._found.values()]

    def mount(self, volume: str, where: str) -> None:
        if volume not in self._found:
            raise GuestUnreadable(what=f"volume {volume!r}", reason="there is no such volume")
        self._walker.mount(where, open_files(self._found[volume]))

    def read(self, path: str, limit: int) -> bytes:
        return self._walker.read(path, limit)

    def list(self, path: str) -> tuple[str, ...]:
        return self._walker.list(path)

    def kind(self, path: str) -> str:
        return self._walker.kind(path).value

    def resolve(self, path: str) -> str:
        return self._walker.resolve(path)


def answer_all(parent: socket.socket, reader: Any) -> None:
    """Answer questions until the parent closes its end."""
    while True:
        try:
            question, _ = wire.receive(parent)
        except wire.Closed:
            return
        wire.send(parent, _answer(parent, reader, question))


def _answer(parent: socket.socket, reader: Any, question: dict[str, Any]) -> dict[str, Any]:
    """The last message of an answer, the others are sent."""
    try:
        found = getattr(reader, question.pop("do"))(**question)
    except FileNotFoundError:
        return {"missing": True}
    except GuestUnreadable as error:
        kind = {"unsupported": True} if isinstance(error, Unsupported) else {}
        return {"failed": error.fields.get("reason", ""), "what": error.fields.get("what", ""), **kind}
    if not isinstance(found, bytes):
        return {"done": found}
    for at in range(0, len(found), wire.CHUNK):
        wire.send(parent, {"part": True}, found[at : at + wire.CHUNK])
    return {"done": None}


def main() -> None:
    sizes, descriptor = json.loads(sys.argv[1]), int(sys.argv[2])
    parent = socket.socket(fileno=descriptor)
    for late in ("utf-16-le", "cp437"):
        codecs.lookup(late)  # Python would look for them in files, and there are none inside
    enter(parent, Cage())
    answer_all(parent, Reader({name: Cached(_Asked(parent, name, size)) for name, size in sizes.items()}))


if __name__ == "__main__":
    main()
