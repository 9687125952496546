"""The demo's hand on the appliance: the command line and nothing else, as a person would use it."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Appliance", "Failed", "Running"]


class Failed(Exception):
    """A verb ended with an error; the text is its own sentence."""


class Running:
    """A verb that goes on while the demo looks at the guest."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._words = words
        self._log = log.open("w+")
        self._process = subprocess.Popen(words, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self._began = time.monotonic()
        self._ended = 0.0
        self._waiter = threading.Thread(target=self._note_end, daemon=True)
        self._waiter.start()

    def _note_end(self) -> None:
        self._process.wait()
        self._ended = time.monotonic()

    def seconds(self) -> float:
        """How long the command took, once it has ended."""
        self._waiter.join(10)
        return self._ended - self._began

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failed(self) -> bool:
        return self._process.poll() not in (None, 0, 1)

    def text(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def result(self, timeout: float = 300.0) -> dict[str, Any]:
        """Wait for the end; the last line. Raises Failed."""
        code = self._process.wait(timeout)
        return _last_line(self._words, code, self.text(), "")

    def end(self) -> None:
        """Ask it to end, as Ctrl-C or systemd would."""
        if not self.ended:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)


class Appliance:
    """One instance, with its home and its repository in `folder`."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self._base = ["rewind", "--home", str(folder / "home"), "--connect", uri, "--json"]
        self.commands: list[str] = []

    def lines(self, *words: str, timeout: float = 600.0) -> list[dict[str, Any]]:
        """Run a verb; all it printed. Raises Failed with the verb's own sentence."""
        self.commands.append("rewind " + " ".join(words))
        done = subprocess.run([*self._base, *words], capture_output=True, text=True, timeout=timeout)
        _last_line(list(words), done.returncode, done.stdout, done.stderr)
        return _objects(done.stdout)

    def run(self, *words: str, timeout: float = 600.0) -> dict[str, Any]:
        """Run a verb; its last line."""
        return self.lines(*words, timeout=timeout)[-1]

    def begin(self, *words: str) -> Running:
        """Start a verb and go on."""
        self.commands.append("rewind " + " ".join(words))
        return Running([*self._base, *words], self.folder / f"{len(self.commands)}-{words[0]}.log")

    def points(self, domain: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("points", domain) if line["type"] == "point"]

    def wait_points(self, domain: str, enough: Callable[[list[dict[str, Any]]], bool], timeout: float, daemon: Running
                    ) -> list[dict[str, Any]]:
        """Until the list of points is as wanted. Raises Failed when the daemon ended or time is over."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.points(domain)
            if enough(found):
                return found
            if daemon.ended or time.monotonic() > deadline:
                raise Failed(f"{len(found)} points, not those expected; the daemon says:\n{daemon.text()[-3000:]}")
            time.sleep(0.3)


def _objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _last_line(words: list[str], code: int, out: str, err: str) -> dict[str, Any]:
    found = _objects(out)
    # 1 is "done, with warnings".
    if code not in (0, 1) or not found:
        told = found[-1].get("message") if found else ""
        # What should not happen is explained by its traceback, which goes with the world.
        trace = Path(str(found[-1].get("fields", {}).get("traceback", "?"))) if found else Path("?")
        more = trace.read_text() if trace.exists() else (out + err)[-3000:]
        raise Failed(f"{' '.join(words)} (exit code {code}): {told}\n{more}")
    return found[-1]
