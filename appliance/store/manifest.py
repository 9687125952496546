"""Recovery points and timelines as objects. Creating the object of a point is its commit.

    points/DOMAIN-UUID/POINT-ID      timelines/DOMAIN-UUID/TIMELINE-ID

    "RWMF" | version u8 | flags u8 (1 = encrypted) | 0 u16 | salt[16] | head length u32 | tail length u32
    head    sealed at 0: compressed JSON                     everything but the lists of changed chunks
    tail    sealed at 1: compressed lists, one per disk      read only when a single point is asked for

A list is a varint (0: not known, else count + 1) and the gaps between ascending indexes as varints.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Final

from appliance.errors import IntegrityError, VersionUnsupported
from appliance.model import Consistency, DiskKind, DiskPoint, MapRef, Point, PointStats, Timeline
from appliance.store.codec import SALT_SIZE, Codec, compress, decompress

__all__ = [
    "HEAD_GUESS", "LEDGERS", "POINTS", "TIMELINES", "decode_ledger", "decode_point", "decode_timeline", "encode_ledger",
    "encode_point", "encode_timeline", "point_name", "timeline_name",
]  # fmt: skip

VERSION: Final = 1
POINTS: Final = "points/"
TIMELINES: Final = "timelines/"
LEDGERS: Final = "ledgers/"
# Brings the head of nearly every point in one get.
HEAD_GUESS: Final = 16 << 10

_HEADER = struct.Struct("<4sBBH16sII")
_MAGIC = b"RWMF"
_HEAD_LIMIT = 64 << 20
_TAIL_LIMIT = 1 << 30


def point_name(domain_uuid: str, point: str) -> str:
    return f"{POINTS}{domain_uuid}/{point}"


def timeline_name(domain_uuid: str, timeline: str) -> str:
    return f"{TIMELINES}{domain_uuid}/{timeline}"


def encode_point(codec: Codec, point: Point) -> bytes:
    head = _as_json(point)
    tail = b"".join(_encode_list(disk.changed) for disk in point.disks)
    return _seal(codec, point_name(point.domain_uuid, point.id), head, tail)


def decode_point(codec: Codec, name: str, data: bytes, size: int, changed: bool) -> tuple[Point | None, int]:
    """(point, bytes needed): None when `data`, the first bytes of the object, is too short for what is asked.

    Raises IntegrityError, VersionUnsupported.
    """
    parts = 2 if changed else 1
    needed = _needed(name, data, size, parts)
    if needed > len(data):
        return None, needed
    head, tail = _open(codec, name, data, parts)
    try:
        point = _from_json(json.loads(head))
        if changed:
            position = 0
            disks = []
            for disk in point.disks:
                indexes, position = _decode_list(tail, position)
                disks.append(replace(disk, changed=indexes))
            point = replace(point, disks=tuple(disks))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise IntegrityError(object=name, reason=f"not a recovery point: {error!r}") from error
    return point, needed


def encode_timeline(codec: Codec, timeline: Timeline) -> bytes:
    values = {
        "id": timeline.id,
        "domain_uuid": timeline.domain_uuid,
        "created": timeline.created.isoformat(),
        "parent": timeline.parent,
        "origin": timeline.origin,
    }
    return _seal(codec, timeline_name(timeline.domain_uuid, timeline.id), json.dumps(values).encode(), b"")


def decode_timeline(codec: Codec, name: str, data: bytes) -> Timeline:
    """Raises IntegrityError, VersionUnsupported."""
    _needed(name, data, len(data), 1)
    try:
        values = json.loads(_open(codec, name, data, 1)[0])
        created = datetime.fromisoformat(values["created"])
        return Timeline(values["id"], values["domain_uuid"], created, values["parent"], values["origin"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(object=name, reason=f"not a timeline: {error!r}") from error


def encode_ledger(codec: Codec, name: str, data: bytes) -> bytes:
    """`data` is opaque here."""
    return _seal(codec, name, data, b"")


def decode_ledger(codec: Codec, name: str, data: bytes) -> bytes:
    """Raises IntegrityError, VersionUnsupported."""
    _needed(name, data, len(data), 2)
    return _open(codec, name, data, 2)[0]


def _seal(codec: Codec, name: str, head: bytes, tail: bytes) -> bytes:
    salt = secrets.token_bytes(SALT_SIZE)
    box = codec.box("manifest", salt)
    sealed = [box.seal(position, name.encode(), compress(part)) for position, part in enumerate((head, tail))]
    header = _HEADER.pack(_MAGIC, VERSION, int(codec.encrypted), 0, salt, len(sealed[0]), len(sealed[1]))
    return header + sealed[0] + sealed[1]


def _needed(name: str, data: bytes, size: int, parts: int) -> int:
    if len(data) < _HEADER.size:
        raise IntegrityError(object=name, reason="it is cut short")
    magic, version, _, _, _, head, tail = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise IntegrityError(object=name, reason="it does not begin as a manifest does")
    if version != VERSION:
        raise VersionUnsupported(object=name, version=version, supported=VERSION)
    whole = int(_HEADER.size + head + tail)
    if size != whole:
        raise IntegrityError(object=name, reason=f"{size} bytes where {whole} should be")
    return whole if parts == 2 else whole - int(tail)


def _open(codec: Codec, name: str, data: bytes, parts: int) -> tuple[bytes, bytes]:
    _, _, _, _, salt, head, tail = _HEADER.unpack_from(data)
    box = codec.box("manifest", salt)
    start = _HEADER.size
    try:
        first = decompress(box.open(0, name.encode(), data[start : start + head]), _HEAD_LIMIT)
        second = b""
        if parts == 2:
            second = decompress(box.open(1, name.encode(), data[start + head : start + head + tail]), _TAIL_LIMIT)
    except (IntegrityError, ValueError) as error:
        reason = error.fields["reason"] if isinstance(error, IntegrityError) else str(error)
        raise IntegrityError(object=name, reason=reason) from error
    return first, second


def _as_json(point: Point) -> bytes:
    values = {
        "id": point.id,
        "domain": point.domain,
        "domain_uuid": point.domain_uuid,
        "uri": point.uri,
        "time": point.time.isoformat(),
        "timeline": point.timeline,
        "parent": point.parent,
        "disks": [_disk_values(disk) for disk in point.disks],
        "consistency": point.consistency.value,
        "reason": point.reason,
        "label": point.label,
        "xml": point.xml,
        "stats": {
            "moved_bytes": point.stats.moved_bytes,
            "stored_bytes": point.stats.stored_bytes,
            "new_chunks": point.stats.new_chunks,
            "pause_seconds": point.stats.pause_seconds,
            "seconds": point.stats.seconds,
        },
        "notes": list(point.notes),
        "journal": point.journal,
        "sequence": point.sequence,
    }
    return json.dumps(values, separators=(",", ":")).encode()


def _disk_values(disk: DiskPoint) -> dict[str, Any]:
    return {
        "disk": disk.disk,
        "size": disk.size,
        "map": {"root": disk.map.root.hex(), "size": disk.map.size, "place": disk.map.place},
        "kind": disk.kind.value,
        "changed_bytes": disk.changed_bytes,
        "source": disk.source,
        "format": disk.format,
        "attributes": dict(disk.attributes),
    }


def _from_json(values: dict[str, Any]) -> Point:
    return Point(
        id=values["id"],
        domain=values["domain"],
        domain_uuid=values["domain_uuid"],
        uri=values["uri"],
        time=datetime.fromisoformat(values["time"]).astimezone(UTC),
        timeline=values["timeline"],
        parent=values["parent"],
        disks=tuple(_disk(disk) for disk in values["disks"]),
        consistency=Consistency(values["consistency"]),
        reason=values["reason"],
        label=values["label"],
        xml=values["xml"],
        stats=PointStats(**values["stats"]),
        notes=tuple(values["notes"]),
        # Not in the points of the first releases, which knew no journal.
        journal=values.get("journal", ""),
        sequence=values.get("sequence"),
    )


def _disk(values: dict[str, Any]) -> DiskPoint:
    ref = values["map"]
    return DiskPoint(
        disk=values["disk"],
        size=values["size"],
        map=MapRef(bytes.fromhex(ref["root"]), ref["size"], ref["place"]),
        kind=DiskKind(values["kind"]),
        changed_bytes=values["changed_bytes"],
        source=values["source"],
        format=values["format"],
        attributes=values["attributes"],
    )


def _encode_list(indexes: Iterable[int] | None) -> bytes:
    if indexes is None:
        return b"\x00"
    listed = list(indexes)
    out = bytearray()
    last = 0
    for number in (len(listed) + 1, *listed):
        # The count stands alone; the first index is a gap from zero.
        gap = number if not out else number - last
        if out:
            last = number
        if gap < 0:
            raise ValueError("the changed chunks do not ascend")
        while gap >= 0x80:
            out.append(gap & 0x7F | 0x80)
            gap >>= 7
        out.append(gap)
    return bytes(out)


def _decode_list(data: bytes, position: int) -> tuple[tuple[int, ...] | None, int]:
    count, position = _varint(data, position)
    if not count:
        return None, position
    gaps = data[position : position + count - 1]
    if len(gaps) == count - 1 and gaps.isascii():  # a byte each, as always where much has changed: nine times as fast
        return tuple(accumulate(gaps)), position + count - 1
    indexes: list[int] = []
    last = 0
    for _ in range(count - 1):
        gap, position = _varint(data, position)
        last += gap
        indexes.append(last)
    return tuple(indexes), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
