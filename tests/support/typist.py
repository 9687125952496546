"""Somebody at the console of a machine of software, who types what it asks for."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["answering", "console_arguments"]


def console_arguments(console: Path, log: Path) -> list[str]:
    """For QEMU: a first serial port that listens at `console` and is written down in `log`."""
    line = f"socket,id=console,path={console},server=on,wait=off,logfile={log}"
    return ["-chardev", line, "-serial", "chardev:console"]


@contextlib.contextmanager
def answering(console: Path, log: Path, question: str, answer: str) -> Iterator[None]:
    """Type `answer` once, when the machine has asked; nothing for no question."""
    over = threading.Event()

    def sit() -> None:
        while not over.wait(0.2):
            if log.exists() and question in log.read_text(errors="replace"):
                with socket.socket(socket.AF_UNIX) as line:
                    line.settimeout(0.2)
                    line.connect(str(console))
                    line.sendall(answer.encode())
                    _listen(line, over)

    person = threading.Thread(target=sit)
    if question:
        person.start()
    try:
        yield
    finally:
        over.set()
        if question:
            person.join()


def _listen(line: socket.socket, over: threading.Event) -> None:
    """A console that nobody reads fills up, and then the machine waits."""
    while not over.is_set():
        with contextlib.suppress(TimeoutError):
            if not line.recv(1 << 16):
                return  # the machine is off
