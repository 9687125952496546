"""Joins small packs, so that reading an instant asks for few objects and so that there are few to list.

Every point leaves two small packs behind, of chunks and of its map. Packs of one size class are joined when there are
enough of them, so a record is rewritten about once for each class it passes. Blocks of maps and chunks go into packs of
their own, the blocks in the order in which a walk over the newest maps comes upon them: a cold walk then reads long
ranges of nothing but map.

All records are copied, dead ones too (gc knows, we do not), before the old packs are deleted. So no record is missing
at any instant, no session has to end first, and a crash leaves at most some records twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from appliance.errors import IntegrityError, Locked, StoreError
from appliance.model import MapRef
from appliance.store import collection
from appliance.store.damaged import load_damaged
from appliance.store.gc import read_records
from appliance.store.node import OFFSET_BITS, block_record, height
from appliance.store.pack import BLOCK, CHUNK_RECORD, Entry, pack_name
from appliance.store.repository import Repository
from appliance.units import KiB, MiB

__all__ = ["MergeReport", "due", "merge", "tidy"]

# Upper bounds of the size classes; larger packs are left alone.
_CLASSES: Final = (128 * KiB, 1 * MiB, 8 * MiB)
ENOUGH: Final = 16
# Blocks that are put in order together; they are held in memory.
_BATCH: Final = 64 * MiB

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class MergeReport:
    """`packs_before` counts those that were joined, `packs_after` what they became."""

    packs_before: int = 0
    packs_after: int = 0
    copied_bytes: int = 0


def due(repo: Repository, at_least: int = ENOUGH) -> list[bytes]:
    """Packs worth joining, as of the last refresh of the index."""
    condemned = {pack for one in collection.load(repo.backend) for pack in one.packs}
    left_out = condemned | set(load_damaged(repo.backend)) | set(repo.index.unreadable)
    sizes = {pack: size for pack, size in repo.index.packs.items() if pack not in left_out}
    chosen: list[bytes] = []
    for low, high in zip((0, *_CLASSES), _CLASSES, strict=False):
        members = [pack for pack, size in sizes.items() if low < size <= high]
        if len(members) >= at_least:
            chosen += members
    return sorted(chosen)


def merge(repo: Repository, progress: Progress | None = None, at_least: int = ENOUGH) -> MergeReport:
    """Join the packs of each size class of which there are `at_least` so many.

    Raises Locked when a gc or merge is at work, IntegrityError, and what the backend raises. Safe at any crash.
    """
    report = MergeReport()
    step = progress or (lambda done, total: None)
    with repo.lock("maintenance", "merge"):
        repo.index.refresh()
        packs = due(repo, at_least)
        if packs:
            with repo.session("merge"):
                _copy_blocks(repo, packs, report, step)
                _copy_chunks(repo, packs, report, step)
                _delete_copied(repo, packs, report)
    return report


def tidy(repo: Repository) -> None:
    """Merge when it is due: for whoever just stored something. Never fails: what cannot be done now is left to the
    next one, and somebody else at it is as good.
    """
    try:
        if due(repo):
            merge(repo)
    except Locked:
        pass
    except StoreError as error:
        _log.warning("small packs were not merged: %s", error)


def _copy_blocks(repo: Repository, packs: list[bytes], report: MergeReport, step: Progress) -> None:
    rank = {record: number for number, record in enumerate(_walk_order(repo))}
    with repo.writer() as writer:
        batch: list[tuple[Entry, bytes]] = []
        held = 0
        for done, pack in enumerate(packs):
            for entry, packed in _records(repo, pack, BLOCK):
                batch.append((entry, packed))
                held += entry.length
            step(done, 2 * len(packs))
            if held >= _BATCH or done + 1 == len(packs):
                # Those of no newest map go to the end, by age of their packs as far as it matters.
                batch.sort(key=lambda item: rank.get(item[0].id, len(rank)))
                for entry, packed in batch:
                    writer.add(BLOCK, entry.id, packed)
                report.copied_bytes += held
                batch, held = [], 0
        writer.flush()
        report.packs_after += writer.packs_written


def _copy_chunks(repo: Repository, packs: list[bytes], report: MergeReport, step: Progress) -> None:
    with repo.writer() as writer:
        for done, pack in enumerate(packs):
            for entry, packed in _records(repo, pack, CHUNK_RECORD):
                writer.add(CHUNK_RECORD, entry.id, packed)
                report.copied_bytes += entry.length
            step(len(packs) + done, 2 * len(packs))
        writer.flush()
        report.packs_after += writer.packs_written


def _records(repo: Repository, pack: bytes, kind: int) -> Iterator[tuple[Entry, bytes]]:
    try:
        yield from read_records(repo, pack, lambda entry: entry.kind == kind)
    except IntegrityError:
        return  # its table is damaged; it stays, for `check` to name it


def _walk_order(repo: Repository) -> Iterator[bytes]:
    """Blocks in the order in which walks over the newest map of each disk come to them, once each."""
    newest: dict[tuple[str, str], MapRef] = {}
    for point in repo.points():
        for disk in point.disks:
            newest[point.domain_uuid, disk.disk] = disk.map
    seen: set[int] = set()
    for ref in newest.values():
        waiting = [(height(ref.size) - 1, ref.place)] if ref.root else []
        while waiting:
            level, place = waiting.pop()
            if (tag := place >> OFFSET_BITS) not in seen:
                seen.add(tag)
                yield block_record(tag)
            if level:
                try:
                    places = repo.blocks.node(place, level).places
                except IntegrityError:
                    continue
                waiting += [(level - 1, one) for one in reversed(places)]


def _delete_copied(repo: Repository, packs: list[bytes], report: MergeReport) -> None:
    """Only packs of which every record has a copy elsewhere: one that could not be read keeps its pack."""
    going = set(packs)
    for pack in packs:
        try:
            entries = repo.index.table(pack)
        except IntegrityError:
            continue
        if all(any(place[0] not in going for place in repo.index.places(entry.id)) for entry in entries):
            repo.backend.delete(pack_name(pack))
            report.packs_before += 1
    repo.index.refresh()
