"""The records of a range of a journal, wherever they are: in the spool, in the repository, or partly in each.

    reading ─► spool has all of it ─────────────────────────────► work
            └► a folder of links to the spool, and of what was ───► work
               shipped and is forgotten here, fetched

The spool goes on being written and forgotten meanwhile.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from appliance.errors import SegmentCorrupt, SequenceMissing
from appliance.journal import Journal

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["Range", "reading", "sweep"]

# Nobody needs a folder of fetched segments for so long.
_PREFIX, _ABANDONED = "journal-", 86400.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Range:
    """Records after < number <= upto of the journal of that id, which is a domain's."""

    uuid: str
    journal: str
    after: int
    upto: int


def reading(repo: Repository, spool: Path, cache: Path, wanted: Range, work: Callable[[Journal], T]) -> T:
    """What `work` makes of the records: read from the spool, or from what was shipped where that was forgotten here, or
    is damaged, also while `work` was at it (it begins again then). Raises SequenceMissing when they are nowhere,
    SegmentCorrupt when they are damaged here and were not shipped, and as `work`."""
    damage: SegmentCorrupt | None = None
    if spool.is_dir():
        with Journal(spool) as journal:
            try:
                if _holds(journal, wanted):
                    return work(journal)
            except SequenceMissing:
                pass
            except SegmentCorrupt as error:
                damage = error
    try:
        with _collected(repo, spool, cache, wanted, _number(damage)) as journal:
            return work(journal)
    except SequenceMissing:
        if damage is not None:
            raise damage from None
        raise


def _number(damage: SegmentCorrupt | None) -> int:
    """With which record the damaged segment begins; 0 for none."""
    name = "" if damage is None else Path(damage.fields["path"]).name[:20]
    return int(name) if name.isdecimal() else 0


def _holds(journal: Journal, wanted: Range) -> bool:
    """Whether this folder has all of them, now."""
    try:
        parts = journal.covering(wanted.after + 1, wanted.upto)
        return all(journal.open(part).header.journal.hex() == wanted.journal for part in parts)
    except SequenceMissing:
        return False


@contextmanager
def _collected(repo: Repository, spool: Path, cache: Path, wanted: Range, damaged: int) -> Iterator[Journal]:
    """A journal of what was shipped and of what is only here, in a folder that goes afterwards. Of what is here only
    segments behind the `damaged` one count: there must be no hole."""
    from appliance.capture.ship import fetch

    sweep(cache)
    with TemporaryDirectory(dir=cache, prefix=_PREFIX) as folder:
        shipped, fetched = Path(folder, "shipped"), wanted.after
        _link(spool, folder, wanted.upto, damaged)
        # What could only be named by its path may be forgotten while what is missing is fetched.
        while fetched < (until := min(wanted.upto, (_first_here(Path(folder), wanted) or wanted.upto + 1) - 1)):
            fetch(repo, wanted.uuid, wanted.journal, shipped, wanted.after, until).close()
            fetched = until
        _link(shipped, folder, wanted.upto, 0)
        with Journal(Path(folder)) as journal:
            yield journal


def sweep(cache: Path) -> None:
    """Remove folders of processes that were killed: each may be as large as the journal."""
    for folder in cache.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if clock.time() - folder.stat().st_mtime > _ABANDONED:
                rmtree(folder, ignore_errors=True)


def _first_here(folder: Path, wanted: Range) -> int | None:
    """The first number of that journal that the folder has; None when it has none of it."""
    with Journal(folder) as journal:
        for part in journal.parts:
            with suppress(SequenceMissing):  # it is gone
                if journal.open(part).header.journal.hex() == wanted.journal:
                    return part.first
    return None


def _link(source: Path, folder: str, upto: int, after: int) -> None:
    """All that begins by then, and behind `after`; the newest first: the oldest are forgotten first, and there must be
    no hole."""
    for path in sorted(source.glob("0*"), reverse=True):
        link = Path(folder, path.name)
        first = int(path.name[:20])
        if path.suffix not in (".rwj", ".open") or not after < first <= upto or link.exists():
            continue
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(path)  # it stays when the spool forgets it
        except FileNotFoundError:
            continue
        except OSError:
            link.symlink_to(path)  # the spool is on a disk of its own
