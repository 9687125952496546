"""Talks to the process that writes a journal, through its control socket: nbdkit-journal-plugin(1)."""

from __future__ import annotations

import json
import os
import socket as sockets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import JournalError, JournalSilent

__all__ = ["Control", "Mark", "State"]

_LABEL_MOST = 256


@dataclass(frozen=True, slots=True)
class Mark:
    """A label in the sequence: one instant over all disks. It is durable."""

    label: str
    sequence: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class State:
    """What the process says of itself. `state` is `ok`, `full` or `failed`; `fields` is the whole answer."""

    state: str
    reason: str
    first: int
    last: int
    written: int
    durable: int
    sealed: int
    bytes: int
    limit: int
    fields: dict[str, Any]


class Control:
    """Each call is a connection of its own, so any thread may use it, also while another one waits.

    Raises JournalError when the process refuses, JournalSilent when it does not answer within `timeout` seconds.
    """

    def __init__(self, socket: Path, timeout: float = 5.0) -> None:
        self.socket = socket
        self._timeout = timeout

    def status(self, timeout: float | None = None) -> State:
        answer = self._ask("status", timeout)
        names = ("state", "reason", "first", "last", "written", "durable", "sealed", "bytes", "limit")
        return State(**{name: answer[name] for name in names}, fields=answer)

    def stats(self) -> dict[str, Any]:
        """Counters since the process began."""
        return self._ask("stats")

    def mark(self, label: str) -> Mark:
        """Put a label of 1 to 256 bytes into the sequence; returns when it is durable."""
        if not 0 < len(label.encode()) <= _LABEL_MOST or not label.isprintable():
            raise JournalError(reason=f"label {label!r} is not 1 to {_LABEL_MOST} bytes of printable text")
        answer = self._ask(f"mark {label}")
        return Mark(label, answer["sequence"], answer["wall_ns"])

    def seal(self) -> int:
        """Everything recorded so far is in sealed segments when it returns; the last number in them."""
        return int(self._ask("seal")["sealed"])

    def forget(self, upto: int) -> int:
        """Delete sealed segments that end at or before that number. Returns the bytes that became free."""
        return int(self._ask(f"forget {upto}")["bytes"])

    def _ask(self, line: str, timeout: float | None = None) -> dict[str, Any]:
        try:
            with sockets.socket(sockets.AF_UNIX) as client:
                client.settimeout(self._timeout if timeout is None else timeout)
                client.connect(os.fspath(self.socket))
                client.sendall(line.encode() + b"\n")
                with client.makefile("rb") as answers:
                    answer = json.loads(answers.readline())
        except (OSError, ValueError) as error:
            raise JournalSilent(socket=self.socket, reason=str(error) or type(error).__name__) from error
        if "error" in answer:
            raise JournalError(reason=f"the journal at {self.socket} refuses {line.split()[0]!r}: {answer['error']}")
        return dict(answer)
