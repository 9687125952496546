"""Booting newest points as tests, one at a time: of domains whose protection has `verify_every`.

    every round: the first domain whose time to look has come → scheduled.due → a worker → verifying.verify

What was tested is known by its evidence in the repository, so another daemon goes on from there. Here is only when to
look next, and how long to wait after a test that could not be made. A point that does not boot is a test that was made.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from appliance.capture import protection
from appliance.capture.protection import Protection
from appliance.daemon.shared import Shared, pause, why
from appliance.errors import Interrupted, RewindError

if TYPE_CHECKING:
    from appliance.service.image.scheduled import Due
    from appliance.service.image.verifying import Verified

__all__ = ["Verifying"]

log = logging.getLogger(__name__)

_TEST = "test"  # its key among what is running


class Verifying:
    """`start` belongs to the loop's thread."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        # uuid → (when to look, failures in a row). No lock: the loop does not touch it while a test is running.
        self._tested: dict[str, tuple[float, int]] = {}

    def start(self, pool: ThreadPoolExecutor) -> None:
        """At most one: a machine that is tested takes a gigabyte, and a processor for minutes."""
        if _TEST in self._shared.running:
            return
        for record in protection.all_records(self._shared.home):
            when, failures = self._tested.get(record.uuid, (0.0, 0))
            if record.verify_every is None or time.time() < when:
                continue
            found = self._due(record)
            self._tested[record.uuid] = (found.again, failures)
            if found.point:
                self._shared.running[_TEST] = pool.submit(self._test, record, found.point, failures)
                return

    def _due(self, record: Protection) -> Due:
        from appliance.service.image import scheduled

        try:
            return scheduled.due(self._shared.own, record, time.time())
        except RewindError as error:
            log.warning("tests of %s: %s", record.domain, error)
            return scheduled.Due("", time.time() + pause(1))

    def _test(self, record: Protection, point: str, failures: int) -> None:
        from appliance.service.image import verifying

        try:
            with self._shared.session() as session:
                found = verifying.verify(session, record.uuid, point, stopped=self._shared.stopped.is_set)
        except Interrupted:
            pass  # asked to stop: the next daemon begins anew
        except Exception as error:  # noqa: BLE001  see `why`
            self._failed(record, failures, why(f"test of {record.domain}", error))
        else:
            self._tested[record.uuid] = (self._tested[record.uuid][0], 0)
            self._tell(record, point, found)
        finally:
            self._shared.wake.set()

    def _tell(self, record: Protection, point: str, found: Verified) -> None:
        if found.verdict.booted:
            self._shared.say("verified", record.domain, f"{point} boots on {found.target}, in {found.seconds:.0f} s")
        else:
            self._shared.say("failed", record.domain, f"{point} did not boot: {'; '.join(found.verdict.reasons)}")

    def _failed(self, record: Protection, failures: int, detail: str) -> None:
        self._tested[record.uuid] = (time.time() + pause(failures + 1), failures + 1)
        self._shared.say("failed", record.domain, f"its newest point could not be tested: {detail}")
