"""Logging: standard `logging`, one line a record, and a place for the traceback of a bug.

Every module has `getLogger(__name__)`; INFO is what a human wants in a post-mortem. Nothing is printed unless asked
for: the command line's own words come from `cli.output`. No secret is ever logged.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["keep_traceback", "to_file", "to_stderr"]

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
_CLOCK = "%Y-%m-%dT%H:%M:%S"


def to_stderr(level: int = logging.INFO) -> None:
    """What `--verbose` and the daemon do."""
    _add(logging.StreamHandler(sys.stderr), level)


def to_file(path: Path, level: int = logging.INFO) -> None:
    """Append to a file that only we may read. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.close(handle)
    _add(logging.FileHandler(path), level)


def keep_traceback(error: BaseException, home: Path | None) -> Path:
    """Write the traceback of a bug into the home's log folder, or where temporary files go if that is not possible."""
    text = f"rewind {' '.join(sys.argv[1:])}\n" + "".join(traceback.format_exception(error))
    name = f"bug-{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.log"
    for folder in (*((home / "log",) if home else ()), Path(tempfile.gettempdir())):
        path: Path = folder / name
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            continue
        with os.fdopen(handle, "w") as file:
            file.write(text)
        return path
    sys.stderr.write(text)
    return Path("the lines above")


def _add(handler: logging.Handler, level: int) -> None:
    formatter = logging.Formatter(_FORMAT, _CLOCK)
    handler.setFormatter(formatter)
    root = logging.getLogger("appliance")
    root.addHandler(handler)
    root.setLevel(level)
