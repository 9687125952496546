"""LVM2 volume groups, as far as logical volumes are pieces of physical ones one behind the other.

    label sector → PV header → metadata area → text → groups → volumes of segments of type `striped` with one stripe

Everything else (thin, cache, raid, several stripes) is named with its type, so that another reader can be asked. The
text is the newest over all physical volumes (`seqno`). Own parsing, because LVM's tools need device-mapper, which
would give a guest's disk to the host's kernel.

Source: LVM2, lib/format_text/layout.h and its own metadata. Hostile text ends at limits of size and depth.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import GuestUnreadable
from images.guest.blocks import Blocks, Linear, Piece

__all__ = ["LogicalVolume", "logical_volumes"]

_SECTOR = 512
_AREA_MAGIC = b" LVM2 x[5A%r0N*>"
_TEXT_LIMIT = 8 << 20
_DEPTH = 8
_SEGMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """`blocks` is None when it is of a `type` that is not read here. `on` are the physical volumes under it, as the
    positions in what was given."""

    group: str
    name: str
    type: str
    on: tuple[int, ...]
    blocks: Linear | None


def logical_volumes(physical: Sequence[Blocks]) -> list[LogicalVolume]:
    """The visible volumes of all groups on these physical volumes. Raises GuestUnreadable when the metadata is damaged.
    A volume on a physical one that is not among them is left out."""
    members = {}
    newest: dict[str, tuple[int, dict[str, Any]]] = {}
    for position, blocks in enumerate(physical):
        name, text = _metadata(blocks)
        members[name] = (position, blocks)
        for group, content in _sections(_parse(text, blocks.name) if text else {}):
            seqno = _number(content, "seqno")
            if group not in newest or seqno > newest[group][0]:
                newest[group] = (seqno, content)
    return [one for group in sorted(newest) for one in _volumes(group, newest[group][1], members)]


_Members = Mapping[str, tuple[int, Blocks]]


def _volumes(group: str, content: dict[str, Any], members: _Members) -> Iterator[LogicalVolume]:
    extent = _number(content, "extent_size") * _SECTOR
    places = {
        key: (_number(section, "pe_start") * _SECTOR, *members[name])
        for key, section in _sections(content.get("physical_volumes", {}))
        if (name := str(section.get("id", "")).replace("-", "")) in members
    }
    for name, volume in _sections(content.get("logical_volumes", {})):
        if "VISIBLE" not in volume.get("status", ()):
            continue
        segments = [segment for key, segment in _sections(volume) if key.startswith("segment")]
        segments.sort(key=lambda segment: _number(segment, "start_extent"))
        kinds = {str(segment.get("type", "")) for segment in segments}
        if kinds == {"striped"} and all(len(segment.get("stripes", ())) == 2 for segment in segments):
            found = _linear(group, name, segments, extent, places)
            if found:
                yield found
        else:
            on = tuple(sorted({position for _, position, _ in places.values()}))
            yield LogicalVolume(group, name, ", ".join(sorted(kinds)), on, None)


def _linear(
    group: str, name: str, segments: list[dict[str, Any]], extent: int, places: Mapping[str, tuple[int, int, Blocks]]
) -> LogicalVolume | None:
    pieces: list[Piece] = []
    on: set[int] = set()
    end = 0
    for segment in segments:
        count, (where, first) = _number(segment, "extent_count"), segment["stripes"]
        if where not in places:
            return None
        if _number(segment, "start_extent") != end or not isinstance(first, int) or len(pieces) > _SEGMENTS:
            raise _damaged(group, f"the segments of {name} are not one behind the other")
        start, position, blocks = places[where]
        pieces.append(Piece(blocks, start + first * extent, count * extent))
        on.add(position)
        end += count
    return LogicalVolume(group, name, "linear", tuple(sorted(on)), Linear(f"{group}/{name}", pieces))


# --- where the text is ---


def _metadata(blocks: Blocks) -> tuple[str, bytes]:
    """(id of the physical volume without dashes, newest text on it; empty when it keeps none)."""
    for sector in range(4):
        label = blocks.read(sector * _SECTOR, _SECTOR)
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            break
    else:
        raise GuestUnreadable(what=f"the LVM label of {blocks.name}", reason="there is none")
    at = struct.unpack_from("<I", label, 20)[0]
    if at + 40 > _SECTOR:
        raise GuestUnreadable(what=f"the LVM label of {blocks.name}", reason=f"its header is at {at}")
    areas = _areas(label, at + 40)
    metadata = areas[areas.index((0, 0)) + 1 :] if (0, 0) in areas else []
    texts = [_area(blocks, start) for start, size in metadata if size]
    return label[at : at + 32].decode(errors="replace"), next(filter(None, texts), b"")


def _areas(label: bytes, at: int) -> list[tuple[int, int]]:
    """(offset, size) of data areas, a pair of zeroes, those of metadata areas."""
    found: list[tuple[int, int]] = []
    while at + 16 <= len(label) and found.count((0, 0)) < 2:
        found.append(struct.unpack_from("<QQ", label, at))
        at += 16
    return found


def _area(blocks: Blocks, start: int) -> bytes:
    """The text of one metadata area: a ring behind a header of one sector."""
    raw = blocks.read(start, _SECTOR)
    _, magic, _, _, size = struct.unpack_from("<I16sIQQ", raw)
    offset, length = struct.unpack_from("<QQ", raw, 40)
    if magic != _AREA_MAGIC or size <= _SECTOR or length > min(size, _TEXT_LIMIT):
        raise GuestUnreadable(what=f"the LVM metadata of {blocks.name}", reason="its header is not right")
    if not length:
        return b""
    first = min(length, size - offset)
    if offset < _SECTOR or first <= 0:
        raise GuestUnreadable(what=f"the LVM metadata of {blocks.name}", reason="its header is not right")
    rest = length - first
    text = blocks.read(start + offset, first) + (blocks.read(start + _SECTOR, rest) if rest else b"")
    return text.rstrip(b"\0")


# --- the text ---

_TOKEN = re.compile(
    rb"""(?P<skip>[\s,]+|\#[^\n]*) | (?P<word>[A-Za-z0-9_.+/-]+)
       | (?P<string>"(?:[^"\\]|\\.)*") | (?P<mark>[{}=\[\]])""",
    re.VERBOSE | re.DOTALL,
)


def _parse(text: bytes, name: str) -> dict[str, Any]:
    """Sections as dicts; values are int, str, or a list of these."""
    tokens = _tokens(text, name)
    return _section(tokens, 0, name)


def _tokens(text: bytes, name: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise GuestUnreadable(what=f"the LVM metadata of {name}", reason=f"it cannot be parsed at {at}")
        at = found.end()
        if found.lastgroup != "skip":
            yield str(found.lastgroup), found.group().decode(errors="replace")


def _section(tokens: Iterator[tuple[str, str]], depth: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, key in tokens:
        if key == "}" and depth:
            return found
        _, mark = next(tokens, ("", ""))
        if kind != "word" or mark not in ("{", "=") or depth > _DEPTH:
            raise GuestUnreadable(what=f"the LVM metadata of {name}", reason=f"it cannot be parsed at {key!r}")
        found[key] = _section(tokens, depth + 1, name) if mark == "{" else _value(tokens)
    return found


def _value(tokens: Iterator[tuple[str, str]]) -> int | str | list[int | str]:
    kind, word = next(tokens, ("", ""))
    if word != "[":
        return _scalar(kind, word)
    items: list[int | str] = []
    for kind, word in tokens:
        if word == "]" and kind == "mark":
            break
        items.append(_scalar(kind, word))
    return items


def _scalar(kind: str, word: str) -> int | str:
    if kind == "string":
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else word


def _sections(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(content, dict):
        yield from ((key, value) for key, value in content.items() if isinstance(value, dict))


def _number(section: dict[str, Any], key: str) -> int:
    value = section.get(key)
    if not isinstance(value, int):
        raise _damaged("?", f"{key} is {value!r}")
    return value


def _damaged(group: str, reason: str) -> GuestUnreadable:
    return GuestUnreadable(what=f"the LVM volume group {group!r}", reason=reason)
