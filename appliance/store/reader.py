"""Gets chunks and blocks out of packs: the way out.

    id ─► a writer that still has it | index ─► pack ─► open ─► decompress
                                          ▲        damaged or gone: the next copy, then the index anew

A record may lie in several packs, and packs are moved by gc in other processes meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

from appliance.errors import IntegrityError, ObjectNotFound
from appliance.store.ahead import Ahead
from appliance.store.backend.base import Backend
from appliance.store.codec import Box, Codec, decompress
from appliance.store.index import Index
from appliance.store.node import BLOCK_SIZE
from appliance.store.pack import BLOCK, Entry, label, pack_name
from appliance.store.writer import ChunkWriter

__all__ = ["Reader"]

_BOXES = 1024


class Reader:
    """Thread-safe; `_lock` guards the cache of boxes. `writers` are those that are open in this process."""

    def __init__(
        self, backend: Backend, codec: Codec, index: Index, writers: Callable[[], Iterable[ChunkWriter]]
    ) -> None:
        self._backend, self._codec, self._index, self._writers = backend, codec, index, writers
        self._ahead = Ahead(index.table)
        self._lock = threading.Lock()
        self._boxes: dict[bytes, Box] = {}

    def block(self, record: bytes) -> dict[bytes, bytes]:
        """The block, and those behind it when the one before it was asked for last: walks go from block to block."""
        if (found := self._index.find(record)) is not None:
            # Whatever is wrong here, reading the block alone finds another copy or says what is wrong.
            with contextlib.suppress(ObjectNotFound, IntegrityError, ValueError):
                if entries := self._ahead.entries(*found):
                    pack, start = found[0], entries[0].offset
                    data = self._backend.get(pack_name(pack), start, entries[-1].offset + entries[-1].length - start)
                    return {entry.id: self._opened(pack, entry, data, start) for entry in entries}
        return {record: self.read(BLOCK, record, BLOCK_SIZE, "map block")}

    def _opened(self, pack: bytes, entry: Entry, data: bytes, start: int) -> bytes:
        sealed = data[entry.offset - start : entry.offset - start + entry.length]
        return decompress(self._box(pack).open(entry.offset, label(entry.kind, entry.id), sealed), BLOCK_SIZE)

    def read(self, kind: int, record: bytes, limit: int, what: str) -> bytes:
        """The plain record, of at most `limit` bytes. A copy that cannot be read is no reason to fail while there is
        another. Raises IntegrityError for `what` when there is none, and what the backend raises."""
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
            for writer in self._writers():
                if (pending := writer.read(record)) is not None:
                    pack, offset, sealed = pending
                    return self._box(pack).open(offset, label(kind, record), sealed)
            for pack, offset, length in self._index.places(record):
                try:
                    sealed = self._backend.get(pack_name(pack), offset, length)
                    return self._box(pack).open(offset, label(kind, record), sealed)
                except ObjectNotFound:
                    reason = f"{pack_name(pack)} is gone"
                except IntegrityError as error:
                    reason = f"in {pack_name(pack)} {error.fields['reason']}"
            if attempt == 1 and not self._index.verify():
                break
            # Written by another process since, or moved by gc; then again if the index itself was damaged.
            self._index.refresh()
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
            box = self._codec.box("pack", pack)
            with self._lock:
                if len(self._boxes) >= _BOXES:
                    self._boxes.clear()
                self._boxes[pack] = box
        return box
