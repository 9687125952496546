"""What a place that keeps objects must do: eight dumb calls. Everything clever is a wrapper or lives above.

Objects are immutable bytes of at most some tens of MiB under a name like `packs/3f0c…`. Only three things are asked
of a place, and `tests/contract/test_backends.py` proves them for each:

    create-only   of any number of writers of one name exactly one succeeds, and the object is whole from its first
                  instant: the commit of a recovery point rests on it
    durable       when `put` or `delete` returns, a power cut cannot take it back
    honest        an object that is there is never reported as missing; when in doubt the answer is `Temporary`

Errors are those of appliance.errors, with the object's name: ObjectNotFound, AlreadyExists, Temporary, NoSpace,
PermissionDenied. Whoever gets `Temporary` from `put` cannot know whether the object was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from appliance.errors import ConfigError

__all__ = ["Backend", "Buffer", "Capabilities", "ObjectInfo", "check_name", "check_prefix", "is_name"]

Buffer = bytes | bytearray | memoryview

_NAME_LIMIT = 512
_SEGMENT_LIMIT = 200
_SEGMENT = re.compile(r"[a-z0-9_-][a-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """`size` in bytes, `modified` in seconds since 1970 by the clock of the place, which may differ from ours."""

    name: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What callers may adapt to. `create_only` False: a race of two writers can be lost here, `doctor` says so.

    `remote`: every call is a round trip, so joining ranges and reading ahead pay. `retention`: seconds for which the
    place refuses to delete what was put (0: none); deleting an object then hides it without freeing its space.
    """

    create_only: bool = True
    remote: bool = False
    retention: float = 0.0


class Backend(Protocol):
    """A place that keeps objects. Every method may be called from any thread at the same time."""

    @property
    def url(self) -> str:
        """Names the place in messages; holds no secret."""

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` (None: to the end). Beyond the end there is nothing: the answer is shorter or
        empty, no error. Raises ObjectNotFound, Temporary, PermissionDenied.
        """

    def put(self, name: str, data: Buffer) -> None:
        """Create `name`; durable on return. Raises AlreadyExists (what is there is whole, durable and unchanged),
        NoSpace, PermissionDenied (nothing was created), Temporary (unknown: ask, or put again).
        """

    def delete(self, name: str) -> None:
        """Durably remove; no error if there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose name begins with the text `prefix`, ascending by name. What is put or deleted meanwhile
        may be in it or not; everything else is, exactly once. Errors may surface at any step of the iteration.
        """

    def stat(self, name: str) -> ObjectInfo:
        """Raises ObjectNotFound, Temporary, PermissionDenied."""

    def capabilities(self) -> Capabilities:
        """Costs no request."""

    def close(self) -> None:
        """Give connections back. Idempotent; calls after it have no defined effect."""


def check_name(name: str) -> str:
    """Returns `name`, or raises ConfigError. Each rule stands for an accident that it prevents.

    One more cannot be seen here: no name may continue another one behind a `/`; in a folder the shorter one's file
    would be in the way.
    """
    if not name or len(name) > _NAME_LIMIT:
        # S3 keys end at 1024 bytes, with the prefix of the URL in front.
        raise ConfigError(reason=f"object name {name!r} must have 1 to {_NAME_LIMIT} characters")
    for segment in name.split("/"):
        if not segment:
            # `a//b` and `a/` are different objects on S3 but the same file in a folder; `/a` is outside of it.
            raise ConfigError(reason=f"object name {name!r} has an empty part")
        if len(segment) > _SEGMENT_LIMIT:
            # File systems end at 255 bytes.
            raise ConfigError(reason=f"object name {name!r} has a part longer than {_SEGMENT_LIMIT} characters")
        if _SEGMENT.fullmatch(segment) is None:
            # `..` leaves the folder, and other leading dots are temporaries or hidden. Upper case would make two
            # objects one on file systems that fold case. Blanks, `%`, `?`, `#`, NUL, backslashes and letters beyond
            # ASCII are changed on the way by one client, gateway or file system or another.
            raise ConfigError(reason=f"object name {name!r}: {segment!r} has more than a-z 0-9 - _ and inner dots")
    return name


def check_prefix(prefix: str) -> str:
    """As check_name for the beginning of a name: it may be empty and may end with `/`."""
    if prefix:
        check_name(prefix.removesuffix("/"))
    return prefix


def is_name(name: str) -> bool:
    """Whether check_name allows it. Whatever else lies about (lost+found, folder markers) is none of ours."""
    try:
        check_name(name)
    except ConfigError:
        return False
    return True
