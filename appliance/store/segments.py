"""Sealed journal segments as files in parts (parted.py): kept beside the points and needed by none of them.

segments/DOMAIN-UUID/JOURNAL/FIRST-LAST        the numbers are those of its records
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from appliance.store import parted
from appliance.store.backend.base import Backend
from appliance.store.codec import Codec

__all__ = ["PREFIX", "SegmentRef", "listing", "put"]

PREFIX: Final = "segments/"
_NAME: Final = re.compile(r"segments/([^/]+)/([0-9a-f]{32})/(\d{20})-(\d{20})(?:\.([1-9]\d*))?")


@dataclass(frozen=True, slots=True, order=True)
class SegmentRef:
    """A segment of the journal with that id (hex), from its first to its last sequence number.

    `stored` are the bytes of its objects. Not `whole`: parts of one whose shipping was broken off, which count as
    nothing until it is shipped again.
    """

    domain_uuid: str
    journal: str
    first: int
    last: int
    stored: int = field(default=0, compare=False)
    parts: int = field(default=1, compare=False)
    whole: bool = field(default=True, compare=False)

    @property
    def name(self) -> str:
        """Of its first object."""
        return f"{PREFIX}{self.domain_uuid}/{self.journal}/{self.first:020}-{self.last:020}"


def put(
    backend: Backend, codec: Codec, ref: SegmentRef, path: Path, pace: Callable[[int], None] | None = None
) -> SegmentRef:
    """As `parted.put`. Raises ValueError for a name that is none."""
    if _NAME.fullmatch(ref.name) is None or not 0 < ref.first <= ref.last:
        raise ValueError(f"no name of a segment: {ref.name!r}")
    stored, parts = parted.put(backend, codec, ref.name, path, pace)
    return SegmentRef(ref.domain_uuid, ref.journal, ref.first, ref.last, stored, parts)


def listing(backend: Backend, domain_uuid: str | None = None) -> list[SegmentRef]:
    """By domain, journal and number, also those that are not whole. One listing, nothing is opened."""
    found: dict[str, SegmentRef] = {}
    for info in backend.list(PREFIX + (f"{domain_uuid}/" if domain_uuid else "")):
        if (match := _NAME.fullmatch(info.name)) is None:
            continue
        name = info.name.rpartition(".")[0] if match[5] else info.name
        ref = found.get(name) or SegmentRef(match[1], match[2], int(match[3]), int(match[4]), 0, 0, whole=False)
        found[name] = SegmentRef(
            ref.domain_uuid, ref.journal, ref.first, ref.last,
            ref.stored + info.size, ref.parts + 1, ref.whole or not match[5],
        )  # fmt: skip
    return sorted(found.values())
