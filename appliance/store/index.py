"""Which pack holds a record: immutable runs in the cache folder, and a dict of what came since.

    backend  packs/*  ──tables──►  dict (new)  ──over a limit──►  run, run, run  ──too many──►  one larger run

Everything here is made from the tables of packs alone, so it is a cache: a run that is missing or damaged is dropped
and its packs are read again. Other processes' runs in the folder are used as well. A record may lie in several packs
(two writers, a merge that has not ended); any place in a pack that is there and undamaged will do.

Not listed when it is opened: as long as nothing is missing, nothing need be asked of the backend.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final

from appliance.errors import (
    IntegrityError,
    NoSpace,
    ObjectNotFound,
    PermissionDenied,
    StoreError,
    VersionUnsupported,
)
from appliance.store.backend.base import Backend
from appliance.store.codec import Codec
from appliance.store.pack import PREFIX, Entry, pack_id, pack_name, read_table
from appliance.store.run import SUFFIX, TAG, WHERE, Run, merged, where, write_run

__all__ = ["Index"]

# About 60 MiB of dict.
_NEW_RECORDS: Final = 300_000
# Each process that opens the repository reads the tables of packs in no run: keep these few.
_NEW_PACKS: Final = 32
_RUNS: Final = 6
_READERS: Final = 8
_BATCH: Final = 256


class Index:
    """Thread-safe. `find` takes no lock; `_lock` guards every change of the fields, `_refreshing` is held while the
    backend is listed and tables are read. Fields that `find` reads are replaced whole, never changed in place, except
    `_new`, to which keys are only added.
    """

    def __init__(self, backend: Backend, codec: Codec, folder: Path) -> None:
        self.unreadable: dict[bytes, StoreError] = {}
        self._backend = backend
        self._codec = codec
        self._folder = folder
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._runs: tuple[Run, ...] = ()
        self._new: dict[bytes, bytes] = {}
        self._new_packs: dict[bytes, int] = {}
        self._live: dict[bytes, bytes] = {}  # tag -> id of every pack that is there
        self._avoided: frozenset[bytes] = frozenset()  # tags
        self._damaged: dict[bytes, frozenset[bytes]] = {}  # tag -> records; empty: all of them
        self._sizes: dict[bytes, int] = {}  # of listed packs, by id
        self._listed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cache_error(folder, error) from error
        self._load_runs()
        self._live = self._covered()

    def find(self, record: bytes, avoid: bool = False) -> tuple[bytes, int, int] | None:
        """(pack id, offset, length) or None. With `avoid`, packs about to be dropped do not count."""
        return next(self.places(record, avoid), None)

    def places(self, record: bytes, avoid: bool = False) -> Iterator[tuple[bytes, int, int]]:
        """As `find`, every copy."""
        # _new before _runs: a record moves from the first to the second, and must not be missed in between.
        found = self._new.get(record, b"")
        runs = self._runs
        for start in range(0, len(found), WHERE):
            if (result := self._usable(record, found[start : start + WHERE], avoid)) is not None:
                yield result
        for run in runs:
            for place in run.find(record):
                if (result := self._usable(record, place, avoid)) is not None:
                    yield result

    def usable(self, record: bytes, place: bytes) -> bool:
        """Whether that copy is in a pack that is there, and not known to be damaged."""
        return self._usable(record, place, False) is not None

    def _usable(self, record: bytes, place: bytes, avoid: bool) -> tuple[bytes, int, int] | None:
        tag = place[:TAG]
        pack = self._live.get(tag)
        if pack is None or (avoid and tag in self._avoided):
            return None
        if self._damaged and tag in self._damaged and (not self._damaged[tag] or record in self._damaged[tag]):
            return None
        return pack, int.from_bytes(place[TAG : TAG + 4], "big"), int.from_bytes(place[TAG + 4 :], "big")

    @property
    def packs(self) -> dict[bytes, int]:
        """Size of every listed pack by id, as of the last refresh, with those added since."""
        return dict(self._sizes)

    def avoid(self, packs: Iterable[bytes]) -> None:
        """Replace the set of packs that a writer must not rely on."""
        self._avoided = frozenset(pack[:TAG] for pack in packs)

    @property
    def avoided(self) -> frozenset[bytes]:
        """Tags of the packs that are about to be dropped."""
        return self._avoided

    def damaged(self, records: dict[bytes, frozenset[bytes]]) -> None:
        """Replace the records known to be damaged: by pack id; an empty set stands for the whole pack."""
        self._damaged = {pack[:TAG]: ids for pack, ids in records.items()}

    def table(self, pack: bytes) -> list[Entry]:
        """The records of a pack, read anew. Raises IntegrityError, ObjectNotFound, what the backend raises."""
        size = self._sizes.get(pack)
        if size is None:
            size = self._backend.stat(pack_name(pack)).size
        return read_table(self._backend, self._codec, pack, size)

    def add(self, pack: bytes, size: int, entries: Iterable[Entry]) -> None:
        """A pack that is durable now."""
        with self._lock:
            self._sizes[pack] = size
            self._live = {**self._live, pack[:TAG]: pack} if pack[:TAG] not in self._live else self._live
            self._new_packs[pack] = size
            for entry in entries:
                place = where(pack, entry.offset, entry.length)
                known = self._new.get(entry.id)
                # Every copy is kept: any of them may be the one that stays when a gc drops the others.
                self._new[entry.id] = place if known is None else known + place
            full = len(self._new) >= _NEW_RECORDS
        if full:
            self.tidy()

    def free_tag(self, pack: bytes) -> bool:
        """Whether no known pack shares the tag that places name packs by."""
        return pack[:TAG] not in self._live

    def refresh(self) -> None:
        """Learn of packs that came and went. A pack whose table cannot be read is put into `unreadable`; its records
        are as good as absent. Raises what the backend raises.
        """
        with self._refreshing:
            with self._lock:
                before = set(self._new_packs)
            self._load_runs()
            listed = {
                pack: info.size for info in self._backend.list(PREFIX) if (pack := pack_id(info.name)) is not None
            }
            with self._lock:
                # What this process added while the listing ran may not be in it.
                listed |= {pack: size for pack, size in self._new_packs.items() if pack not in before}
                covered = {pack for run in self._runs for pack in run.packs} | set(self._new_packs)
                self._sizes = listed
                self._live = {pack[:TAG]: pack for pack in listed}
                self._listed = True
            self.unreadable = {pack: error for pack, error in self.unreadable.items() if pack in listed}
            self._read_tables(sorted(set(listed) - covered - set(self.unreadable)))
            if len(self._new_packs) >= _NEW_PACKS:
                self.tidy()

    def _read_tables(self, packs: list[bytes]) -> None:
        if len(packs) <= 2:
            for pack in packs:
                self._take(pack, self._table(pack))
            return
        remaining = iter(packs)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="tables") as pool:
            while batch := list(islice(remaining, _BATCH)):
                for pack, entries in zip(batch, pool.map(self._table, batch), strict=True):
                    self._take(pack, entries)

    def _table(self, pack: bytes) -> list[Entry] | None:
        try:
            return read_table(self._backend, self._codec, pack, self._sizes[pack])
        except ObjectNotFound:
            return None  # dropped by a gc since it was listed
        except (IntegrityError, VersionUnsupported) as error:
            # Also for a version we do not know: one flipped bit must not close a repository whose own version we know.
            self.unreadable[pack] = error
            return None

    def _take(self, pack: bytes, entries: list[Entry] | None) -> None:
        if entries is not None:
            self.add(pack, self._sizes[pack], entries)

    def verify(self) -> bool:
        """Whether a run was damaged and had to be dropped. What it covered comes back with the next refresh."""
        with self._lock:
            bad = tuple(run for run in self._runs if not run.whole())
            for run in bad:
                run.path.unlink(missing_ok=True)
            self._runs = tuple(run for run in self._runs if run not in bad)
            return bool(bad)

    def tidy(self) -> None:
        """Move what is new into a run and join runs when there are many. A full disk only costs the cache."""
        with contextlib.suppress(OSError), self._lock:
            if self._new:
                self._runs = (*self._runs, self._written((), self._new))
                self._new, self._new_packs = {}, {}
            if len(self._runs) > _RUNS:
                self._join()

    def close(self) -> None:
        """Leave what was learnt to the next process."""
        if len(self._new_packs) >= _NEW_PACKS // 2:
            self.tidy()

    def rebuild(self) -> list[Run]:
        """Forget everything and read every table anew; the runs that were there, which still can be searched."""
        with self._refreshing, self._lock:
            old = list(self._runs)
            if self._new:
                with contextlib.suppress(OSError):
                    old.append(self._written((), self._new))
            for run in old:
                run.path.unlink(missing_ok=True)
            self._runs, self._new, self._new_packs = (), {}, {}
            self.unreadable = {}
        self.refresh()
        return old

    def consolidated(self) -> Run:
        """Everything in one run: for passes that need a number for each record. Refresh before."""
        if self.verify():
            self.refresh()
        try:
            return self._consolidated()
        except OSError as error:
            raise _cache_error(self._folder, error) from error

    def _consolidated(self) -> Run:
        with self._lock:
            if self._new or len(self._runs) != 1 or {pack[:TAG] for pack in self._runs[0].packs} - set(self._live):
                self._replace(self._runs, self._written(self._runs, self._new))
                self._new, self._new_packs = {}, {}
            return self._runs[0]

    def _join(self) -> None:
        """The smaller runs into one, so that a record is rewritten only about log(n) times."""
        with self._exclusive() as mine:
            if mine:
                chosen = tuple(run for run in sorted(self._runs, key=lambda run: run.count)[: _RUNS - 1] if run.whole())
                self._replace(chosen, self._written(chosen, {}))

    def _replace(self, old: tuple[Run, ...], new: Run) -> None:
        self._runs = (new, *(run for run in self._runs if run not in old))
        for run in old:
            run.path.unlink(missing_ok=True)

    def _written(self, runs: tuple[Run, ...], new: dict[bytes, bytes]) -> Run:
        extra = sorted(
            record + places[start : start + WHERE]
            for record, places in new.items()
            for start in range(0, len(places), WHERE)
        )
        packs = {pack for run in runs for pack in run.packs} | set(self._new_packs if new else ())
        live = None
        if self._listed:
            packs = {pack for pack in packs if pack[:TAG] in self._live}
            live = {pack[:TAG] for pack in packs}
        count = sum(run.count for run in runs) + len(extra)
        return write_run(self._folder, sorted(packs), merged(runs, live, extra), count)

    def _covered(self) -> dict[bytes, bytes]:
        return {pack[:TAG]: pack for run in self._runs for pack in run.packs}

    def _load_runs(self) -> None:
        """Open the runs in the folder that are not open yet. One that vanishes meanwhile was joined by its owner."""
        with self._lock:
            known = {run.path for run in self._runs}
            found = list(self._runs)
            for path in sorted(self._folder.glob(f"*{SUFFIX}")):
                if path not in known:
                    with contextlib.suppress(FileNotFoundError):
                        try:
                            found.append(Run(path))
                        except IntegrityError:
                            path.unlink(missing_ok=True)
            self._runs = tuple(found)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """Whether no other process is joining runs in this folder now."""
        file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(file)


def _cache_error(folder: Path, error: OSError) -> StoreError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(url=folder, name="index", hint="the cache folder is full; the repository is not affected")
    return PermissionDenied(url=folder, name="index", reason=error.strerror or str(error))
