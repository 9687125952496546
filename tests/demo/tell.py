"""What the demo says: sentences for people, or JSON lines (`demo-step` …, the last one `demo`)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Teller", "human_bytes"]


def human_bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


# What a figure's name alone does not tell a person.
_MEANING = {"answer_seconds": "answer seconds (from the command, with the guest's boot)"}


class Teller:
    """Writes to standard output at once, so that a person sees the guest boot."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.steps: list[tuple[str, float]] = []
        self._began = time.monotonic()

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """One timed step; what the body puts into the dictionary is told with it."""
        if not self.as_json:
            print(f"\n{name}", flush=True)
        found: dict[str, Any] = {}
        started = time.monotonic()
        yield found
        seconds = time.monotonic() - started
        self.steps.append((name, seconds))
        if self.as_json:
            self._line({"type": "demo-step", "step": name, "seconds": round(seconds, 3), **found})
        else:
            for key, value in found.items():
                print(f"    {_named(key)}: {_readable(key, value)}")
            print(f"    {seconds:.1f} s", flush=True)

    def say(self, text: str) -> None:
        if not self.as_json:
            print(f"    {text}", flush=True)

    def table(self, title: str, rows: list[list[str]]) -> None:
        """For people only: the same is in the steps."""
        if self.as_json or not rows:
            return
        print(f"\n{title}")
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        sys.stdout.flush()

    def end(self, result: dict[str, Any]) -> None:
        if self.as_json:
            self._line({"type": "demo", **result})
            return
        self.table("Where the time went", [[name, f"{seconds:.1f} s"] for name, seconds in self.steps])
        print()
        for key, value in result.items():
            print(f"{_named(key)}: {_readable(key, value)}")
        sys.stdout.flush()

    def _line(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)


def _named(key: str) -> str:
    return _MEANING.get(key, key.replace("_", " "))


def _readable(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return human_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {_readable(k, v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_readable(key, v) for v in value)
    return str(value)
