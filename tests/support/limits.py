"""How patient tests are. Their limits are written for a quiet machine."""

from __future__ import annotations

import os

__all__ = ["PATIENCE", "limit"]

# A limit that is passed ends the whole run, and a machine for continuous integration may be shared by many.
PATIENCE = 5.0 if os.environ.get("CI") == "true" else float(os.environ.get("REWIND_TEST_PATIENCE", "2"))


def limit(seconds: float) -> float:
    """A limit inside a test, stretched as pytest's own are: one that is passed first tells what hung, and not only
    that something did."""
    return seconds * PATIENCE
