"""How the confined child and its parent talk: messages of a JSON object and bytes, over a pair of sockets.

    length of the JSON, length of the bytes (32 bits each, big-endian), JSON, bytes

    parent → child   {"do": "volumes" | "mount" | "read" | "list" | "kind" | "resolve", …}
    child → parent   {"need": disk, "offset": …, "length": …}   the parent answers with bytes, at any time in between
                     {"part": true} + bytes                       more of the answer
                     {"done": …}                                  its end
                     {"missing": true} | {"failed": reason, "what": …, "unsupported": true}

Both ends have limits for both lengths, and the parent believes nothing it gets. Its time limit is for whole messages:
one for each `recv` would let a child that drips bytes hold its parent for ever.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from typing import Any

__all__ = ["CHUNK", "Closed", "Garbage", "receive", "send", "set_limit"]

# One message's bytes; the JSON holds at most the names of a folder.
CHUNK = 1 << 20
_JSON = 4 << 20


class Closed(Exception):
    """The other end is gone."""


class Garbage(Exception):
    """What came is no message."""


def send(to: socket.socket, message: dict[str, Any], data: bytes = b"") -> None:
    """Raises Closed, TimeoutError."""
    head = json.dumps(message, separators=(",", ":")).encode()
    try:
        to.sendall(struct.pack(">II", len(head), len(data)) + head + data)
    except TimeoutError:
        raise
    except OSError as error:
        raise Closed from error


def receive(source: socket.socket, deadline: float = math.inf) -> tuple[dict[str, Any], bytes]:
    """The next message, all of it before `deadline` (of `time.monotonic`). Raises Closed, Garbage, TimeoutError."""
    head, length = struct.unpack(">II", _exactly(source, 8, deadline))
    if head > _JSON or length > CHUNK:
        raise Garbage(f"a message of {head} and {length} bytes")
    try:
        message = json.loads(_exactly(source, head, deadline))
    except (ValueError, RecursionError) as error:
        raise Garbage("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise Garbage("a message that is no object")
    return message, _exactly(source, length, deadline)


def set_limit(of: socket.socket, deadline: float) -> None:
    """What is begun now may wait until then. Raises TimeoutError when that is over, also if no waiting is needed."""
    if deadline == math.inf:
        return  # the child's: its cage does not let it change a socket
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    of.settimeout(left)


def _exactly(source: socket.socket, length: int, deadline: float) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        set_limit(source, deadline)
        try:
            part = source.recv(min(length - len(parts), CHUNK))
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed from error
        if not part:
            raise Closed
        parts += part
    return bytes(parts)
