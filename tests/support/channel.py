"""The second serial port of a tiny guest: one line to ask, one line of JSON as answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["Channel", "GuestSilent"]


class GuestSilent(Exception):
    """The guest did not answer in time."""


class Channel:
    """Connection to the serial port's socket. Thread-safe: one question at a time.

    The guest says `{"up":true}` at each of its starts; `boots` counts them, so a test can wait for the reboot that a
    revert brings. A question during which the guest is reset is not answered.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self._lock = threading.Lock()
        self._pending = b""
        self.boots = 0
        deadline = time.monotonic() + timeout
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                return
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def ask(self, question: str, timeout: float = 30.0) -> dict[str, Any]:
        """The answer. Raises GuestSilent when there is none in time."""
        with self._lock:
            self._drain()
            self._socket.settimeout(timeout)
            self._socket.sendall(question.encode() + b"\n")
            deadline = time.monotonic() + timeout
            while True:
                answer = self._line(deadline, question)
                if "up" not in answer:
                    return answer
                self.boots += 1

    def wait_up(self, boots: int = 1, timeout: float = 60.0) -> None:
        """Wait until the guest has started `boots` times since this connection was made."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while self.boots < boots:
                if "up" in self._line(deadline, "boot"):
                    self.boots += 1

    def close(self) -> None:
        self._socket.close()

    def _drain(self) -> None:
        # What a guest said before it was reset is no answer to what is asked now.
        self._socket.settimeout(0.0)
        try:
            while True:
                data = self._socket.recv(65536)
                if not data:
                    break
                self._pending += data
        except OSError:
            pass
        *lines, rest = self._pending.split(b"\n")
        self.boots += sum(b'"up":true' in line for line in lines)
        self._pending = rest if b"up" in rest else b""

    def _line(self, deadline: float, what: str) -> dict[str, Any]:
        while True:
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestSilent(f"no answer to {what!r}; so far {self._pending[-200:]!r}")
                self._socket.settimeout(left)
                try:
                    data = self._socket.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    raise GuestSilent(f"the guest's serial port was closed while waiting for {what!r}")
                self._pending += data
            line, self._pending = self._pending.split(b"\n", 1)
            # A reset cuts a line short and puts noise before the next one.
            start = line.find(b"{")
            try:
                found = json.loads(line[start:]) if start >= 0 else None
            except ValueError:
                start = line.rfind(b'{"up"')
                found = {"up": True} if start >= 0 else None
            if isinstance(found, dict):
                return found
