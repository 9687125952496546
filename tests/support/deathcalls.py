"""Death at a chosen call of the operating system, for tests that fork and look at what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

__all__ = ["die_at"]


def die_at(number: int, calls: Iterable[str]) -> None:
    """Make this process kill itself just before (even) or just after its `number // 2`-th call of these of `os`."""
    count = 0

    def watched(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            mine = count
            if mine == number // 2 and number % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if mine == number // 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in calls:
        setattr(os, name, watched(getattr(os, name)))
