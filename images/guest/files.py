"""File systems put together to one tree, and paths walked in it, without ever leaving it.

    FileSystem   one file system: nodes, and what is in them        (ext4, fat)
    Walker       several of them at their mount points              → what `images.tree.Tree` asks for

The walker resolves links and `..` itself, by names in memory: a path is a list of nodes from the root down, `..` takes
the last one off and stops at the root, and an absolute link begins at the root again. There is no path of the host in
it that anything could lead to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from appliance.errors import GuestUnreadable
from images.tree import Kind

__all__ = ["FileSystem", "Node", "Unsupported", "Walker", "check_readable"]

# As in Linux: more links than this are a circle.
_LINKS = 40
_PARTS = 4096


class Unsupported(GuestUnreadable):
    """This reader does not know that feature; another one may."""


@dataclass(frozen=True, slots=True)
class Node:
    """A file, folder or link. `number` is the file system's own name for it; `size` in bytes."""

    number: int
    kind: Kind
    size: int


class FileSystem(Protocol):
    """Not thread-safe. All raise GuestUnreadable when what they meet is damaged."""

    root: Node

    def names(self, folder: Node) -> Iterable[bytes]:
        """Of a folder, without `.` and `..`, in any order; as they are stored, so they may be no names at all."""
        ...

    def lookup(self, folder: Node, name: bytes) -> Node | None:
        """None: there is no such name."""
        ...

    def target(self, link: Node) -> bytes:
        """Where a symbolic link points to."""
        ...

    def read(self, file: Node) -> bytes:
        """The whole content; the caller has looked at its size."""
        ...


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    files: FileSystem
    node: Node


_Steps = list[_Step]


class Walker:
    """A Tree (see there) over mounted file systems. Not thread-safe."""

    def __init__(self) -> None:
        self._mounts: dict[str, FileSystem] = {}

    def mount(self, where: str, files: FileSystem) -> None:
        """Put a file system at a path without links; at `/` all others go. The folder below need not exist."""
        if where == "/":
            self._mounts.clear()
        self._mounts[where] = files

    def read(self, path: str, limit: int) -> bytes:
        step = self._walk(path, follow=True)[-1]
        check_readable(path, step.node.kind, step.node.size, limit)
        return step.files.read(step.node)

    def list(self, path: str) -> tuple[str, ...]:
        step = self._walk(path, follow=True)[-1]
        if step.node.kind is not Kind.FOLDER:
            raise FileNotFoundError(path)
        return tuple(sorted(filter(None, map(_name, step.files.names(step.node)))))

    def kind(self, path: str) -> Kind:
        return self._walk(path, follow=False)[-1].node.kind

    def resolve(self, path: str) -> str:
        return _path(self._walk(path, follow=True))

    def _walk(self, path: str, *, follow: bool) -> _Steps:
        todo = _parts(path)
        steps = [self._root(path)]
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                del steps[max(1, len(steps) - 1) :]  # the root stays
                continue
            step = self._step(steps, part, path)
            if step.node.kind is not Kind.LINK or not (follow or todo):
                steps.append(step)
                continue
            links += 1
            target = _text(step.files.target(step.node))
            if links > _LINKS or not target or len(todo) > _PARTS:
                raise FileNotFoundError(path)
            if target.startswith("/"):
                del steps[1:]
            todo += _parts(target)
        return steps

    def _root(self, path: str) -> _Step:
        files = self._mounts.get("/")
        if files is None:
            raise FileNotFoundError(path)
        return _Step("", files, files.root)

    def _step(self, steps: _Steps, part: str, path: str) -> _Step:
        here = steps[-1]
        if here.node.kind is not Kind.FOLDER:
            raise FileNotFoundError(path)
        mounted = self._mounts.get(_path([*steps, _Step(part, here.files, here.node)]))
        if mounted is not None:
            return _Step(part, mounted, mounted.root)
        node = here.files.lookup(here.node, part.encode(errors="surrogateescape"))
        if node is None:
            raise FileNotFoundError(path)
        return _Step(part, here.files, node)


def check_readable(path: str, kind: Kind, size: int, limit: int) -> None:
    """Raises GuestUnreadable unless it is a regular file of at most `limit` bytes."""
    if kind is not Kind.FILE:
        raise GuestUnreadable(what=f"file {path!r} of the guest", reason="it is not a regular file")
    if size > limit:
        reason = f"it has {size} bytes and at most {limit} are read of such a file"
        raise GuestUnreadable(what=f"file {path!r} of the guest", reason=reason)


def _parts(path: str) -> list[str]:
    """The parts of a path, last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _path(steps: _Steps) -> str:
    return "/".join(step.name for step in steps) or "/"


def _text(name: bytes) -> str:
    """Empty for what is not UTF-8, or has a character that ends a string in C."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def _name(name: bytes) -> str:
    text = _text(name)
    return "" if "/" in text or text in (".", "..") else text
