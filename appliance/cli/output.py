"""Where results go: JSON lines for a program, text for a person; progress on standard error for either.

    record  ─► --json  one line on standard output          otherwise  its text on standard output
    progress           on standard error when that is a terminal, or when asked for with --progress
    failure ─► --json  the last line on standard output     otherwise  `rewind: …` and `HINT: …` on standard error

Written by one thread, except `Meter.update`, which any thread may call.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from appliance.cli import records

__all__ = ["Meter", "Output"]

_R = TypeVar("_R", bound=records.Record)
# Often enough for a person, seldom enough that a log of a long run stays readable.
_TERMINAL_INTERVAL = 0.2
_LOG_INTERVAL = 2.0
# A command that works on a home; not one that somebody else has typed, or has to type in a home of theirs.
_COMMAND = re.compile(r"`rewind ((?!help )[a-z][^`]*)`(?! of home| in the home| \(process)")


class Show(Protocol):
    """Something that shows progress; made by `ui` for a terminal, or here for a program."""

    def __call__(self, progress: records.Progress, last: bool) -> None: ...


@dataclass(slots=True)
class Output:
    """How this run of the command line speaks. `progress` is None for "on a terminal only". `home` was given by --home:
    a command that a person is told has it too, or it would do its work in another home."""

    json: bool = False
    quiet: bool = False
    progress: bool | None = None
    home: str = ""

    def emit(self, record: records.Record, text: str = "") -> None:
        """One result. `text` is for a person; without it the record is for programs only."""
        if self.json:
            self._line(record)
        elif text and not self.quiet:
            _print(self._at_home(text))

    def emit_all(self, found: Iterable[_R], table: Callable[[list[_R]], str]) -> list[_R]:
        """Many results of one kind: a line each, or one table."""
        every = list(found)
        if self.json:
            for record in every:
                self._line(record)
        elif not self.quiet:
            text = table(every)
            if text:
                _print(self._at_home(text))
        return every

    def tell(self, text: str) -> None:
        """A result for a person only; a program has been given records."""
        if text and not self.json and not self.quiet:
            _print(self._at_home(text))

    def note(self, text: str) -> None:
        """Something that a person should know and a program reads elsewhere; on standard error."""
        if not self.json and not self.quiet:
            print(self._at_home(text), file=sys.stderr, flush=True)

    def fail(self, error: records.Error) -> None:
        """The last words of a run that failed. `--quiet` does not silence them."""
        if self.json:
            self._line(error)
            return
        print(f"rewind: {self._at_home(error.message)}", file=sys.stderr, flush=True)
        if error.hint:
            print(f"HINT: {self._at_home(error.hint)}", file=sys.stderr, flush=True)

    def _at_home(self, text: str) -> str:
        return _COMMAND.sub(self._command, text) if self.home else text

    def _command(self, found: re.Match[str]) -> str:
        return f"`rewind --home {shlex.quote(self.home)} {found[1]}`"

    @contextmanager
    def meter(self, what: str) -> Iterator[Meter]:
        """Progress of one long step; the meter may be updated from any thread and costs little when unseen."""
        meter = Meter(what, *self._show())
        try:
            yield meter
        finally:
            meter.close()

    def _show(self) -> tuple[Show | None, float]:
        if self.quiet or self.progress is False:
            return None, 0.0
        if self.json:
            return (_show_json, _LOG_INTERVAL) if self.progress else (None, 0.0)
        if sys.stderr.isatty():
            from appliance.cli.ui import show_progress

            return show_progress, _TERMINAL_INTERVAL
        return (_show_plain, _LOG_INTERVAL) if self.progress else (None, 0.0)

    @staticmethod
    def _line(record: records.Record) -> None:
        _print(json.dumps(records.to_json(record), ensure_ascii=False))


class Meter:
    """Counts one step. `lock` guards the numbers: capture and restore report from their own threads."""

    def __init__(self, what: str, show: Show | None, interval: float) -> None:
        self._what, self._show, self._interval = what, show, interval
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._began = time.monotonic()
        self._shown = 0.0

    def update(self, done: int, total: int, what: str = "") -> None:
        """The state now, absolute. `total` 0 means unknown; `what` renames the step."""
        if self._show is None:
            return
        with self._lock:
            self._what, self._done, self._total = what or self._what, done, total
            now = time.monotonic()
            if now - self._shown < self._interval:
                return
            self._shown = now
            self._show(self._record(now), False)

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self._show is not None and self._shown:
            self._show(self._record(time.monotonic()), True)

    def _record(self, now: float) -> records.Progress:
        rate = self._done / max(now - self._began, 1e-3)
        left = (self._total - self._done) / rate if rate > 0 and self._total else None
        return records.Progress(self._what, self._done, self._total, rate, left)


def _print(text: str) -> None:
    """One result on standard output. `rewind points | head` is no failure: the reader has what it wanted."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python must not complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _show_json(progress: records.Progress, last: bool) -> None:
    print(json.dumps(records.to_json(progress)), file=sys.stderr, flush=True)


def _show_plain(progress: records.Progress, last: bool) -> None:
    from appliance.cli.text import progress_line

    print(progress_line(progress), file=sys.stderr, flush=True)
