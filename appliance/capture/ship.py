"""Sealed segments of a journal go to the repository, and come back from there.

    spool ── Shipper.once ──► repository ── fetch ──► folder ──► Journal
                                  └── retire: what points took over goes

Nothing is noted about what was shipped: the repository's listing tells, so a kill at any instant costs at most what was
under way. The journal is only read. A repository that is slow or away makes shipping late and nothing else: the age of
the oldest record that exists on this host alone says how late.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.capture.spool import Sealed, age, journal_of, sealed, size_of, unsealed
from appliance.errors import AlreadyExists, RewindError, SegmentCorrupt, SequenceMissing
from appliance.journal import Journal, Segment
from appliance.timeline.spans import captured

if TYPE_CHECKING:
    from appliance.store import Repository
    from appliance.store.segments import SegmentRef
    from appliance.timeline.ledger import Ledger

__all__ = ["Behind", "Shipment", "Shipper", "fetch", "held", "retire"]

# The listing is asked again after this: somebody may have deleted a damaged segment so that it is shipped anew.
_RELIST_SECONDS: Final = 600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Behind:
    """What exists in the spool alone. `seconds` is the age of the oldest such record, 0 when there is none: what the
    loss of the host would cost now. `segments` of them are sealed, with `bytes`."""

    seconds: float
    segments: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Shipment:
    """What one pass did: segments, bytes of their files, bytes of their objects. `refused` are segments that can never
    be shipped as they are (damaged, or another one of that name is there); they are left out and told each time."""

    segments: int
    bytes: int
    stored: int
    behind: Behind
    refused: tuple[RewindError, ...] = ()


class Shipper:
    """Ships one spool folder. One thread uses it; two processes at once do no harm but double work.

    `rate` in bytes a second as they are stored, 0 for no limit. When `stop` is set a pass ends behind the segment that
    is under way. With a `ledger` a copy of it is kept in the repository, and always before the records whose span it
    ended; records that it has not confirmed wait. So whatever was shipped and follows from a point in the copy counts.
    """

    def __init__(
        self,
        repo: Repository,
        domain_uuid: str,
        spool: Path,
        *,
        ledger: Ledger | None = None,
        rate: int = 0,
        stop: threading.Event | None = None,
    ) -> None:
        self._repo = repo
        self._ledger = ledger
        self._told: object = None
        self._uuid = domain_uuid
        self._spool = spool
        self._stop = stop or threading.Event()
        self._pace = _Pace(rate, self._stop)
        self._shipped: set[tuple[str, int, int]] = set()
        self._listed: float | None = None
        self._journals: dict[Sealed, str] = {}
        self._refused: set[Sealed] = set()  # which was told

    def once(self, after: int = 0) -> Shipment:
        """Ship what is sealed and not there yet, oldest first. What ends at or before `after` is not wanted any more.

        Raises what the store raises; what came before is shipped then, and the next call goes on there. OSError when
        the spool cannot be read.
        """
        self._list()
        count = size = stored = 0
        refused: list[RewindError] = []
        pending = self._pending(after)
        unconfirmed = self._tell()
        for one in pending:
            if self._stop.is_set():
                break
            if unconfirmed(one):
                continue
            try:
                ref = self._ship(one)
                count, size, stored = count + 1, size + size_of(one.path), stored + ref.stored
            except FileNotFoundError:
                continue  # forgotten by the journal meanwhile
            except (SegmentCorrupt, AlreadyExists) as error:
                if one not in self._refused:
                    _log.error("%s is not shipped: %s", one.path, error)
                self._refused.add(one)
                refused.append(error)
        return Shipment(count, size, stored, self.behind(after), tuple(refused))

    def behind(self, after: int = 0) -> Behind:
        """Asks the spool, not the repository: works while that is away. Before the first listing came through nothing
        counts as shipped."""
        paths = [one.path for one in self._pending(after)]
        ages = (age(path) for path in [*paths, *unsealed(self._spool)])
        oldest = next((one for one in ages if one is not None), 0.0)
        return Behind(oldest, len(paths), sum(map(size_of, paths)))

    def shipped(self, after: int = 0) -> int:
        """The last number up to which everything that the spool holds is in the repository, as far as is known here;
        0 when not even the first segment is. The spool may forget that much. `after` as in `once`: what can never be
        shipped must not fill the spool for ever."""
        last = 0
        for one in self._sealed():
            if one.last > after and not self._is_there(one):
                break
            last = one.last
        return last

    def _tell(self) -> Callable[[Sealed], bool]:
        """Bring the copy of the ledger up to date; which segments still wait for a look at the capture.

        What is open is asked before the copy is made: should it end in between the copy says so already.
        """
        if self._ledger is None:
            return lambda _: False
        lines = self._ledger.lines()
        running = [span for span in captured(lines) if span.open]
        stamp = [(line.number, line.upto if line.what == "confirmed" else 0) for line in lines[-1:]], len(lines)
        if lines and stamp != self._told:
            self._repo.put_ledger(self._uuid, self._ledger.exported())
            self._told = stamp
        if not running:
            return lambda _: False
        journal, last = running[-1].journal, running[-1].last
        return lambda one: one.last > last and self._journals.get(one) == journal

    def _list(self) -> None:
        now = time.monotonic()
        if self._listed is None or now - self._listed > _RELIST_SECONDS:
            self._shipped = {(ref.journal, ref.first, ref.last) for ref in self._repo.segments(self._uuid)}
            self._listed = now

    def _sealed(self) -> list[Sealed]:
        found = sealed(self._spool)
        if len(self._journals) > len(found):
            present = set(found)
            self._journals = {one: journal for one, journal in self._journals.items() if one in present}
        return found

    def _pending(self, after: int) -> list[Sealed]:
        return [one for one in self._sealed() if one.last > after and not self._is_there(one)]

    def _is_there(self, one: Sealed) -> bool:
        # The name is not enough: a spool that was emptied by hand begins a new journal, at number 1.
        journal = self._journals.get(one) or journal_of(one.path)
        if journal is None:
            return False
        self._journals[one] = journal
        return (journal, one.first, one.last) in self._shipped

    def _ship(self, one: Sealed) -> SegmentRef:
        journal = _verified(one.path, one.first, one.last)
        ref = self._repo.put_segment(self._uuid, journal, one.first, one.last, one.path, self._pace)
        self._shipped.add((journal, one.first, one.last))
        return ref


class _Pace:
    """Waits so that not more than `rate` bytes a second go out, on average over the last piece."""

    def __init__(self, rate: int, stop: threading.Event) -> None:
        self._rate = rate
        self._stop = stop
        self._free_at = time.monotonic()

    def __call__(self, size: int) -> None:
        if not self._rate:
            return
        now = time.monotonic()
        pause = max(self._free_at - now, 0.0)
        self._free_at = now + pause + size / self._rate
        self._stop.wait(pause)


def held(repo: Repository, domain_uuid: str, journal: str) -> list[tuple[int, int]]:
    """(first, last) of each run of numbers that the repository has without a hole, ascending. Raises what the store
    raises."""
    runs: list[tuple[int, int]] = []
    for ref in _of_journal(repo, domain_uuid, journal):
        if runs and ref.first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(runs[-1][1], ref.last))
        else:
            runs.append((ref.first, ref.last))
    return runs


def fetch(
    repo: Repository,
    domain_uuid: str,
    journal: str,
    folder: Path,
    after: int,
    upto: int,
    progress: Callable[[int, int], None] | None = None,
) -> Journal:
    """A journal over `folder` (made when it is not there), which then has the segments with after < number <= upto;
    those that it has already are not moved again. One folder belongs to one journal.

    Every file is what was shipped, byte for byte, before it has its name; records are verified when they are read.
    Raises SequenceMissing with the first number that is not in the repository, SegmentCorrupt when it is another
    journal's folder, and what the store raises; the files that were complete stay.
    """
    chosen = _covering(_of_journal(repo, domain_uuid, journal), after, upto, f"{repo.url} ({journal})")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        for done, ref in enumerate(chosen):
            path = folder / f"{ref.first:020}-{ref.last:020}.rwj"
            if not path.exists():
                repo.fetch_segment(ref, path)
            if _verified(path, ref.first, ref.last) != journal:
                raise SegmentCorrupt(path=path, position=0, reason=f"it is not of journal {journal}")
            if progress is not None:
                progress(done + 1, len(chosen))
    return Journal(folder)


def retire(repo: Repository, domain_uuid: str, journal: str, upto: int) -> tuple[int, int]:
    """Delete the segments that end at or before that number, oldest first, and what is left of broken shipping of such.
    (segments, bytes) that became free. Raises what the store raises; again, it goes on.

    A shipper whose spool still has them would ship them again: give it the same number as `after`.
    """
    count = freed = 0
    for ref in repo.segments(domain_uuid, whole=False):
        if ref.journal == journal and ref.last <= upto:
            repo.delete_segment(ref)
            count, freed = count + ref.whole, freed + ref.stored
    return count, freed


def _of_journal(repo: Repository, domain_uuid: str, journal: str) -> list[SegmentRef]:
    return [ref for ref in repo.segments(domain_uuid) if ref.journal == journal]


def _covering(refs: list[SegmentRef], after: int, upto: int, where: str) -> list[SegmentRef]:
    """The fewest that hold the range. Raises SequenceMissing."""
    chosen: list[SegmentRef] = []
    expected = after + 1
    while expected <= upto:
        best = max((r for r in refs if r.first <= expected <= r.last), key=lambda r: r.last, default=None)
        if best is None:
            later = min((ref.first for ref in refs if ref.first > expected), default=None)
            reason = "nothing later was shipped" if later is None else f"what follows begins with {later}"
            raise SequenceMissing(path=where, sequence=expected, reason=reason)
        chosen.append(best)
        expected = best.last + 1
    return chosen


def _verified(path: Path, first: int, last: int) -> str:
    """The journal of a sealed segment whose header and footer are what its name says. Raises SegmentCorrupt."""
    with Segment(path) as segment:
        if (segment.first, segment.last) != (first, last):
            raise SegmentCorrupt(path=path, position=0, reason="it has the name of another segment")
        return segment.header.journal.hex()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that fetch into one folder take turns."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
