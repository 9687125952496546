"""The ledger of a domain's continuous capture: when it ran, where points stand in it, what happened to it.

    HOME/ledger/UUID.jsonl   a JSON object with a checksum on each line, appended and synced
    HOME/ledger/UUID.at      the place that was last confirmed: see place.py

Once a second a place is confirmed; that must not make the file longer, so only the last one is kept, beside it, and
goes into the file when the span ends or the next one begins. A last line that was torn by a crash was never promised
to anybody: readers do not see it and the next line takes its place. What the lines mean is in `spans`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from appliance.errors import JournalError, NoSpace, PermissionDenied
from appliance.timeline.catalogue import Gap
from appliance.timeline.place import EPOCH, Place, PlaceFile, checksum
from appliance.timeline.spans import (
    Base,
    Branch,
    CapturedSpan,
    Event,
    Line,
    captured,
    gaps,
    open_span,
    span_at,
    state_at,
)

__all__ = ["Base", "Branch", "CapturedSpan", "Event", "Gap", "Ledger", "Line", "state_at"]

_LONGEST: Final = 1024
_Row: TypeAlias = tuple[str, datetime, dict[str, Any]]
_FIELDS: Final = ("number", "upto", "span", "journal", "sequence", "reason", "point", "timeline", "kind", "detail")


class Ledger:
    """Reads and writes one domain's ledger; the file comes with the first line, the folder must be there.

    Any process may read at any time without a lock. Writers take turns by a lock on the file for each line. A line is
    durable when its call returns; a call that raises has written nothing. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._side = PlaceFile(path.with_suffix(".at"))
        # What was read before, by the file's inode and how far: it only grows.
        self._read: tuple[int, int, list[Line]] = (0, 0, [])

    def began(self, journal: str, sequence: int, time: datetime) -> str:
        """Every write after that record is seen from here on. Returns the id of the span.

        A span that is still open has been left by its writer; it ends where it was last confirmed.
        """
        span = secrets.token_hex(8)
        with self._locked() as file:
            kept = self._kept(self._lines(file))
            self._append(file, *kept, ("began", time, {"span": span, "journal": journal, "sequence": sequence}))
        return span

    def confirmed(self, journal: str, sequence: int, time: datetime) -> None:
        """The capture was seen to run at that time, and that record is durable. Raises JournalError when no span of
        that journal is open."""
        with self._locked() as file:
            known = self._lines(file)
            span = open_span(known)
            if span is None or span.journal != journal:
                raise JournalError(reason=f"{self.path} has no open span of journal {journal}")
            place = self._place_of(span.span)
            latest = max(time, place.latest) if place else time
            self._side.write(span.span, sequence, time, latest, _number(known))

    def ended(self, journal: str, sequence: int | None, time: datetime | None, reason: str) -> None:
        """The span ends at that place, which was seen; with None where it was last confirmed. A gap begins.

        Nothing happens when no span of that journal is open: two may come to say the same.
        """
        with self._locked() as file:
            known = self._lines(file)
            found = [one for one in captured(known) if one.open and one.journal == journal]
            if found:
                last, place = found[-1], self._place_of(found[-1].id)
                fields = {
                    "span": last.id, "journal": journal, "sequence": last.last if sequence is None else sequence,
                    "upto": _number(known) if sequence is not None else place.upto if place else 0,
                    "reason": reason or "no reason was given",
                }  # fmt: skip
                self._append(file, ("ended", time or last.seen, fields))

    def stopped(self, time: datetime) -> None:
        """Continuous capture was given up on purpose: what follows is no gap, until the next `began`. A span that is
        still open ends where it was last confirmed. Nothing happens when there is no ledger."""
        if self.path.exists():
            with self._locked() as file:
                self._append(file, *self._kept(self._lines(file)), ("stopped", time, {}))

    def based(self, journal: str, sequence: int, time: datetime, point: str, span: str = "") -> None:
        """A point is exact at that place; `time` is its instant, not that of the call. It counts as soon as
        the span is confirmed once more. `span` is the id of the span in which it was taken: to be given where the point
        is written down so late that another span may have begun."""
        self._add("based", time, journal=journal, sequence=sequence, point=point, span=span)

    def branch(self, journal: str, sequence: int, time: datetime, point: str, timeline: str) -> None:
        """A revert has put the disks at `point` after that record. To be written after the switch, before the guest
        goes on: a write that is recorded after it belongs to the new timeline."""
        self._add("branch", time, journal=journal, sequence=sequence, point=point, timeline=timeline)

    def event(self, kind: str, time: datetime, detail: str) -> None:
        """Something worth knowing later; `kind` is one word. A long detail is cut."""
        self._add("event", time, kind=kind, detail=detail)

    def spans(self) -> list[CapturedSpan]:
        """What was captured, in order. A revert divides a span in two that touch."""
        return captured(self.lines())

    def gaps(self, now: datetime | None = None) -> list[Gap]:
        """What was not captured, oldest first, from the first `began` on."""
        return gaps(self.spans(), now or datetime.now(UTC))

    def at(self, time: datetime, now: datetime | None = None) -> CapturedSpan | Gap | None:
        """What holds that instant; None for before the capture began, and for what is still to come."""
        spans = self.spans()
        found = span_at(spans, time)
        if found is not None:
            return found
        return next((one for one in gaps(spans, now or datetime.now(UTC)) if one.start <= time <= one.end), None)

    def branches(self) -> list[Branch]:
        """Every revert under the capture, oldest first."""
        return [
            Branch(one.journal, one.sequence, one.time, one.point, one.timeline)
            for one in self.lines()
            if one.what == "branch"
        ]

    def events(self) -> list[Event]:
        return [Event(one.kind, one.time, one.detail) for one in self.lines() if one.what == "event"]

    def lines(self) -> list[Line]:
        """Every line, and last the place that was confirmed; none when there is no ledger."""
        try:
            with self.path.open("rb") as file:
                return self._lines(file.fileno())
        except FileNotFoundError:
            return []

    def exported(self) -> bytes:
        """All of it as a file, with what is known only beside it: a copy to keep elsewhere. Empty without a ledger."""
        if not self.path.exists():
            return b""
        with self._locked() as file:
            known = self._lines(file)
            rows = enumerate(self._kept(known), _number(known) + 1)
            return _whole(file) + b"".join(_text(what, time, number, more) for number, (what, time, more) in rows)

    def adopt(self, copy: bytes) -> bool:
        """Take such a copy for this ledger, durably. False when there is one here already, which stays."""
        with self._locked() as file:
            if _whole(file):
                return False
            self._replace(copy)
        return True

    def forget_points(self, kept: Collection[str]) -> int:
        """Leave out lines about points that are gone. Returns how many; the rest is as it was, also after a crash."""
        with self._locked() as file:
            rows = _whole(file).splitlines(keepends=True)
            left = [row for row in rows if _parsed(row).what != "based" or _parsed(row).point in kept]
            if len(left) < len(rows):
                self._replace(b"".join(left))
        return len(rows) - len(left)

    def _kept(self, known: Sequence[Line]) -> list[_Row]:
        """What is known only beside the file of a span that is left open."""
        left = open_span(known)
        return [
            ("confirmed", one.time, {"span": one.span, "sequence": one.sequence, "upto": one.upto})
            for one in _confirmed(self._place_of(left.span) if left else None)
        ]

    def _add(self, what: str, time: datetime, **fields: Any) -> None:
        with self._locked() as file:
            self._append(file, (what, time, fields))

    def _lines(self, file: int) -> list[Line]:
        """The place is read first: lines that come meanwhile may follow it, it must not come after them."""
        place = self._side.read()
        inode, done, known = self._read
        if inode != os.fstat(file).st_ino:
            done, known = 0, []
        fresh = _whole(file, done)
        known = known + [_parsed(row) for row in fresh.splitlines()] if fresh else known
        self._read = os.fstat(file).st_ino, done + len(fresh), known
        return [*known, *_confirmed(place)]

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The open file, ours alone. It may have been replaced while we waited for the lock."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        while True:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except PermissionError as error:
                raise PermissionDenied(
                    url=str(self.path.parent), name=self.path.name, reason="it is not ours"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._same(file):
                    yield file
                    return
            finally:
                os.close(file)

    def _same(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _append(self, file: int, *rows: _Row) -> None:
        """Durably and whole, or not at all."""
        whole, number = _end(file), _number(self._lines(file))
        if whole < os.fstat(file).st_size:
            os.ftruncate(file, whole)
        try:
            _write(file, b"".join(_text(what, time, number + n, more) for n, (what, time, more) in enumerate(rows, 1)))
            os.fsync(file)
        except OSError as error:
            os.ftruncate(file, whole)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(url=str(self.path.parent), name=self.path.name) from error
            raise
        if whole == 0:
            _sync_folder(self.path.parent)

    def _replace(self, data: bytes) -> None:
        temporary = self.path.with_suffix(".new")
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, self.path)
        _sync_folder(self.path.parent)

    def _place_of(self, span: str) -> Place | None:
        place = self._side.read()
        return place if place and place.span == span else None

def _confirmed(place: Place | None) -> list[Line]:
    """What a place says as lines: the latest time that the clock showed, then the one it showed last."""
    times = sorted({place.latest, place.time}, reverse=True) if place else []
    return [Line("confirmed", one, 0, place.upto, place.span, sequence=place.sequence) for one in times if place]


def _number(lines: Sequence[Line]) -> int:
    """That of the last line that is in the file."""
    return next((one.number for one in reversed(lines) if one.number), 0)


def _text(what: str, time: datetime, number: int, fields: Mapping[str, Any]) -> bytes:
    """The line. Texts of others (reasons, details) are cut so that it stays below what is written at once."""
    cut = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in fields.items()}
    body = {
        "what": what,
        "number": number,
        "time": time.astimezone(UTC).isoformat(),
        **{k: v for k, v in cut.items() if v != ""},
    }
    return json.dumps(body | {"crc": checksum(_canonical(body))}, separators=(",", ":")).encode() + b"\n"


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _parsed(row: bytes) -> Line:
    """A whole line. One that is damaged has no kind: whoever reads it must assume the worst."""
    try:
        body = json.loads(row)
        if body.pop("crc") != checksum(_canonical(body)):
            return Line("", EPOCH)
        fields = {name: body[name] for name in _FIELDS if name in body}
        return Line(str(body["what"]), datetime.fromisoformat(body["time"]), **fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return Line("", EPOCH)


def _whole(file: int, start: int = 0) -> bytes:
    """Everything from a line's beginning up to the last line end."""
    data = b""
    while piece := os.pread(file, 1 << 20, start + len(data)):
        data += piece
    return data[: data.rfind(b"\n") + 1]


def _end(file: int) -> int:
    """Where the last whole line ends, found from behind."""
    end = os.fstat(file).st_size
    while end > 0:
        begin = max(0, end - 4096)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
