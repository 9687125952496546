"""Small repositories for the tests of the store: chunks by letter, points by name."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

from appliance.model import DiskPoint, Point
from appliance.units import CHUNK

DOMAIN = "8d0a4f0e-6f0c-4d8e-9d6e-000000000001"
START = datetime(2026, 1, 1, tzinfo=UTC)


def chunk(letter: int) -> bytes:
    """Distinct for each letter, zeroes for 0; does not compress."""
    return random.Random(letter).randbytes(CHUNK) if letter else bytes(CHUNK)


def point(name: str, refs, *, parent: str | None = None, second: int = 0, changed=None) -> Point:
    """`refs`: a MapRef or a dict of them by disk."""
    by_disk = refs if isinstance(refs, dict) else {"vda": refs}
    disks = tuple(DiskPoint(disk, ref.size, ref, changed=changed) for disk, ref in by_disk.items())
    return Point(name, "guest", DOMAIN, "test:///", START + timedelta(seconds=second), "t", parent, disks)


def take(repo, name: str, letters: dict[int, int], *, base=None, size: int = 100, parent=None, second: int = 0):
    """Write the letters over `base` and commit; the map. In one session: what one stores and another commits may be
    collected in between (FORMAT.md), and the commit is refused."""
    with repo.session("take"):
        with repo.writer() as writer:
            changes = [(index, writer.put(chunk(letter))) for index, letter in sorted(letters.items())]
            ref = repo.write_map(base, size * CHUNK, changes, writer)
        repo.commit(point(name, ref, parent=parent, second=second, changed=tuple(sorted(letters))))
    return ref


def read(repo, ref) -> dict[int, bytes]:
    """Every chunk that is not zero."""
    return {index: repo.read_chunk(one) for index, one in repo.map(ref).items()}


def expect(letters: dict[int, int]) -> dict[int, bytes]:
    return {index: chunk(letter) for index, letter in letters.items() if letter}
