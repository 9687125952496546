"""Journals made without a server, by FORMAT.md alone: any records, times, segments, sessions and damage."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from appliance.journal.layout import ENTRY, FOOTER, RECORD, RECORD_MAGIC, Kind, crc32c

SECOND = 10**9
START_NS = 1_790_000_000 * SECOND


@dataclass
class Scribe:
    """Writes records into a folder. `step` nanoseconds pass between two; `wall` may be set to move the clock."""

    folder: Path
    disks: dict[str, int]
    journal: bytes = bytes(range(16))
    wall: int = START_NS
    mono: int = SECOND
    step: int = 1_000_000
    sequence: int = 0
    session: int = START_NS
    waiting: list[tuple] = field(default_factory=list)

    def write(self, disk: str, offset: int, data: bytes) -> int:
        return self._add(Kind.WRITE, list(self.disks).index(disk), offset, len(data), data)

    def zero(self, disk: str, offset: int, length: int, kind: Kind = Kind.ZERO) -> int:
        return self._add(kind, list(self.disks).index(disk), offset, length, b"")

    def trim(self, disk: str, offset: int, length: int) -> int:
        return self.zero(disk, offset, length, Kind.TRIM)

    def lost(self, disk: str, offset: int, length: int) -> int:
        return self.zero(disk, offset, length, Kind.LOST)

    def mark(self, label: str) -> int:
        return self._add(Kind.MARK, 0xFFFF, 0, len(label.encode()), label.encode())

    def _add(self, kind: Kind, disk: int, offset: int, length: int, data: bytes) -> int:
        self.sequence += 1
        self.wall += self.step
        self.mono += self.step
        self.waiting.append((self.sequence, self.wall, self.mono, offset, length, disk, int(kind), data))
        return self.sequence

    def seal(self) -> Path:
        """What is waiting as a sealed segment."""
        body, entries, position = self._body()
        first, last = self.waiting[0], self.waiting[-1]
        index = b"".join(ENTRY.pack(*entry) for entry in sorted(entries, key=lambda e: (e[4], e[0], e[3])))
        payload = sum(len(one[7]) for one in self.waiting)
        footer = FOOTER.pack(
            b"RWJFOOT1", position, first[0], last[0], first[1], last[1], payload, len(entries), crc32c(index), 0, 0
        )
        footer = footer[:-8] + struct.pack("<II", crc32c(footer[:-8]), 0)
        path = self.folder / f"{first[0]:020}-{last[0]:020}.rwj"
        path.write_bytes(body + index + footer)
        self.waiting = []
        return path

    def leave_open(self) -> Path:
        """What is waiting as the segment that is being written."""
        path = self.folder / f"{self.waiting[0][0]:020}.open"
        path.write_bytes(self._body()[0])
        return path

    def restart(self, **disks: int) -> None:
        """A new life of the writing process, with these disks (none named: the same)."""
        if self.waiting:
            self.seal()
        self.session += SECOND
        self.disks = disks or self.disks

    def _body(self):
        parts, entries = [self._header()], []
        position = len(parts[0])
        for sequence, wall, mono, offset, length, disk, kind, data in self.waiting:
            rest = RECORD.pack(RECORD_MAGIC, 0, sequence, wall, mono, offset, length, disk, kind, 0)[8:] + data
            parts.append(struct.pack("<II", RECORD_MAGIC, crc32c(rest)) + rest)
            entries.append((offset, position, length, sequence - self.waiting[0][0], disk, kind, 0))
            position += len(parts[-1])
        return b"".join(parts), entries, position

    def _header(self) -> bytes:
        disks = b"".join(struct.pack("<32sQ", name.encode(), size) for name, size in self.disks.items())
        head = struct.pack(
            "<8sIHH16s16sQqqqII", b"RWJSEGM1", 88 + len(disks), 1, len(self.disks), self.journal, bytes(16),
            self.waiting[0][0], self.session, self.wall, self.mono, 0, 0,
        )  # fmt: skip
        whole = head + disks
        return whole[:80] + struct.pack("<II", crc32c(whole), 0) + disks


def scribble(scribe: Scribe, images: dict[str, bytearray], dice: random.Random, records: int):
    """Random records of every kind, odd offsets and lengths; yields (number, disk or "", offset, new content)."""
    for _ in range(records):
        name = dice.choice(list(images))
        image = images[name]
        longest = dice.choice([1, 511, 4096, 4096, 65536, 65536 * 3 + 7])
        offset = dice.randrange(len(image))
        length = min(dice.randrange(1, longest + 1), len(image) - offset)
        if dice.random() < 0.4:
            offset -= offset % 4096
        kind = dice.random()
        if kind < 0.05:
            yield scribe.mark(f"m {dice.random()}"), "", 0, b""
            continue
        data = dice.randbytes(length) if kind < 0.75 else bytes(length)
        if kind < 0.8:  # also written zeroes
            number = scribe.write(name, offset, data)
        else:
            number = (scribe.zero if kind < 0.9 else scribe.trim)(name, offset, length)
        image[offset : offset + length] = data
        yield number, name, offset, data
