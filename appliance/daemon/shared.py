"""What all that the daemon does has in common: whom it tells, what is running, and when what failed is tried again.

    the loop's thread   begins work, which then is in `running` under a key of its own
    a worker's thread   does it in a session of its own, says what came of it, and wakes the loop

A pause is told by failures in a row and not by what failed: a minute after the first, then twice as long, and so on up
to an hour. What somebody else holds is looked at again after seconds, however often it has failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from appliance.errors import RewindError, of_the_system
from appliance.service import Session

__all__ = ["Event", "Shared", "Tried", "Tries", "pause", "why"]

log = logging.getLogger(__name__)

# What could not be ended is tried again after this, then after twice as long, and so on: a person may have to help
# first, and needs the domain's lock for that.
_AGAIN, _AGAIN_AT_MOST = 60.0, 3600.0
# One that starts and ends at once, or that somebody else holds, must not become a loop.
_SOON = 5.0


@dataclass(frozen=True, slots=True)
class Event:
    """`kind`: started, tap, point, verified, resumed, failed, stopped."""

    kind: str
    time: datetime
    domain: str | None
    detail: str


class Shared:
    """`own` is the session of the loop's thread, which alone touches it and `running`; all else may be used from any
    thread. `wake` has the loop look anew, `stopped` has everybody end after what they have in hand."""

    def __init__(self, session: Session, tell: Callable[[Event], None]) -> None:
        self.own, self.home = session, session.home
        self.running: dict[str, Future[None]] = {}
        self.wake, self.stopped = threading.Event(), threading.Event()
        self._tell, self._telling = tell, threading.Lock()

    def session(self) -> Session:
        """One for a worker: a session is for one thread."""
        return Session(self.home, self.own.connect, key=self.own.key)

    def say(self, kind: str, domain: str | None, detail: str) -> None:
        """One call at a time, whatever thread it comes from."""
        with self._telling:
            self._tell(Event(kind, datetime.now(UTC), domain, detail))


class Tried(NamedTuple):
    """When something was last tried, in seconds of Unix, and how often in a row it has failed. `held`: it was not
    tried, since somebody else had it."""

    when: float = 0.0
    failures: int = 0
    held: bool = False

    @property
    def may_again(self) -> bool:
        """Whether the pause after it is over."""
        return time.time() >= self.when + (_SOON if self.held else pause(self.failures))


class Tries(dict[str, Tried]):
    """Of what was never tried, too. No lock: each look and each change is one step, and a key has one worker. What is
    not there any more has to be dropped (`keep`), or another one of its name would begin with its failures."""

    def __missing__(self, key: str) -> Tried:
        return Tried()

    def note(self, key: str, failures: int) -> None:
        """It was tried until now."""
        self[key] = Tried(time.time(), failures)

    def keep(self, keys: Collection[str]) -> None:
        """Those alone."""
        for key in set(self) - set(keys):
            self.pop(key, None)

    def note_held(self, key: str) -> None:
        """Somebody else has it: it is not known whether it would fail once more."""
        self[key] = Tried(time.time(), self[key].failures, held=True)


def pause(failures: int) -> float:
    """Seconds after which it is tried again, for any number of failures: weeks of them must not end the loop."""
    return min(_AGAIN * 2 ** min(failures - 1, 60), _AGAIN_AT_MOST) if failures else _SOON


def why(what: str, error: Exception) -> str:
    """What is told of the error that ended a worker, whose work is `what`. It may be any: a bug in what is done for one
    domain must not end the protection of the others, and its trace is in the log then."""
    if isinstance(error, RewindError):
        return _words(error)
    log.error("%s", what, exc_info=error)
    if isinstance(error, OSError) and (ours := of_the_system(error)) is not None:
        return _words(ours)
    return f"unexpected {type(error).__name__}: {error}"


def _words(error: RewindError) -> str:
    """With the hint: there is nobody whom it could be shown apart."""
    return error.message + (f" ({error.hint})" if error.hint else "")
