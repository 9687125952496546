"""The catalogue: what a list of recovery points shows, in one SQLite file beside the repository. A cache.

    points      one row for each point in the repository, taken over when it is first seen
    distances   changed bytes between two neighbours that are no longer parent and child, computed once

Deleting the file costs time, never data: it is filled again from the repository. A file of another version, of another
repository, or one that SQLite finds damaged is thrown away and filled again. Readers and writers in several processes
do not wait for each other (WAL). One Catalogue belongs to one thread.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

from appliance.errors import IntegrityError, NoSpace, NoSuchPoint, PermissionDenied
from appliance.model import DiskKind, DiskPoint, MapRef, Point
from appliance.units import CHUNK

__all__ = ["Catalogue", "Gap", "Source", "Summary", "gaps"]

log = logging.getLogger(__name__)

_VERSION = 2
_SCHEMA = """
CREATE TABLE about (repository TEXT NOT NULL);
CREATE TABLE points (
    id TEXT PRIMARY KEY, uuid TEXT NOT NULL, domain TEXT NOT NULL, uri TEXT NOT NULL, time REAL NOT NULL,
    timeline TEXT NOT NULL, parent TEXT, consistency TEXT NOT NULL, reason TEXT NOT NULL, label TEXT NOT NULL,
    size INTEGER NOT NULL, changed INTEGER NOT NULL, moved INTEGER NOT NULL, stored INTEGER NOT NULL,
    pause REAL NOT NULL, seconds REAL NOT NULL, disks TEXT NOT NULL, notes TEXT NOT NULL,
    journal TEXT NOT NULL, sequence INTEGER
) WITHOUT ROWID;
CREATE INDEX by_time ON points (uuid, time);
CREATE TABLE distances (
    older TEXT NOT NULL, newer TEXT NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (older, newer)
) WITHOUT ROWID;
"""
_COLUMNS = (
    "id, uuid, domain, uri, time, timeline, parent, consistency, reason, label, size, changed, moved, stored, pause, "
    "seconds, disks, notes, journal, sequence"
)
# Switching a new file to WAL does not wait for others as every other statement does.
_TRIES, _TRY_AGAIN = 100, 0.02
# A scheduled point that comes this many intervals late was missed: less is jitter and long epochs.
_MISSED = 2.0


class Source(Protocol):
    """What the catalogue needs of a repository."""

    id: str

    def point_ids(self, domain_uuid: str | None = None) -> Sequence[tuple[str, str]]: ...

    def point(self, point: str, /) -> Point: ...

    def points(self) -> list[Point]: ...

    def diff(self, a: MapRef | None, b: MapRef | None, /) -> Iterator[int]: ...


@dataclass(slots=True)
class Summary:
    """One point in a list. `changed_bytes` counts whole chunks against `since`: the point before it on its timeline,
    or the one that timeline began from; None when the whole disk counts as changed."""

    id: str
    uuid: str
    domain: str
    uri: str
    time: datetime
    timeline: str
    parent: str | None
    consistency: str
    reason: str
    label: str
    size_bytes: int
    changed_bytes: int
    moved_bytes: int
    stored_bytes: int
    pause_seconds: float
    seconds: float
    disks_json: str
    notes: tuple[str, ...]
    journal: str = ""
    sequence: int | None = None
    since: str | None = None

    @property
    def disks(self) -> list[DiskPoint]:
        """Without the lists of what changed; decoded when asked for."""
        return [_disk(one) for one in json.loads(self.disks_json)]


@dataclass(frozen=True, slots=True)
class Gap:
    """A span that was not captured although it should have been."""

    start: datetime
    end: datetime
    reason: str


class Catalogue:
    """Opened on a path that need not exist; the folder must."""

    def __init__(self, path: Path, source: Source) -> None:
        self._path, self._source = path, source
        self._database = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def refresh(self) -> int:
        """Take over what came to the repository and drop what left it. Returns the number of rows that changed.

        A point whose object is damaged is not listed: `check` names it.
        """
        there = {point for _uuid, point in self._source.point_ids()}
        held = {row[0] for row in self._database.execute("SELECT id FROM points")}
        new, gone = there - held, held - there
        # Reading the manifests of nearly everything goes faster as one listing than point by point.
        found: Iterable[Point] = (
            (point for point in self._source.points() if point.id in new)
            if len(new) > len(held) // 2 + 8
            else self._each(sorted(new))
        )
        if new or gone:
            self._write(found, gone)
        return len(new) + len(gone)

    def _write(self, found: Iterable[Point], gone: Iterable[str]) -> None:
        with self._named(), self._database:
            write = self._database.executemany
            write(f"INSERT OR REPLACE INTO points ({_COLUMNS}) VALUES ({_marks()})", map(_row, found))
            write("DELETE FROM points WHERE id = ?", ((one,) for one in gone))
            write("DELETE FROM distances WHERE older = ?1 OR newer = ?1", ((one,) for one in gone))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """SQLite's words for a full or forbidden disk as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise NoSpace(url=str(self._path.parent), name=self._path.name) from error
            if "readonly" in str(error) or "unable to open" in str(error):
                raise PermissionDenied(url=str(self._path.parent), name=self._path.name, reason=str(error)) from error
            raise

    def points(self, domain_uuid: str | None = None, measure: bool = True) -> list[Summary]:
        """Oldest first, each with its changed bytes against its neighbour. Up to date with the repository.

        Without `measure` nothing is compared: after many points were forgotten that takes its time once, and only a
        list for a person needs it; `since` and `changed_bytes` are then as when the points were taken.
        """
        self.refresh()
        where, values = ("WHERE uuid = ?", (domain_uuid,)) if domain_uuid else ("", ())
        rows = self._database.execute(f"SELECT {_COLUMNS} FROM points {where} ORDER BY time, id", values)
        found = [_summary(row) for row in rows]
        if measure:
            self._measure(found)
        return found

    def domains(self, name: str) -> list[tuple[str, str]]:
        """(UUID, name) of the domains that have points and this name or UUID; a name that changed comes twice, the
        newest last. The repository is only looked at when nothing is known of the name yet."""
        query = (
            "SELECT uuid, domain FROM points WHERE uuid = ?1 OR domain = ?1 GROUP BY uuid, domain ORDER BY max(time)"
        )
        found = self._database.execute(query, (name,)).fetchall()
        if not found and self.refresh():
            found = self._database.execute(query, (name,)).fetchall()
        return [(uuid, domain) for uuid, domain in found]

    def names(self) -> list[str]:
        """Every name of a domain that has points, as far as the catalogue knows now."""
        return [name for (name,) in self._database.execute("SELECT DISTINCT domain FROM points")]

    def count(self) -> dict[str, int]:
        """Number of points of each domain UUID."""
        self.refresh()
        return dict(self._database.execute("SELECT uuid, count(*) FROM points GROUP BY uuid"))

    def _each(self, ids: Iterable[str]) -> Iterator[Point]:
        for one in ids:
            try:
                yield self._source.point(one)
            except (IntegrityError, NoSuchPoint) as error:
                log.warning("point %s is left out: %s", one, error)

    def _measure(self, found: list[Summary]) -> None:
        """Set `since`; where the parent was forgotten, compare with the point that stands before it now."""
        here = {one.id for one in found}
        last: dict[str, Summary] = {}
        for one in found:
            if one.parent in here:
                one.since = one.parent
            elif one.parent is not None:
                before = last.get(one.timeline)
                one.since, one.changed_bytes = before.id if before else None, self._distance(before, one)
            last[one.timeline] = one

    def _distance(self, older: Summary | None, newer: Summary) -> int:
        """Changed bytes between two points; without an older one, all that is not zero."""
        key = (older.id if older else "", newer.id)
        row = self._database.execute("SELECT bytes FROM distances WHERE older = ? AND newer = ?", key).fetchone()
        if row is not None:
            return int(row[0])
        before = {disk.disk: disk.map for disk in older.disks} if older else {}
        count = sum(_chunks(self._source.diff(before.get(disk.disk), disk.map)) for disk in newer.disks)
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO distances VALUES (?, ?, ?)", (*key, count * CHUNK))
        return count * CHUNK

    def _open(self) -> sqlite3.Connection:
        """One that is damaged or somebody else's is thrown away once; one that is in the making is waited for."""
        thrown_away = False
        for _ in range(_TRIES):
            try:
                with self._named():
                    return self._connect()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                time.sleep(_TRY_AGAIN)
            except sqlite3.DatabaseError:
                if thrown_away:
                    raise
                self._throw_away()
                thrown_away = True
        return self._connect()

    def _connect(self) -> sqlite3.Connection:
        with suppress(OSError):  # told by the next line, in words that are expected there
            # Made by SQLite others could read it: it has the names of domains, of disks and of points.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self._path, timeout=10)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            # It is a cache: a power cut may cost its last rows, and SQLite keeps it consistent all the same.
            database.execute("PRAGMA synchronous=NORMAL")
            if _version(database) == 0:
                self._create(database)
            if _version(database) != _VERSION or self._foreign(database):
                raise sqlite3.DatabaseError("of another version or repository")
        except BaseException:  # also Ctrl-C: a connection that nobody has would keep its lock
            database.close()
            raise
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        """In one transaction; a process that comes at the same moment finds it done."""
        with database:
            database.execute("BEGIN IMMEDIATE")
            if _version(database) == 0:
                for statement in _SCHEMA.strip().rstrip(";").split(";"):
                    database.execute(statement)
                database.execute("INSERT INTO about VALUES (?)", (self._source.id,))
                database.execute(f"PRAGMA user_version={_VERSION}")

    def _foreign(self, database: sqlite3.Connection) -> bool:
        row = database.execute("SELECT repository FROM about").fetchone()
        return row is None or row[0] != self._source.id

    def _throw_away(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def gaps(found: Sequence[Summary], every: float | None, now: datetime) -> list[Gap]:
    """Where scheduled points are missing: two neighbours (or the last one and now) lie more than two intervals apart.

    The reason is what the next point says about it, since only taking that one showed what had happened. Without a
    schedule nothing was promised, so nothing is missing.
    """
    if not every or not found:
        return []
    spans = [(a, b.time, "; ".join(b.notes)) for a, b in pairwise(found)]
    spans.append((found[-1], now, ""))
    return [
        Gap(a.time, end, reason or "no point was taken")
        for a, end, reason in spans
        if (end - a.time).total_seconds() > _MISSED * every
    ]


def _marks() -> str:
    return ", ".join("?" * len(_COLUMNS.split(", ")))


def _row(point: Point) -> tuple[Any, ...]:
    disks = [
        {"disk": one.disk, "size": one.size, "root": one.map.root.hex(), "map_size": one.map.size,
         "place": one.map.place, "kind": one.kind.value, "changed": one.changed_bytes, "format": one.format,
         "source": one.source}
        for one in point.disks
    ]  # fmt: skip
    guest = [one for one in point.disks if one.kind is DiskKind.DISK]
    stats = point.stats
    return (
        point.id, point.domain_uuid, point.domain, point.uri, point.time.timestamp(), point.timeline, point.parent,
        point.consistency.value, point.reason, point.label, sum(one.size for one in guest),
        sum(one.changed_bytes for one in point.disks), stats.moved_bytes, stats.stored_bytes, stats.pause_seconds,
        stats.seconds, json.dumps(disks), json.dumps(point.notes), point.journal,
        point.sequence,
    )  # fmt: skip


def _summary(row: tuple[Any, ...]) -> Summary:
    values = list(row)
    values[4] = datetime.fromtimestamp(row[4], UTC)
    values[17] = tuple(json.loads(row[17])) if row[17] != "[]" else ()
    return Summary(*values)


def _disk(one: dict[str, Any]) -> DiskPoint:
    return DiskPoint(
        disk=one["disk"], size=one["size"], map=MapRef(bytes.fromhex(one["root"]), one["map_size"], one["place"]),
        kind=DiskKind(one["kind"]), changed_bytes=one["changed"], format=one["format"], source=one["source"],
    )  # fmt: skip


def _chunks(indexes: Iterator[int]) -> int:
    return sum(1 for _ in indexes)
