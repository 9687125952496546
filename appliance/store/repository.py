"""A repository: what the rest of the program sees of the store.

    config                  format version, id, whether it is encrypted, key check
    packs/ID                chunks and blocks of maps
    points/DOMAIN/POINT     creating it is the commit          timelines/DOMAIN/TIMELINE
    segments/DOMAIN/…       journals of continuous capture: see segments.py
    ledgers/DOMAIN/…        what that covered: see ledgers.py
    blobs/KIND/NAME         templates, targets and drivers of bootable images: see blobs.py
    locks/…                 who is at work                     gc/…      what is about to be dropped
    damaged/PACK            records that are known to be unreadable, so that they are stored again

FORMAT.md is normative. Everything but locks and gc's notes is immutable.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from appliance.errors import (
    AlreadyExists,
    IntegrityError,
    NoSuchPoint,
    ObjectNotFound,
    StoreError,
    VersionUnsupported,
)
from appliance.model import MapRef, Point, Timeline
from appliance.store import blobs, config, ledgers, manifest, parted, segments
from appliance.store.backend.base import Backend
from appliance.store.blobs import BlobRef
from appliance.store.codec import Codec
from appliance.store.index import Index
from appliance.store.key import Key
from appliance.store.lock import Lock, Locks
from appliance.store.map import Map, check_root, diff
from appliance.store.mapbuild import build
from appliance.store.node import Blocks
from appliance.store.pack import CHUNK_RECORD
from appliance.store.reader import Reader
from appliance.store.rescue import Rescue
from appliance.store.segments import SegmentRef
from appliance.store.session import Session
from appliance.store.writer import ZERO, ChunkWriter
from appliance.units import CHUNK

__all__ = ["Repository"]

_log = logging.getLogger(__name__)


class Repository:
    """Thread-safe. `_lock` guards the writers.

    A *session* is a shared lock, held while a writer is open, a point is being committed or a caller holds
    `lock("shared")`: gc deletes nothing that a session which began before may rely on.
    """

    def __init__(self, backend: Backend, cache: Path, facts: dict[str, Any], codec: Codec) -> None:
        """Use `create` or `open`."""
        self.id: str = facts["id"]
        self.encrypted: bool = facts["encrypted"]
        self.backend = backend
        self.codec = codec
        self.cache = cache / self.id
        self.index = Index(backend, codec, self.cache / "index")
        self.reader = Reader(backend, codec, self.index, lambda: self._writers)
        self.blocks = Blocks(self.reader.block)
        self.locks = Locks(backend, self.cache)
        self._session = Session(backend, self.index, self.locks)
        self._rescue = Rescue(codec, self.index, self.blocks, self.reader, lambda: self._writers, self.writer)
        self._lock = threading.Lock()
        self._writers: tuple[ChunkWriter, ...] = ()
        self._point_names: dict[str, str] = {}

    @classmethod
    def create(cls, backend: Backend, *, cache: Path, key: Key | None) -> Repository:
        """A new, empty one; without a key it is not encrypted. Raises AlreadyExists, and what the backend raises."""
        made, codec = config.create(backend, key)
        return cls(backend, cache, made, codec)

    @classmethod
    def open(cls, backend: Backend, *, cache: Path, key: Key | None) -> Repository:
        """Raises RepositoryNotFound, WrongKey, VersionUnsupported, IntegrityError, and what the backend raises."""
        found, codec = config.read(backend, key)
        return cls(backend, cache, found, codec)

    @property
    def url(self) -> str:
        return self.backend.url

    def close(self) -> None:
        """Idempotent. Open writers are given up."""
        for writer in self._writers:
            writer.close()
        self.index.close()
        self.backend.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Chunks

    def read_chunk(self, chunk: bytes) -> bytes:
        """The 64 KiB of that id (b"": zeroes). Raises IntegrityError when it is lost or damaged in every copy, and
        what the backend raises.
        """
        return self.reader.read(CHUNK_RECORD, chunk, CHUNK, "chunk") if chunk else ZERO

    def holds(self, chunk: bytes) -> bool:
        """Whether a chunk can be found, as far as this process knows: others' packs since its last look do not count.
        The zero chunk always can.
        """
        return not chunk or any(w.holds(chunk) for w in self._writers) or self.index.find(chunk) is not None

    def writer(self) -> ChunkWriter:
        """A new way in. Raises Locked while somebody has the repository for himself, and what the backend raises."""
        self._session.enter("capture")
        try:
            self._session.learn(always=True)
            writer = ChunkWriter(self.backend, self.codec, self.index, self._writer_closed)
        except BaseException:  # also Ctrl-C: a lock that nobody uses would keep gc away
            self._session.leave()
            raise
        with self._lock:
            self._writers = (*self._writers, writer)
        return writer

    # Maps

    def write_map(
        self, base: MapRef | None, size: int, changes: Iterable[tuple[int, bytes]], writer: ChunkWriter
    ) -> MapRef:
        """The map of a disk of `size` bytes: `base` (None: zeroes) with `changes` (ascending index, id; b"" = zero).

        Equal disks get equal roots, however they came about. Readable at once in this process, durable after
        `writer.flush()`. When the disk shrinks into the middle of a chunk, the caller gives that chunk anew, zeroed
        beyond the end. Raises ValueError for changes that do not ascend or are beyond the end, IntegrityError for a
        chunk that is nowhere.
        """
        return build(self.blocks, self.codec, writer, base, size, changes, lambda one: self._rescue.chunk(one, writer))

    def map(self, ref: MapRef) -> Map:
        """Raises IntegrityError when the root is not there."""
        check_root(ref, self.blocks, self.codec)
        return Map(ref, self.blocks)

    def diff(self, a: MapRef | None, b: MapRef | None) -> Iterator[int]:
        """Indexes of chunks that differ, ascending; None is all zero. Opens only what differs."""
        return diff(self.blocks, a, b)

    # Points

    def commit(self, point: Point) -> None:
        """Make the point exist, durably and at once. Everything it needs must be flushed before.

        What the point does not share with its parent is looked up, so a point that could not be read back is refused
        with IntegrityError. Committing an equal point again is no error; another of that id is AlreadyExists.
        """
        name = manifest.point_name(point.domain_uuid, point.id)
        with self.session("commit"):
            self._session.learn()
            parent = self._parent_of(point)
            self._rescue.point(point, parent)
            try:
                self.backend.put(name, manifest.encode_point(self.codec, point))
            except AlreadyExists:
                if self._load_point(name, changed=True) != point:
                    raise
            if parent is not None and self.index.avoided and not self._is_there(parent):
                # Somebody deleted the parent meanwhile, and gc may not have seen either: see FORMAT.md, "Dropping".
                self._secure_or_withdraw(point, name)
        self._point_names[point.id] = name

    def points(self, domain_uuid: str | None = None, damaged: list[StoreError] | None = None) -> list[Point]:
        """Oldest first, without the lists of changed chunks. Points whose object is damaged, or of a version we do not
        know, are left out; they are logged, and appended to `damaged`.
        """
        prefix = manifest.POINTS + (f"{domain_uuid}/" if domain_uuid else "")
        found = []
        for info in self.backend.list(prefix):
            try:
                point = self._load_point(info.name, changed=False, size=info.size)
            except ObjectNotFound:
                continue
            except (IntegrityError, VersionUnsupported) as error:
                _log.warning("%s", error)
                if damaged is not None:
                    damaged.append(error)
                continue
            self._point_names[point.id] = info.name
            found.append(point)
        return sorted(found, key=lambda point: (point.time, point.id))

    def point_ids(self, domain_uuid: str | None = None) -> list[tuple[str, str]]:
        """(domain uuid, point id) of all that exist, from one listing: for caches that hold the rest."""
        prefix = manifest.POINTS + (f"{domain_uuid}/" if domain_uuid else "")
        names = {}
        for info in self.backend.list(prefix):
            domain, _, point = info.name.removeprefix(manifest.POINTS).partition("/")
            names[point] = (domain, point)
            self._point_names[point] = info.name
        return list(names.values())

    def point(self, point: str) -> Point:
        """With the lists of changed chunks. Raises NoSuchPoint, IntegrityError, VersionUnsupported."""
        for _ in range(2):
            name = self._point_names.get(point)
            if name is not None:
                with contextlib.suppress(ObjectNotFound):
                    return self._load_point(name, changed=True)
                self._point_names.pop(point, None)
            self.point_ids()
        raise self._no_point(point)

    def delete_point(self, point: str) -> None:
        """Its data goes with the next gc. Raises NoSuchPoint."""
        if point not in self._point_names:
            self.point_ids()
        try:
            name = self._point_names.pop(point)
        except KeyError:
            raise self._no_point(point) from None
        self.backend.delete(name)

    def _no_point(self, point: str) -> NoSuchPoint:
        """Whose it was is not known here; who knows says it."""
        return NoSuchPoint(domain=self.url, when=point, hint="`rewind status` tells which domains have points")

    def _secure_or_withdraw(self, point: Point, name: str) -> None:
        try:
            self.index.refresh()
            self._rescue.point(point, None)
        except BaseException:  # also Ctrl-C: a point whose chunks are not sure to be there must not be listed
            self.backend.delete(name)
            raise

    def _parent_of(self, point: Point) -> Point | None:
        if point.parent is None:
            return None
        name = manifest.point_name(point.domain_uuid, point.parent)
        try:
            return self._load_point(name, changed=False)
        except (ObjectNotFound, IntegrityError, VersionUnsupported):
            return None

    def _is_there(self, point: Point) -> bool:
        try:
            self.backend.stat(manifest.point_name(point.domain_uuid, point.id))
        except ObjectNotFound:
            return False
        return True

    def _load_point(self, name: str, changed: bool, size: int | None = None) -> Point:
        if size is None:
            size = self.backend.stat(name).size
        needed = size if changed else min(size, manifest.HEAD_GUESS)
        while True:
            data = self.backend.get(name, 0, needed)
            point, needed = manifest.decode_point(self.codec, name, data, size, changed)
            if point is not None:
                return point
            if needed > size or len(data) >= needed:
                raise IntegrityError(object=name, reason="it is cut short")

    # Timelines

    def timelines(self, domain_uuid: str) -> list[Timeline]:
        """Oldest first. Raises IntegrityError."""
        found = []
        for info in self.backend.list(f"{manifest.TIMELINES}{domain_uuid}/"):
            found.append(manifest.decode_timeline(self.codec, info.name, self.backend.get(info.name)))
        return sorted(found, key=lambda timeline: (timeline.created, timeline.id))

    def put_timeline(self, timeline: Timeline) -> None:
        """Durable. Putting an equal one again is no error; another of that id is AlreadyExists."""
        name = manifest.timeline_name(timeline.domain_uuid, timeline.id)
        try:
            self.backend.put(name, manifest.encode_timeline(self.codec, timeline))
        except AlreadyExists:
            if manifest.decode_timeline(self.codec, name, self.backend.get(name)) != timeline:
                raise

    # Segments of journals: opaque files, whole in themselves

    def put_segment(
        self, domain_uuid: str, journal: str, first: int, last: int, path: Path,
        pace: Callable[[int], None] | None = None,
    ) -> SegmentRef:  # fmt: skip
        """Store the file, durably; see `segments.put`. Raises AlreadyExists for another content of that name."""
        return segments.put(self.backend, self.codec, SegmentRef(domain_uuid, journal, first, last), path, pace)

    def segments(self, domain_uuid: str | None = None, whole: bool = True) -> list[SegmentRef]:
        """By domain, journal and number; with `whole` False also what is left of shipping that was broken off."""
        return [ref for ref in segments.listing(self.backend, domain_uuid) if ref.whole or not whole]

    def fetch_segment(self, ref: SegmentRef, path: Path) -> None:
        """The file as it was, proved, or none; see `parted.fetch`. Raises ObjectNotFound, IntegrityError."""
        parted.fetch(self.backend, self.codec, ref.name, path)

    def read_segment(self, ref: SegmentRef, offset: int = 0, length: int | None = None) -> bytes:
        """A range of the file; see `parted.read`. Raises ObjectNotFound, IntegrityError."""
        return parted.read(self.backend, self.codec, ref.name, offset, length)

    def delete_segment(self, ref: SegmentRef) -> None:
        """Its space is free at once. No error when it is gone."""
        parted.delete(self.backend, ref.name)

    # Libraries: templates, targets, drivers

    def put_blob(self, kind: str, name: str, path: Path) -> None:
        """Store the file, durably; see `blobs.put`. Raises AlreadyExists for another content of that name."""
        blobs.put(self.backend, self.codec, kind, name, path)

    def blobs(self, kind: str = "") -> list[BlobRef]:
        """By kind and name; one listing."""
        return blobs.listing(self.backend, kind)

    def fetch_blob(self, ref: BlobRef, path: Path) -> None:
        """The file as it was, proved, or none; see `parted.fetch`. Raises ObjectNotFound, IntegrityError."""
        parted.fetch(self.backend, self.codec, ref.object, path)

    def read_blob(self, ref: BlobRef) -> bytes:
        """All of it. Raises ObjectNotFound, IntegrityError."""
        return parted.read(self.backend, self.codec, ref.object)

    def delete_blob(self, ref: BlobRef) -> None:
        """Its space is free at once. No error when it is gone."""
        parted.delete(self.backend, ref.object)

    # What continuous capture covered

    def put_ledger(self, domain_uuid: str, data: bytes) -> None:
        """A copy of the domain's ledger takes the place of the one before, durably."""
        ledgers.put(self.backend, self.codec, domain_uuid, data)

    def ledger(self, domain_uuid: str) -> bytes | None:
        """The newest copy, or None. Raises IntegrityError, VersionUnsupported."""
        return ledgers.load(self.backend, self.codec, domain_uuid)

    def captured(self) -> list[str]:
        """The uuids of domains that have a copy of a ledger."""
        return ledgers.domains(self.backend)

    # Locks and sessions

    def lock(self, mode: str, purpose: str, wait: float = 0.0) -> Lock:
        """A lock to use with `with`: "shared", "maintenance" or "exclusive"; see lock.py. Raises Locked."""
        return self.locks.acquire(mode, purpose, wait)

    @contextlib.contextmanager
    def session(self, purpose: str) -> Iterator[None]:
        """gc waits for us. Cheap when a session is open already."""
        self._session.enter(purpose)
        try:
            yield
        finally:
            self._session.leave()

    def _writer_closed(self, writer: ChunkWriter) -> None:
        with self._lock:
            self._writers = tuple(one for one in self._writers if one is not writer)
        self._session.leave()
