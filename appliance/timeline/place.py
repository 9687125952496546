"""The place up to which a ledger was last confirmed, in a small file beside it that never grows.

Two slots of 512 bytes, written in turn, each with a number that counts up and a checksum, so that one of them is always
whole. To confirm a place is one write and one sync.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from appliance.errors import NoSpace

__all__ = ["EPOCH", "Place", "PlaceFile", "checksum"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SLOT: Final = struct.Struct("<4sIQ8sQqqQ")
_SLOT_SIZE, _MAGIC = 512, b"RWAT"


@dataclass(frozen=True, slots=True)
class Place:
    """What a slot holds: `count` is its number, `time` when the span was last seen to run, `latest` the latest that the
    clock showed, `upto` the number of the last line of the ledger then."""

    count: int
    span: str
    sequence: int
    time: datetime
    latest: datetime
    upto: int


class PlaceFile:
    """Any process may read it at any time; one writes at a time, which has to read it before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0

    def read(self) -> Place | None:
        """The newest whole slot."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        slots = [one for at in (0, _SLOT_SIZE) if (one := _slot(data[at : at + _SLOT.size])) is not None]
        newest = max(slots, key=lambda one: one.count, default=None)
        self._count = newest.count if newest else 0
        return newest

    def write(self, span: str, sequence: int, time: datetime, latest: datetime, upto: int) -> None:
        """Into the slot that does not hold the newest one. Its size does not change, so that a sync is one write."""
        place = Place(self._count + 1, span, sequence, time, latest, upto)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            slot = _packed(place, checksum(_packed(place, 0)))
            os.pwrite(file, slot.ljust(_SLOT_SIZE, b"\0"), place.count % 2 * _SLOT_SIZE)
            os.fdatasync(file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(url=str(self._path.parent), name=self._path.name) from error
            raise
        finally:
            os.close(file)


def _packed(place: Place, crc: int) -> bytes:
    micros = [(time - EPOCH) // timedelta(microseconds=1) for time in (place.time, place.latest)]
    return _SLOT.pack(_MAGIC, crc, place.count, bytes.fromhex(place.span), place.sequence, *micros, place.upto)


def _slot(data: bytes) -> Place | None:
    if len(data) < _SLOT.size:
        return None
    magic, crc, count, span, sequence, time, latest, upto = _SLOT.unpack(data)
    place = Place(count, span.hex(), sequence, _moment(time), _moment(latest), upto)
    return place if magic == _MAGIC and crc == checksum(_packed(place, 0)) else None


def _moment(micros: int) -> datetime:
    """Of a slot; one that is damaged may hold any number."""
    return EPOCH + timedelta(microseconds=min(max(micros, -(1 << 55)), 1 << 55))


def checksum(data: bytes) -> int:
    """Of a slot, and of a line of the ledger."""
    # Here: the package reads its own metadata when it is imported, a tenth of the time in which a verb begins, and most
    # homes have no ledger.
    from crc32c import crc32c

    return crc32c(data)
