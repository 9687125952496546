"""The terminal: tables and the progress line.

Tables are plain text when standard output is no terminal, so that they can be grepped. They are drawn here, in a few
lines: a table of 10 000 recovery points has to be there at once, and a library for terminals takes seconds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence

from appliance.cli import records
from appliance.cli.text import progress_line

__all__ = ["show_progress", "table"]

_GAP = "  "
_STYLES = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[1;31m", "late": "\x1b[33m", "gap": "\x1b[33m"}
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table as text; `right` names the columns that hold numbers. Empty without rows."""
    if not rows:
        return ""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    adjust: list[Callable[[str, int], str]] = [str.rjust if name in right else str.ljust for name in columns]
    coloured = sys.stdout.isatty()
    head = _row(columns, widths, adjust)
    lines = [f"{_BOLD}{head}{_PLAIN}" if coloured else head]
    for row in rows:
        line = _row(row, widths, adjust)
        style = next((_STYLES[cell] for cell in row if cell in _STYLES), "") if coloured else ""
        lines.append(f"{style}{line}{_PLAIN}" if style else line)
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int], adjust: Sequence[Callable[[str, int], str]]) -> str:
    return _GAP.join(how(cell, width) for how, cell, width in zip(adjust, cells, widths, strict=True)).rstrip()


def show_progress(progress: records.Progress, last: bool) -> None:
    """Write over the line that was there; the last call removes it."""
    text = "" if last else progress_line(progress)[: shutil.get_terminal_size().columns - 1]
    sys.stderr.write("\r\x1b[K" + text)
    sys.stderr.flush()
