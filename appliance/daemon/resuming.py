"""Going on with what was interrupted, in most cases because the host was started anew.

    reverts that nobody drives any more                    → service.resume, a worker for each
    domains that were brought up from a point, and whose
    disks nobody fills any more                            → service.image.starting.resume   } two workers
    machines that boot from here, and that nobody serves   → service.image.streaming.resume  } for all of them

What is to be done is read anew in each round, and nothing of it is written down: whoever comes first does it, a verb or
the daemon, and the other one finds it locked, gone or done. Only the pauses after a failure are the daemon's own.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from appliance.daemon.shared import Shared, Tries, why
from appliance.errors import Locked, NothingToResume, RewindError
from appliance.process import lives
from appliance.restore import hydrations, streams
from appliance.service.recovery import resume
from appliance.service.underway import Pending, abandoned, under_way

__all__ = ["BroughtUp", "Reverts"]

log = logging.getLogger(__name__)

# The keys among what is running, of what was brought up: two at a time, since each may wait for a minute for a
# repository that is away, and points are due meanwhile.
_IMAGES = ("images 1", "images 2")


class Reverts:
    """Those that were interrupted. `start` belongs to the loop's thread."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._tries = Tries()  # by the domain's uuid

    def start(self, pool: ThreadPoolExecutor) -> set[str]:
        """Reverts that nobody drives go on. Returns the domains of all reverts: no point can be taken of them now."""
        own, running = self._shared.own, self._shared.running
        try:
            held = {one.uuid for one in under_way(own)}
            waiting = abandoned(own) if held else []
        except RewindError as error:
            log.warning("reverts of %s: %s", self._shared.home.path, error)
            return set()
        self._tries.keep(held)
        for one in waiting:
            tried = self._tries[one.uuid]
            if one.uuid not in running and tried.may_again:
                running[one.uuid] = pool.submit(self._resume, one, tried.failures)
        return held

    def _resume(self, pending: Pending, failures: int) -> None:
        try:
            with self._shared.session() as session:
                results = resume(session, pending.uuid)
        except Locked as error:
            log.info("revert of %s: %s", pending.domain, error)  # somebody else has come first
            self._tries.note_held(pending.uuid)
        except NothingToResume:
            pass
        except Exception as error:  # noqa: BLE001  see `why`
            self._failed(pending, failures, why(f"revert of {pending.domain}", error))
        else:
            self._tries.pop(pending.uuid, None)
            for one in results:
                self._shared.say("resumed", one.domain, f"the interrupted {one.verb} to {one.point}: {one.state}")
        finally:
            self._shared.wake.set()

    def _failed(self, pending: Pending, failures: int, detail: str) -> None:
        self._tries.note(pending.uuid, failures + 1)
        self._shared.say("failed", pending.domain, f"the interrupted revert to {pending.target}: {detail}")


class BroughtUp:
    """Domains and machines that were brought up and whose disks nobody fills any more. Their names are theirs alone,
    whichever of both they are. `start` belongs to the loop's thread."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._tries = Tries()
        self._choosing = threading.Lock()
        self._taken: set[str] = set()  # what a worker has in hand; changed with _choosing held

    def start(self, pool: ThreadPoolExecutor) -> None:
        """As many workers as are free, while there is something for them."""
        self._tries.keep([*hydrations.names(self._shared.home), *streams.names(self._shared.home)])
        for key in _IMAGES:
            if key not in self._shared.running and self._waiting(time.time()):
                self._shared.running[key] = pool.submit(self._resume_each)

    def _waiting(self, before: float) -> list[tuple[int, bool, str]]:
        """(failures, a domain and no machine, name) of what nobody works for and was last tried before then. First what
        never failed: a machine that lives and has just lost its server must not wait for what does not come back."""
        found = []
        for kind in (hydrations, streams):
            for name in set(kind.unfinished(self._shared.home)) - self._taken:
                tried = self._tries[name]
                ready = tried.when < before and tried.may_again
                if ready and not lives(kind.state(self._shared.home, name).get("key", "")):
                    found.append((tried.failures, kind is hydrations, name))
        return sorted(found)

    def _resume_each(self) -> None:
        """One after the other, each once."""
        began = time.time()
        try:
            while not self._shared.stopped.is_set() and self._resume_next(began):
                pass
        finally:
            self._shared.wake.set()

    def _resume_next(self, began: float) -> bool:
        """Whether there was one. Looks anew before each: it may have been forgotten, or have ended."""
        with self._choosing:
            waiting = self._waiting(began)
            if not waiting:
                return False
            failures, filled, name = waiting[0]
            self._taken.add(name)
        try:
            self._resume(name, filled, failures)
        finally:  # also when what came of it cannot be told: it would never be tried again
            with self._choosing:
                self._taken.discard(name)
        return True

    def _resume(self, name: str, filled: bool, failures: int) -> None:
        from appliance.service.image import starting, streaming

        try:
            with self._shared.session() as session:
                if filled:
                    starting.resume(session, name)
                else:
                    streaming.resume(session, name)
        except Locked as error:
            log.info("image %s: %s", name, error)  # whoever begins or forgets it has come first
            self._tries.note_held(name)
        except Exception as error:  # noqa: BLE001  see `why`
            self._failed(name, failures, why(f"image {name}", error))
        else:
            self._tries.note(name, 0)
            self._shared.say("resumed", name, "its disks are being filled again" if filled else "it is served again")

    def _failed(self, name: str, failures: int, detail: str) -> None:
        self._tries.note(name, failures + 1)
        if name in hydrations.names(self._shared.home) or name in streams.names(self._shared.home):
            self._shared.say("failed", name, detail)
        else:
            log.info("image %s was forgotten meanwhile: %s", name, detail)
