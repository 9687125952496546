"""The command line, `rewind VERB …`: what a person types and what a program reads.

    __init__ ─► app      the verbs, the options of all verbs, one place where every error becomes a sentence and a code
                ├─ verbs/*    one function for each verb: arguments → service → records
                ├─ records    every `--json` line as a dataclass; JSON.md documents them field by field
                ├─ output     where a record goes: a JSON line, or text for a person
                └─ ui         tables and progress on a terminal

Nothing here is imported before it is needed: `rewind --help` answers in a fraction of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without the program's name by default). Returns the exit code, never raises."""
    from appliance.cli.app import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
