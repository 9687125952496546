"""Where the plugin that writes journals is, and how it gets there: compiled from `filters/journal` on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from appliance.process import run

__all__ = ["build", "plugin"]

_SOURCE: Final = Path(__file__).resolve().parents[2] / "filters" / "journal"
_NAME: Final = "nbdkit-journal-plugin.so"
_VARIANTS: Final = ("", "asan", "tsan")


def plugin(variant: str = "") -> Path:
    """The file that nbdkit is to load. `$REWIND_JOURNAL_PLUGIN` names one that a package has installed."""
    given = os.environ.get("REWIND_JOURNAL_PLUGIN")
    return Path(given) if given and not variant else _folder() / variant / _NAME


def build(variant: str = "") -> Path:
    """Compile what is not there or older than its sources; takes seconds the first time. Raises ToolFailed.

    `variant` "asan" or "tsan" has the sanitizers of that name in it. Two processes may do it at the same moment.
    """
    assert variant in _VARIANTS, variant
    path = plugin(variant)
    if path.is_relative_to(_folder()):
        run(["make", "--silent", "-C", _SOURCE, f"BUILD={_folder()}", variant or "plugin"], timeout=120)
    return path


def _folder() -> Path:
    cache = os.environ.get("REWIND_CACHE") or Path.home() / ".cache" / "rewind"
    return Path(cache) / "build" / "journal"
