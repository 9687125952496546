"""From two maps of a disk to its patch: which 2 KiB differ, without reading what is equal.

Comparing a chunk reads both its contents, and a guest that waits for an instant revert waits for that: without bounds
4 GiB of changes would keep it waiting seconds longer than 64 MiB. So the first 64 MiB of a disk's changes are always
compared, exactly. Of what follows, 16 chunks out of each group of neighbours are; where these differ nearly everywhere
(files that were written anew, databases that were loaded) the rest of the group is taken whole, and otherwise it is
compared too. Taking a chunk whole is never wrong, it only moves more. How much more is bounded: a share `x` of the
group's chunks that differ in little goes unnoticed with probability (1 - x)^16, so that on average at most 2.2 % of a
group move in vain; and of what is nearly whole, a sixteenth. A time limit instead was rejected: scattered small changes
are those that comparing saves most on, sixteenfold, and they would be what it gives up.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from appliance.config import Home
from appliance.model import MapRef
from appliance.restore import keeper
from appliance.restore.intent import DiskIntent
from appliance.restore.patch import FULL_MASK, Patch, PatchInfo, layout_for
from appliance.timeline.diff import changed_chunks, refine
from appliance.timeline.view import write_pending
from appliance.units import KiB

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["correct_patch", "differing", "prepare_patch"]

_UNIT = 2 * KiB
# Chunks that are always compared, and out of how many of the others how many are. Groups grow while they are alike.
_EXACT = 1024
_PROBES = 16
_SMALLEST, _LARGEST = 64, 1024
# Of all bits of the probes: from here on, the rest of their group is taken whole.
_NEARLY_ALL = 15 / 16
# Chunks whose masks are handed on at once.
_BATCH = 256


def differing(
    repo: Repository, now: MapRef, wanted: MapRef, indexes: Sequence[int], *, coarse: bool = False
) -> Iterator[tuple[int, int, bool]]:
    """(chunk, mask of differing 2 KiB, whether the chunk becomes all zero) of those chunks, ascending. The mask may
    say more than differs, see above; with `coarse` it always says everything, and nothing is read."""
    target = repo.map(wanted)
    masks = ((index, FULL_MASK) for index in indexes) if coarse else _masks(repo, now, wanted, indexes)
    while batch := list(islice(masks, _BATCH)):
        first, end = batch[0][0], batch[-1][0] + 1
        if end - first <= 4 * len(batch):  # one walk through what lies close together costs a third of many look-ups
            held = {index for index, _ in target.items(first, end)}
        else:
            held = {index for index, _ in batch if target.get(index)}
        for index, mask in batch:
            yield index, mask, index not in held


def _masks(repo: Repository, now: MapRef, wanted: MapRef, indexes: Sequence[int]) -> Iterator[tuple[int, int]]:
    yield from refine(repo, now, wanted, indexes[:_EXACT], _UNIT)
    at, length, whole_before = _EXACT, _SMALLEST, None
    while at < len(indexes):
        group = indexes[at : at + length]
        at += length
        # Drawn and not every so many: what programs write has patterns. Drawn alike each time: a repetition is one.
        chosen = sorted(random.Random(group[0]).sample(group, min(_PROBES, len(group))))
        probes = dict(refine(repo, now, wanted, chosen, _UNIT))
        whole = sum(map(int.bit_count, probes.values())) >= _NEARLY_ALL * len(chosen) * FULL_MASK.bit_count()
        yield from _of_group(repo, now, wanted, group, {index: probes.get(index, 0) for index in chosen}, whole)
        length = min(2 * length, _LARGEST) if whole_before in (None, whole) else _SMALLEST
        whole_before = whole


def _of_group(
    repo: Repository, now: MapRef, wanted: MapRef, group: Sequence[int], known: dict[int, int], whole: bool
) -> Iterator[tuple[int, int]]:
    if not whole:
        rest = [index for index in group if index not in known]
        known |= dict(refine(repo, now, wanted, rest, _UNIT))
    for index in group:
        if mask := known.get(index, FULL_MASK if whole else 0):
            yield index, mask


def prepare_patch(home: Home, repo: Repository, uuid: str, disk: DiskIntent, now: MapRef) -> PatchInfo:
    """Make the disk's patch from its state `now` to the wanted one, and tell the view what is pending.

    A patch that would be too large becomes coarse: whole chunks move then. An old file is replaced.
    """
    path = home.revert(uuid) / disk.patch
    path.unlink(missing_ok=True)
    indexes = array("Q", changed_chunks(repo, now, disk.wanted))  # 8 bytes each: there may be millions
    layout = layout_for(disk.size, len(indexes))
    pending, chunks, moving, zeroes = array("Q"), 0, 0, 0
    with Patch(path, disk.size, layout=layout) as patch:
        for chunk, mask, zero in differing(repo, now, disk.wanted, indexes, coarse=patch.coarse):
            # Counted here, though the patch tells all of it: reading it again takes as long as making it.
            if marked := patch.mark(chunk, mask, zero):
                chunks += 1
                zeroes += marked if zero else 0
                moving += 0 if zero else marked
                if not zero:
                    pending.append(chunk)
    write_pending(keeper.view_files(home, uuid, disk.target), pending)
    return PatchInfo(moving, zeroes, chunks, path.stat().st_size)


def correct_patch(home: Home, repo: Repository, uuid: str, disk: DiskIntent, before: MapRef, now: MapRef) -> None:
    """Make a patch that was made against `before` right for `now`: only chunks that differ between these two are
    looked at, so it takes as long as the last increment is large. Durable when it returns."""
    path = home.revert(uuid) / disk.patch
    touched = list(changed_chunks(repo, before, now))
    if not touched:
        return
    with Patch.reopen(path) as patch:
        found = {chunk: (mask, zero) for chunk, mask, zero in differing(repo, now, disk.wanted, touched)}
        for chunk in touched:
            mask, zero = found.get(chunk, (0, False))
            patch.mark(chunk, mask, zero)
