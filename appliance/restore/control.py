"""The control file of a streamed session: what server and client tell each other, as a small disk beside the big ones.

      0   4096   the client's record, text that it writes as one block: lines `WORD VALUE`, `rewind 1` first, `end` last
   4096   4096   the client's sign of life: anything that is another every few seconds
  65536   ...    the server's list for a client that copies first: lines `DISK OFFSET LENGTH ZERO` in bytes, `end` last

The client writes it through its link, so a record is durable when the client goes on, and a server that is started
anew knows what the one before knew. States, in order: `booting`, `filling` or `copying`, `alone`, `detached`. From
`alone` on the client's local disks are the truth, and nobody may fill them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from appliance.extents import Extent

__all__ = ["CONTROL", "Pace", "Record", "create", "read_record", "sign_of_life"]

CONTROL = "control"
_BLOCK = 4096
_LIST = 65536
# Pieces that are copied are not longer: the client tells after each how far it is.
_PIECE = 64 << 20
# A hole that is smaller is copied with what is around it.
_GAP = 1 << 20
# What a rate is of, in seconds.
_SPAN = 30.0
_STATES = ("booting", "filling", "copying", "alone", "detached", "refused")


@dataclass(frozen=True, slots=True)
class Record:
    """What the client said last. `state` is empty before it said anything. `read`, `written`: bytes by its link since
    it booted; `service`: seconds from its start to the system being up, and the bytes read and written until then."""

    state: str = ""
    done: int = 0
    total: int = 0
    read: int = 0
    written: int = 0
    boots: int = 0
    error: str = ""
    service: tuple[int, int, int] | None = None
    local: Mapping[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether the client needs nothing of the session any more."""
        return self.state in ("alone", "detached")


class Pace:
    """How fast the local disks fill, from what the machine says of itself."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, record: Record, now: float) -> int:
        """Bytes a second in the last half minute; 0 while nothing is filled."""
        if record.state not in ("filling", "copying"):
            self._seen.clear()
            return 0
        if self._seen and record.done < self._seen[-1][1]:
            self._seen.clear()  # it has begun again
        self._seen.append((now, record.done))
        while self._seen[0][0] < now - _SPAN:
            self._seen.popleft()
        (begun, least), (ended, most) = self._seen[0], self._seen[-1]
        return int((most - least) / (ended - begun)) if ended - begun >= 1 else 0


def create(path: Path, extents: Mapping[str, Iterable[Extent]]) -> None:
    """A new control file; `extents` of disks that are to be copied first, all of each, in order."""
    lines = [f"{disk} {one.offset} {one.length} {int(one.zero)}" for disk in extents for one in _pieces(extents[disk])]
    text = ("\n".join([*lines, "end"]) + "\n").encode()
    with path.open("xb") as file:
        file.seek(_LIST)
        file.write(text + bytes(-len(text) % _BLOCK))


def read_record(path: Path) -> Record:
    """The client's last whole record; an empty one when there is none. What the client says is not believed to be
    well formed: it is a machine that we do not know."""
    with path.open("rb") as file:
        text = file.read(_BLOCK).rstrip(b"\0").decode(errors="replace")
    lines = text.splitlines()
    if not lines or lines[0] != "rewind 1" or lines[-1] != "end":
        return Record()
    words: dict[str, str] = {}
    local: dict[str, str] = {}
    for line in lines[1:-1]:
        word, _, value = line.partition(" ")
        if word == "local":
            disk, _, identity = value.partition(" ")
            local[disk] = identity
        else:
            words[word] = value
    state = words.get("state", "")
    return Record(
        state=state if state in _STATES else "",
        done=_number(words.get("done", "")),
        total=_number(words.get("total", "")),
        read=_number(words.get("read", "")),
        written=_number(words.get("written", "")),
        boots=_number(words.get("boots", "")),
        error=_printable(words.get("error", "")),
        service=_service(words.get("service", "")),
        local={_printable(disk): _printable(one) for disk, one in local.items()},
    )


def sign_of_life(path: Path) -> bytes:
    """What a client that lives changes every few seconds."""
    with path.open("rb") as file:
        return file.read(2 * _BLOCK)


def _pieces(extents: Iterable[Extent]) -> Iterable[Extent]:
    for one in _without_gaps(extents):
        for offset in range(one.offset, one.end, _PIECE):
            yield Extent(offset, min(_PIECE, one.end - offset), one.zero)


def _without_gaps(extents: Iterable[Extent]) -> Iterable[Extent]:
    last: Extent | None = None
    for one in extents:
        zero = one.zero and one.length >= _GAP
        if last is not None and last.zero == zero:
            last = Extent(last.offset, last.length + one.length, zero)
            continue
        if last is not None:
            yield last
        last = Extent(one.offset, one.length, zero)
    if last is not None:
        yield last


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0


def _service(text: str) -> tuple[int, int, int] | None:
    numbers = [_number(word) for word in text.split()]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])
