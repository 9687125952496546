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
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from appliance.errors import (
    AlreadyExists,
    IntegrityError,
    NoSuchPoint,
    ObjectNotFound,
    RepositoryNotFound,
    StoreError,
    VersionUnsupported,
    WrongKey,
)
from appliance.model import MapRef, Point, Timeline
from appliance.store import blobs, collection, ledgers, manifest, parted, segments
from appliance.store.ahead import Ahead
from appliance.store.backend.base import Backend
from appliance.store.blobs import BlobRef
from appliance.store.codec import Box, Codec, compress, decompress
from appliance.store.index import Index
from appliance.store.key import Key
from appliance.store.lock import Lock, Locks
from appliance.store.map import Map, check_root, diff, new_nodes
from appliance.store.mapbuild import build
from appliance.store.node import BLOCK_SIZE, OFFSET_BITS, Blocks, block_record
from appliance.store.pack import BLOCK, CHUNK_RECORD, Entry, label, pack_name
from appliance.store.segments import SegmentRef
from appliance.store.writer import ZERO, ChunkWriter
from appliance.units import CHUNK

__all__ = ["VERSION", "Repository"]

VERSION: Final = 1
CONFIG: Final = "config"
DAMAGED: Final = "damaged/"
_BOXES = 1024

_log = logging.getLogger(__name__)


class Repository:
    """Thread-safe. `_lock` guards the writers, the session and its count, and the cache of boxes.

    A *session* is a shared lock, held while a writer is open, a point is being committed or a caller holds
    `lock("shared")`: gc deletes nothing that a session which began before may rely on.
    """

    def __init__(self, backend: Backend, cache: Path, config: dict[str, Any], codec: Codec) -> None:
        """Use `create` or `open`."""
        self.id: str = config["id"]
        self.encrypted: bool = config["encrypted"]
        self.backend = backend
        self.codec = codec
        self.cache = cache / self.id
        self.index = Index(backend, codec, self.cache / "index")
        self.blocks = Blocks(self.read_block)
        self._ahead = Ahead(self.index.table)
        self.locks = Locks(backend, self.cache)
        self._lock = threading.Lock()
        self._entering = threading.Lock()
        self._writers: tuple[ChunkWriter, ...] = ()
        self._session: Lock | None = None
        self._users = 0
        self._boxes: dict[bytes, Box] = {}
        self._point_names: dict[str, str] = {}
        self._swept = -1

    @classmethod
    def create(cls, backend: Backend, *, cache: Path, key: Key | None) -> Repository:
        """A new, empty one; without a key it is not encrypted. Raises AlreadyExists, and what the backend raises."""
        identity = secrets.token_bytes(16)
        codec = _codec(identity, key)
        config = {
            "rewind_repository": VERSION,
            "id": identity.hex(),
            "chunk": CHUNK,
            "encrypted": key is not None,
            "key_check": codec.key_check().hex(),
        }
        backend.put(CONFIG, json.dumps(config, indent=1).encode() + b"\n")
        return cls(backend, cache, config, codec)

    @classmethod
    def open(cls, backend: Backend, *, cache: Path, key: Key | None) -> Repository:
        """Raises RepositoryNotFound, WrongKey, VersionUnsupported, IntegrityError, and what the backend raises."""
        config = _load_config(backend)
        if config["encrypted"] and key is None:
            raise WrongKey(url=backend.url, reason="the repository is encrypted and no key was given")
        codec = _codec(bytes.fromhex(config["id"]), key if config["encrypted"] else None)
        if codec.key_check().hex() != config["key_check"]:
            raise WrongKey(url=backend.url, reason="the key is not this repository's")
        return cls(backend, cache, config, codec)

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
        return self._read(CHUNK_RECORD, chunk, CHUNK, "chunk") if chunk else ZERO

    def holds(self, chunk: bytes) -> bool:
        """Whether a chunk can be found, as far as this process knows: others' packs since its last look do not count.
        The zero chunk always can.
        """
        return not chunk or any(w.holds(chunk) for w in self._writers) or self.index.find(chunk) is not None

    def writer(self) -> ChunkWriter:
        """A new way in. Raises Locked while somebody has the repository for himself, and what the backend raises."""
        self._enter("capture")
        try:
            self._learn(always=True)
            writer = ChunkWriter(self.backend, self.codec, self.index, self._writer_closed)
        except BaseException:  # also Ctrl-C: a lock that nobody uses would keep gc away
            self._leave()
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
        return build(self.blocks, self.codec, writer, base, size, changes, lambda one: self._rely_on(one, writer))

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
            self._learn()
            parent = self._parent_of(point)
            self._secure(point, parent)
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
        self._enter(purpose)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, purpose: str) -> None:
        with self._entering:
            if self._session is None or not self._session.held():
                lost, self._session = self._session, self.locks.acquire("shared", purpose)
                if lost is not None:
                    lost.release()
                self._swept = -1
            with self._lock:
                self._users += 1

    def _leave(self) -> None:
        with self._entering:
            with self._lock:
                self._users -= 1
                ended = None if self._users else self._session
                if ended is not None:
                    self._session = None
            if ended is not None:
                ended.release()

    def _writer_closed(self, writer: ChunkWriter) -> None:
        with self._lock:
            self._writers = tuple(one for one in self._writers if one is not writer)
        self._leave()

    def _learn(self, always: bool = False) -> None:
        """What gc is about to drop; and, when it dropped something since we last looked, which packs are left."""
        found = collection.load(self.backend)
        session = self._session.id if self._session is not None else ""
        # gc waits for a session that it has listed, or has yet to list; packs it condemned are safe for us then.
        self.index.avoid(
            pack for one in found if one.sessions is not None and session not in one.sessions for pack in one.packs
        )
        swept = max((one.number for one in found if one.sweeping), default=0)
        if always or swept != self._swept:
            self.index.damaged(load_damaged(self.backend))
            self.index.refresh()
            self._swept = swept

    # Reading

    def read_block(self, record: bytes) -> dict[bytes, bytes]:
        """The block, and those behind it when the one before it was asked for last: walks go from block to block."""
        if (found := self.index.find(record)) is not None:
            # Whatever is wrong here, reading the block alone finds another copy or says what is wrong.
            with contextlib.suppress(ObjectNotFound, IntegrityError, ValueError):
                if entries := self._ahead.entries(*found):
                    pack, start = found[0], entries[0].offset
                    data = self.backend.get(pack_name(pack), start, entries[-1].offset + entries[-1].length - start)
                    return {entry.id: self._opened(pack, entry, data, start) for entry in entries}
        return {record: self._read(BLOCK, record, BLOCK_SIZE, "map block")}

    def _opened(self, pack: bytes, entry: Entry, data: bytes, start: int) -> bytes:
        sealed = data[entry.offset - start : entry.offset - start + entry.length]
        return decompress(self._box(pack).open(entry.offset, label(entry.kind, entry.id), sealed), BLOCK_SIZE)

    def _read(self, kind: int, record: bytes, limit: int, what: str) -> bytes:
        """The plain record. A copy that cannot be read is no reason to fail while there is another."""
        try:
            packed = self._packed(kind, record)
            return decompress(packed, limit)
        except ValueError as error:
            raise IntegrityError(object=f"{what} {record.hex()}", reason=str(error)) from error
        except IntegrityError as error:
            raise IntegrityError(object=f"{what} {record.hex()}", reason=error.fields["reason"]) from error

    def _packed(self, kind: int, record: bytes) -> bytes:
        reason = "no pack holds it"
        for attempt in range(3):
            for writer in self._writers:
                if (pending := writer.read(record)) is not None:
                    pack, offset, sealed = pending
                    return self._box(pack).open(offset, label(kind, record), sealed)
            for pack, offset, length in self.index.places(record):
                try:
                    sealed = self.backend.get(pack_name(pack), offset, length)
                    return self._box(pack).open(offset, label(kind, record), sealed)
                except ObjectNotFound:
                    reason = f"{pack_name(pack)} is gone"
                except IntegrityError as error:
                    reason = f"in {pack_name(pack)} {error.fields['reason']}"
            if attempt == 1 and not self.index.verify():
                break
            # Written by another process since, or moved by gc; then again if the index itself was damaged.
            self.index.refresh()
        raise IntegrityError(object="", reason=reason)

    def packed_or_none(self, kind: int, record: bytes) -> bytes | None:
        """The record as `codec.compress` made it, from whichever copy can be read."""
        try:
            return self._packed(kind, record)
        except IntegrityError:
            return None

    def _box(self, pack: bytes) -> Box:
        box = self._boxes.get(pack)
        if box is None:
            box = self.codec.box("pack", pack)
            with self._lock:
                if len(self._boxes) >= _BOXES:
                    self._boxes.clear()
                self._boxes[pack] = box
        return box

    # What a point relies on

    def _rely_on(self, chunk: bytes, writer: ChunkWriter) -> None:
        """That the chunk is stored and stays: one in a condemned pack is stored again. Raises IntegrityError."""
        if not any(one.holds(chunk) for one in (writer, *self._writers)):
            self._rescue(CHUNK_RECORD, chunk, writer)

    def _rescue(self, kind: int, record: bytes, writer: ChunkWriter) -> None:
        """Copy a record that is in condemned packs only. Raises IntegrityError when it is in no pack at all."""
        what = "chunk" if kind == CHUNK_RECORD else "map block"
        if self.index.find(record) is None:
            self.index.refresh()
            if self.index.find(record) is None and self.index.verify():
                self.index.refresh()
            if self.index.find(record) is None:
                raise IntegrityError(object=f"{what} {record.hex()}", reason="no pack holds it")
        if self.index.find(record, avoid=True) is None:
            limit = CHUNK if kind == CHUNK_RECORD else BLOCK_SIZE
            writer.add(kind, record, compress(self._read(kind, record, limit, what)))

    def _secure(self, point: Point, parent: Point | None) -> None:
        """Every new node and chunk is in a pack that stays. Raises IntegrityError."""
        known = {disk.disk: disk.map for disk in parent.disks} if parent is not None else {}
        with contextlib.ExitStack() as stack:
            rescue: list[ChunkWriter] = []

            def keep(kind: int, record: bytes) -> None:
                if self.index.find(record, avoid=True) is None:
                    if not rescue:
                        rescue.append(stack.enter_context(self.writer()))
                    self._rescue(kind, record, rescue[0])

            for disk in point.disks:
                check_root(disk.map, self.blocks, self.codec)
                _visit(self.blocks, known.get(disk.disk), disk.map, keep)

    def _secure_or_withdraw(self, point: Point, name: str) -> None:
        try:
            self.index.refresh()
            self._secure(point, None)
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


def _visit(blocks: Blocks, known: MapRef | None, ref: MapRef, keep: Callable[[int, bytes], None]) -> None:
    last = 0
    for new in new_nodes(blocks, known, ref):
        if (tag := new.place >> OFFSET_BITS) != last:
            last = tag
            keep(BLOCK, block_record(tag))
        if not new.level:
            for chunk in new.new_ids():
                keep(CHUNK_RECORD, chunk)


def load_damaged(backend: Backend) -> dict[bytes, frozenset[bytes]]:
    """The records known to be damaged, by pack; none stands for the whole pack."""
    found = {}
    for info in backend.list(DAMAGED):
        with contextlib.suppress(ObjectNotFound):
            try:
                values = json.loads(backend.get(info.name))
                found[bytes.fromhex(values["pack"])] = frozenset(bytes.fromhex(one) for one in values["records"])
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(object=info.name, reason="it cannot be read") from error
    return found


def _codec(identity: bytes, key: Key | None) -> Codec:
    return Codec((key.secret if key is not None else b"not encrypted") + identity, encrypted=key is not None)


def _load_config(backend: Backend) -> dict[str, Any]:
    try:
        config = json.loads(backend.get(CONFIG))
        version = config["rewind_repository"]
        if version != VERSION:
            raise VersionUnsupported(object=f"repository {backend.url}", version=version, supported=VERSION)
        bytes.fromhex(config["id"] + config["key_check"])
        if config["chunk"] != CHUNK or not isinstance(config["encrypted"], bool):
            raise ValueError("values out of range")
    except ObjectNotFound:
        raise RepositoryNotFound(url=backend.url) from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(object=f"{backend.url}/{CONFIG}", reason=f"it cannot be read: {error}") from error
    return dict(config)
