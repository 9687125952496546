"""Proves that every recovery point can be read back, or names exactly what is wrong and which points it affects.

    1 every pack's table is read anew (the index is a cache, so it is no witness); with `read_data` every record too
    2 every point's object is opened, with its lists
    3 every map is walked (walk.py): each node must hash to its id, each chunk must be in a pack found good in 1
    4 the tables of every segment of a journal and of every blob are opened, with `read_data` all of it

Nothing is changed, unless `repair` is given: then what is damaged is written down in the repository, so that nobody
relies on it any more and the next capture that comes across the same content stores it again, which makes the affected
points whole.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import AlreadyExists, IntegrityError, NoSuchPoint, ObjectNotFound, StoreError, VersionUnsupported
from appliance.model import Point
from appliance.store import ledgers, manifest, parted
from appliance.store.codec import Box, decompress
from appliance.store.damaged import forget_damaged, load_damaged, put_damaged
from appliance.store.node import BLOCK_SIZE
from appliance.store.pack import CHUNK_RECORD, Entry, label, pack_name, verify_pack
from appliance.store.repository import Repository
from appliance.store.run import TAG, Run
from appliance.store.walk import Bad, walk
from appliance.units import CHUNK

__all__ = ["Problem", "Report", "check"]

# Threads that open the records of one pack, and how many each of them takes at least. The packs come one after the
# other: a whole one is in memory.
_THREADS: Final = min(4, os.cpu_count() or 1)
_PART: Final = 32
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Problem:
    """`kind`: lost-pack, damaged-pack, damaged-records, missing-chunk, missing-block, damaged-node, damaged-point,
    damaged-timeline, damaged-segment, damaged-ledger, damaged-blob. `object` is the object's name, or the id of what is
    in none. `records` that are lost with it and needed; `points` that cannot be recovered whole because of it, sorted.
    """

    kind: str
    object: str
    reason: str
    records: int = 0
    points: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    problems: list[Problem] = field(default_factory=list)
    points: int = 0
    packs: int = 0
    segments: int = 0
    records_read: int = 0
    bytes_read: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def points_affected(self) -> tuple[str, ...]:
        return tuple(sorted({point for problem in self.problems for point in problem.points}))


def check(repo: Repository, read_data: bool = False, progress: Progress | None = None, repair: bool = False) -> Report:
    """Raises what the backend raises. Safe beside captures, gc and merge."""
    step = progress or (lambda what, done, total: None)
    report = Report()
    with repo.session("check"):
        old = repo.index.rebuild()
        packs = _Packs(repo, step)
        if read_data:
            packs.read(report)
        repo.index.damaged(packs.marked())
        report.packs = len(repo.index.packs)
        points, damaged = _points(repo)
        report.points = len(points) + len(damaged)
        bad = walk(repo, points, step)
        if bad:
            # A gc or a merge may have moved things while we looked.
            repo.index.refresh()
            bad = walk(repo, points, step)
        report.problems = [*packs.problems(bad, old), *damaged, *_timelines(repo), *_ledgers(repo)]
        report.problems += _segments(repo, read_data, report, step)
        report.problems += _blobs(repo, read_data, report)
        if repair:
            packs.write_down()
            repo.index.damaged(load_damaged(repo.backend))
    return report


class _Packs:
    """What is wrong with packs, and which missing record was in which."""

    def __init__(self, repo: Repository, step: Progress) -> None:
        self._repo = repo
        self._step = step
        self._whole: dict[bytes, str] = {pack: _reason(error) for pack, error in repo.index.unreadable.items()}
        self._records: dict[bytes, dict[bytes, str]] = {}
        self._known = load_damaged(repo.backend)

    def read(self, report: Report) -> None:
        """Every record of every pack that has a table."""
        sizes = self._repo.index.packs
        with ThreadPoolExecutor(_THREADS, "check") as pool:
            for done, pack in enumerate(sorted(sizes)):
                if pack not in self._whole:
                    self._read(pack, report, pool)
                self._step("read", done + 1, len(sizes))

    def _read(self, pack: bytes, report: Report, pool: ThreadPoolExecutor) -> None:
        repo = self._repo
        try:
            data = repo.backend.get(pack_name(pack))
            entries = repo.index.table(pack)
        except ObjectNotFound:
            return
        except (IntegrityError, VersionUnsupported) as error:
            self._whole[pack] = _reason(error)
            return
        report.bytes_read += len(data)
        report.records_read += len(entries)
        box, step = repo.codec.box("pack", pack), max(_PART, -(-len(entries) // _THREADS))
        parts = [entries[at : at + step] for at in range(0, len(entries), step)]
        bad: dict[bytes, str] = {}
        for found in pool.map(lambda part: _wrong_ones(repo, box, part, memoryview(data)), parts):
            bad |= found
        try:
            verify_pack(data, repo.codec, pack)
        except (IntegrityError, VersionUnsupported) as error:
            # Header, table or footer; records are named when they are what is wrong.
            bad = bad or {bytes(16): _reason(error)}
        if bad:
            self._records[pack] = bad

    def marked(self) -> dict[bytes, frozenset[bytes]]:
        """In the index's terms: these do not count as stored."""
        found = {**self._known, **dict.fromkeys(self._whole, frozenset[bytes]())}
        for pack, bad in self._records.items():
            if pack not in found or found[pack]:
                found[pack] = found.get(pack, frozenset()) | bad.keys()
        return found

    def problems(self, bad: dict[Bad, set[str]], old: list[Run]) -> Iterator[Problem]:
        """One for each pack, one for each thing that is missing and was in no pack we know."""
        lost: dict[bytes, dict[Bad, set[str]]] = defaultdict(dict)
        for one, points in bad.items():
            if one.kind != "damaged-node" and (pack := self._origin(one.record, old)) is not None:
                lost[pack][one] = points
        for pack in sorted(self._whole.keys() | self._records.keys() | lost.keys()):
            needed = lost.get(pack, {})
            affected = {point for points in needed.values() for point in points}
            yield Problem(*self._kind(pack), records=len(needed), points=tuple(sorted(affected)))
        attributed = {one for ones in lost.values() for one in ones}
        for one, points in sorted(bad.items(), key=lambda item: (item[0].kind, item[0].record)):
            if one not in attributed:
                reason = "it does not hash to its id" if one.kind == "damaged-node" else "no pack holds it"
                yield Problem(one.kind, one.record.hex(), reason, 1, tuple(sorted(points)))

    def _kind(self, pack: bytes) -> tuple[str, str, str]:
        name = pack_name(pack)
        if pack in self._whole:
            return "damaged-pack", name, self._whole[pack]
        if pack in self._records:
            reasons = sorted(set(self._records[pack].values()))
            return "damaged-records", name, f"{len(self._records[pack])} records: {', '.join(reasons)}"
        if pack in self._repo.index.packs:
            return "damaged-records", name, "records that an earlier check wrote down as damaged"
        return "lost-pack", name, "it is gone"

    def _origin(self, record: bytes, old: list[Run]) -> bytes | None:
        for pack, bad in self._records.items():
            if record in bad:
                return pack
        for pack, known in self._known.items():
            if record in known:
                return pack
        for run in old:
            ids = {pack[:TAG]: pack for pack in run.packs}
            for place in run.find(record):
                if place[:TAG] in ids:
                    return ids[place[:TAG]]
        return None

    def write_down(self) -> None:
        """Markers are immutable: a pack with one of an earlier check, and more damage since, gets it anew."""
        for pack, records in self.marked().items():
            if pack in self._repo.index.packs and self._known.get(pack) != records:
                if pack in self._known:
                    forget_damaged(self._repo.backend, pack)
                with suppress(AlreadyExists):  # another check at the same time
                    put_damaged(self._repo.backend, pack, records)


def _wrong_ones(repo: Repository, box: Box, entries: list[Entry], data: memoryview) -> dict[bytes, str]:
    """The ids of those that cannot be read, and why. `data` is their whole pack."""
    return {entry.id: reason for entry in entries if (reason := _wrong(repo, box, entry, data))}


def _wrong(repo: Repository, box: Box, entry: Entry, data: memoryview) -> str:
    """Why the record cannot be read; empty when it can."""
    try:
        sealed = data[entry.offset : entry.offset + entry.length]
        packed = box.open(entry.offset, label(entry.kind, entry.id), sealed)
        plain = decompress(packed, CHUNK if entry.kind == CHUNK_RECORD else BLOCK_SIZE)
    except IntegrityError as error:
        return _reason(error)
    except ValueError as error:
        return str(error)
    if entry.kind == CHUNK_RECORD and (len(plain) != CHUNK or repo.codec.chunk_id(plain) != entry.id):
        return "it does not hash to its id"
    return ""


def _reason(error: StoreError) -> str:
    return str(error.fields.get("reason", error))


def _points(repo: Repository) -> tuple[list[Point], list[Problem]]:
    found: list[Point] = []
    damaged: list[Problem] = []
    for domain, point in repo.point_ids():
        name = manifest.point_name(domain, point)
        try:
            found.append(repo.point(point))
        except NoSuchPoint:
            continue  # deleted since
        except (IntegrityError, VersionUnsupported) as error:
            damaged.append(Problem("damaged-point", name, _reason(error), points=(point,)))
    return sorted(found, key=lambda one: (one.domain_uuid, one.time, one.id)), damaged


def _timelines(repo: Repository) -> Iterator[Problem]:
    for info in list(repo.backend.list(manifest.TIMELINES)):
        try:
            manifest.decode_timeline(repo.codec, info.name, repo.backend.get(info.name))
        except ObjectNotFound:
            continue
        except (IntegrityError, VersionUnsupported) as error:
            yield Problem("damaged-timeline", info.name, _reason(error))


def _ledgers(repo: Repository) -> Iterator[Problem]:
    for uuid in ledgers.domains(repo.backend):
        try:
            repo.ledger(uuid)
        except (IntegrityError, VersionUnsupported) as error:
            yield Problem("damaged-ledger", str(error.fields["object"]), _reason(error))


def _segments(repo: Repository, read_data: bool, report: Report, step: Progress) -> Iterator[Problem]:
    """No point needs one: what is lost with it are instants between points."""
    found = repo.segments()
    for done, ref in enumerate(found):
        try:
            report.bytes_read += parted.prove(repo.backend, repo.codec, ref.name, read_data)
        except ObjectNotFound:
            continue  # deleted since
        except (IntegrityError, VersionUnsupported) as error:
            # Its deletion takes the first part first, so it may have begun behind us.
            if ref in repo.segments(ref.domain_uuid):
                yield Problem("damaged-segment", ref.name, f"{error.fields['object']}: {_reason(error)}")
        report.segments += 1
        step("segments", done + 1, len(found))


def _blobs(repo: Repository, read_data: bool, report: Report) -> Iterator[Problem]:
    """No point needs one: what is lost with it has to be made or added again."""
    for ref in repo.blobs():
        try:
            report.bytes_read += parted.prove(repo.backend, repo.codec, ref.object, read_data)
        except ObjectNotFound:
            continue  # deleted since
        except (IntegrityError, VersionUnsupported) as error:
            if ref in repo.blobs(ref.kind):
                yield Problem("damaged-blob", ref.object, f"{error.fields['object']}: {_reason(error)}")
