"""Frees what no recovery point needs, beside captures that go on, at any crash.

    mark ─► copy what lives out of packs that are mostly dead ─► condemn those ─► …sessions end… ─► mark again ─► sweep

A pack is never deleted in the same breath in which it is found dead: a writer may just have relied on a chunk in it,
whose point is not committed yet. It is condemned first, which every later session reads; the sessions that were there
at that moment have to end; and what lives is looked up once more before anything is deleted. When nobody is at work
all that happens within one call. collection.py and FORMAT.md ("Dropping") give the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import IntegrityError, ObjectNotFound, VersionUnsupported
from appliance.store import collection
from appliance.store.collection import Collection
from appliance.store.damaged import forget_damaged, load_damaged
from appliance.store.mark import Marks, live_bytes, mark_new
from appliance.store.pack import Entry, label, pack_name
from appliance.store.repository import Repository
from appliance.store.writer import ChunkWriter

__all__ = ["GcReport", "gc", "read_records"]

# A pack less live than this is rewritten. At a half, a repository holds at most twice what lives, and each rewritten
# byte frees at least one.
LIVE_RATIO: Final = 0.5

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class GcReport:
    """Bytes are stored bytes. `waiting` names the holders of sessions that have to end before the condemned packs
    can go; a later gc takes them. Segments of journals are counted and never touched: only their owner lets them go.
    """

    points: int = 0
    packs: int = 0
    live_bytes: int = 0
    dead_bytes: int = 0
    condemned_packs: int = 0
    condemned_bytes: int = 0
    deleted_packs: int = 0
    freed_bytes: int = 0
    copied_bytes: int = 0
    missing_chunks: int = 0
    segments: int = 0
    segment_bytes: int = 0
    waiting: list[str] = field(default_factory=list)
    dry_run: bool = False


def gc(
    repo: Repository, dry_run: bool = False, progress: Progress | None = None, live_ratio: float = LIVE_RATIO
) -> GcReport:
    """Raises Locked when another gc or merge is at work, IntegrityError when a point or a map cannot be read (nothing
    is dropped then: `check` tells, and forgetting the affected points lets gc go on), and what the backend raises.
    Whatever ends it, the next call goes on where this one was.
    """
    report = GcReport(dry_run=dry_run)
    step = progress or (lambda what, done, total: None)
    with repo.lock("maintenance", "gc"):
        repo.index.damaged(load_damaged(repo.backend))
        repo.index.refresh()
        pending = [one for one in collection.load(repo.backend) if one.packs]
        repo.index.avoid(pack for one in pending for pack in one.packs)
        marks = Marks(repo.index.consolidated())
        mark_new(repo, marks, lambda done, total: step("mark", done, total))
        report.points = len(marks.points)
        report.missing_chunks = marks.lost(repo.index)
        journals = repo.segments()
        report.segments, report.segment_bytes = len(journals), sum(ref.stored for ref in journals)
        chosen = _choose(repo, marks, pending, report, live_ratio)
        if dry_run:
            return report
        if chosen:
            pending.append(_condemn(repo, marks, chosen, report, step))
        for one in pending:
            _sweep(repo, marks, one, report, live_ratio)
        for pack in load_damaged(repo.backend).keys() - repo.index.packs.keys():
            forget_damaged(repo.backend, pack)
    return report


def _choose(
    repo: Repository, marks: Marks, pending: list[Collection], report: GcReport, ratio: float
) -> dict[bytes, int]:
    """Live bytes of the packs that are worth dropping."""
    sizes = repo.index.packs
    condemned = {pack for one in pending for pack in one.packs}
    live = live_bytes(marks, sizes, repo.index)
    report.packs, report.live_bytes = len(sizes), sum(live.values())
    report.dead_bytes = sum(sizes.values()) - report.live_bytes
    # One that cannot be read is kept until `check` wrote down that it is given up: maybe it comes back.
    damaged = load_damaged(repo.backend)
    given_up = {pack for pack, records in damaged.items() if not records}
    # One with damaged records goes as soon as each of them that is needed was stored again.
    healed = {
        pack
        for pack, records in damaged.items()
        if all(record not in marks or repo.index.find(record) is not None for record in records)
    }
    unreadable = repo.index.unreadable.keys() - given_up
    chosen = {
        pack: live[pack]
        for pack, size in sizes.items()
        if (live[pack] < ratio * size or pack in healed) and pack not in condemned and pack not in unreadable
    }
    report.condemned_packs = len(chosen)
    report.condemned_bytes = sum(sizes[pack] for pack in chosen)
    return chosen


def _condemn(repo: Repository, marks: Marks, chosen: dict[bytes, int], report: GcReport, step: Progress) -> Collection:
    """Copy what lives in them, durably; then tell everybody; then note who may have relied on them before that."""
    with repo.writer() as writer:
        for done, pack in enumerate(sorted(chosen)):
            if chosen[pack]:
                report.copied_bytes += copy_records(repo, pack, writer, _living(marks))
            step("copy", done + 1, len(chosen))
    one = collection.condemn(repo.backend, chosen)
    repo.index.avoid(chosen)
    _note_sessions(repo, one)
    return one


def _living(marks: Marks) -> Callable[[Entry], bool]:
    return lambda entry: entry.id in marks


def _note_sessions(repo: Repository, one: Collection) -> None:
    collection.put_sessions(repo.backend, one, [h.id for h in repo.locks.holders() if h.mode == "shared"])


def _sweep(repo: Repository, marks: Marks, one: Collection, report: GcReport, ratio: float) -> None:
    """Delete the condemned packs, if the sessions are over. What came alive since is copied; a pack that is mostly
    alive by now (a capture's that was not committed when it was condemned) stays.
    """
    if one.sessions is None:
        _note_sessions(repo, one)
    working = [holder.text for holder in repo.locks.holders() if holder.id in (one.sessions or ())]
    if working:
        report.waiting += working
        return
    mark_new(repo, marks)  # after the sessions were seen to be over, so it finds all that they committed
    repo.index.refresh()
    repo.index.avoid(pack for other in collection.load(repo.backend) for pack in other.packs)
    sizes = repo.index.packs
    going = []
    with repo.writer() as writer:
        for pack in sorted(one.packs & sizes.keys()):
            needed = _needed(repo, marks, pack)
            if needed is None or sum(entry.length for entry in needed) >= max(1, ratio * sizes[pack]):
                continue
            going.append(pack)
            if needed:
                report.copied_bytes += copy_records(repo, pack, writer, set(needed).__contains__)
    collection.mark_sweeping(repo.backend, one)
    for pack in going:
        repo.backend.delete(pack_name(pack))
        report.deleted_packs += 1
        report.freed_bytes += sizes[pack]
    collection.finish(repo.backend, one)
    repo.index.refresh()
    repo.index.avoid(pack for other in collection.load(repo.backend) for pack in other.packs)


def _needed(repo: Repository, marks: Marks, pack: bytes) -> list[Entry] | None:
    """Records of a condemned pack that live and have no copy in a pack that stays. None: that cannot be told."""
    try:
        table = repo.index.table(pack)
    except ObjectNotFound:
        return []
    except (IntegrityError, VersionUnsupported):
        return [] if load_damaged(repo.backend).get(pack) == frozenset() else None
    return [entry for entry in table if entry.id in marks and repo.index.find(entry.id, avoid=True) is None]


def copy_records(repo: Repository, pack: bytes, writer: ChunkWriter, wanted: Callable[[Entry], bool]) -> int:
    """Seal the wanted records of a pack anew into the writer's; stored bytes copied."""
    copied = 0
    for entry, packed in read_records(repo, pack, wanted):
        writer.add(entry.kind, entry.id, packed)
        copied += entry.length
    return copied


def read_records(repo: Repository, pack: bytes, wanted: Callable[[Entry], bool]) -> Iterator[tuple[Entry, bytes]]:
    """The wanted records of a pack, opened but not decompressed. One that cannot be read but has another copy is taken
    from there; one that is lost altogether is left out, for `check` to tell. Raises IntegrityError for a damaged table.
    """
    entries = [entry for entry in repo.index.table(pack) if wanted(entry)]
    if not entries:
        return
    data = repo.backend.get(pack_name(pack))
    box = repo.codec.box("pack", pack)
    for entry in entries:
        sealed = data[entry.offset : entry.offset + entry.length]
        try:
            packed = box.open(entry.offset, label(entry.kind, entry.id), sealed)
        except IntegrityError:
            if (other := repo.reader.packed_or_none(entry.kind, entry.id)) is None:
                continue
            packed = other
        yield entry, packed
