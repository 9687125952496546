"""Puts chunks and blocks into packs: the way in.

    put ─► id ─► held already? ─► compress ─► [lock: seal, append] ─► full? ─► upload ─► index

The work is done in the caller's thread. `put` returns when the chunk is in a pack, which may still be open: it is
durable, and findable by others, after `flush`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple

from appliance.errors import RewindError
from appliance.store.backend.base import Backend, Buffer
from appliance.store.codec import Codec, compress
from appliance.store.index import Index
from appliance.store.pack import CHUNK_RECORD, PackBuilder, pack_name
from appliance.units import CHUNK

__all__ = ["ZERO", "ChunkWriter", "WriterStats"]

ZERO: Final = bytes(CHUNK)
# Packs held in memory while they are being uploaded, beside the open one.
_UPLOADS: Final = 2


@dataclass(frozen=True, slots=True)
class WriterStats:
    """`new_bytes` before compression, `stored_bytes` as they lie in packs, blocks of maps included in the latter."""

    new_chunks: int = 0
    new_bytes: int = 0
    stored_bytes: int = 0
    reused_chunks: int = 0


class _Pending(NamedTuple):
    pack: PackBuilder
    offset: int
    length: int


class ChunkWriter:
    """Thread-safe; `_lock` guards the open pack, what is pending and the counters.

    After an upload failed, every later call raises the same error: chunks already answered for are not durable, so
    the caller has to begin again. Leaving the context normally flushes; leaving it by an exception drops what is not
    uploaded. What has been uploaded and is referred to by nothing is collected by gc.
    """

    def __init__(self, backend: Backend, codec: Codec, index: Index, on_close: Callable[[ChunkWriter], None]) -> None:
        self._backend = backend
        self._codec = codec
        self._index = index
        self._on_close = on_close
        self._lock = threading.Lock()
        self._uploaded = threading.Condition(self._lock)
        self._slots = threading.BoundedSemaphore(_UPLOADS)
        self._pack = self._new_pack()
        self._pending: dict[bytes, _Pending] = {}
        self._uploads = 0
        self._failure: RewindError | None = None
        # Not a WriterStats that is replaced for each chunk: that costs 7 µs.
        self._new_chunks = self._stored_bytes = self._reused_chunks = 0
        self._closed = False
        self.packs_written = 0

    @property
    def stats(self) -> WriterStats:
        """A snapshot."""
        with self._lock:
            chunks = self._new_chunks
            return WriterStats(chunks, chunks * CHUNK, self._stored_bytes, self._reused_chunks)

    def put(self, data: Buffer) -> bytes:
        """Store a chunk; its id, or b"" if it is all zero. Shorter data is padded with zeroes.

        Raises ValueError for more than a chunk, and what the backend raised for a pack, maybe an earlier one.
        """
        if len(data) > CHUNK:
            raise ValueError(f"{len(data)} bytes are more than a chunk")
        if ZERO.startswith(data):
            return b""
        if len(data) < CHUNK:
            data = bytes(data) + ZERO[len(data) :]
        record = self._codec.chunk_id(data)
        if self.holds(record):
            with self._lock:
                self._raise_failure()
                self._reused_chunks += 1
            return record
        self.add(CHUNK_RECORD, record, compress(data))
        return record

    def holds(self, record: bytes) -> bool:
        """Whether the record is stored, or in a pack of this writer, so that nobody is about to drop it."""
        return record in self._pending or self._index.find(record, avoid=True) is not None

    def add(self, kind: int, record: bytes, packed: bytes) -> None:
        """Store a record whatever is stored already, unless this writer just did. For blocks of maps and for copies."""
        with self._lock:
            self._raise_failure()
            if record in self._pending:
                return
            entry = self._pack.add(kind, record, packed)
            self._pending[record] = _Pending(self._pack, entry.offset, entry.length)
            self._new_chunks += kind == CHUNK_RECORD
            self._stored_bytes += entry.length
            full = self._taken() if self._pack.full else None
        if full is not None:
            self._upload(full)

    def read(self, record: bytes) -> tuple[bytes, int, bytes] | None:
        """(pack, offset, sealed bytes) of a record that is not in the index yet."""
        if record not in self._pending:
            return None
        with self._lock:
            pending = self._pending.get(record)
            if pending is None:
                return None
            return pending.pack.id, pending.offset, pending.pack.read(pending.offset, pending.length)

    def flush(self) -> None:
        """Everything put so far is durable and can be found by other processes. Raises what the backend raised."""
        with self._lock:
            self._raise_failure()
            last = self._taken() if self._pack.entries else None
        if last is not None:
            self._upload(last)
        with self._lock:
            while self._uploads and self._failure is None:
                self._uploaded.wait()
            self._raise_failure()

    def close(self) -> None:
        """Give up what is not flushed. Idempotent."""
        with self._lock:
            while self._uploads:
                self._uploaded.wait()
            closed, self._closed = self._closed, True
        if not closed:
            self._on_close(self)

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _taken(self) -> PackBuilder:
        """The open pack, to be uploaded by the caller; a new one is opened. With the lock held."""
        taken, self._pack = self._pack, self._new_pack()
        self._uploads += 1
        return taken

    def _new_pack(self) -> PackBuilder:
        while True:
            pack = PackBuilder(self._codec)
            if self._index.free_tag(pack.id):
                return pack

    def _upload(self, pack: PackBuilder) -> None:
        try:
            with self._slots:
                data = pack.finish()
                self._backend.put(pack_name(pack.id), data)
            self._index.add(pack.id, data.nbytes, pack.entries)
        except BaseException as error:
            with self._lock:
                self._failure = error if isinstance(error, RewindError) else RewindError(reason=f"upload: {error!r}")
                self._uploads -= 1
                self._uploaded.notify_all()
            raise
        with self._lock:
            for entry in pack.entries:
                del self._pending[entry.id]
            pack.recycle(data)
            self.packs_written += 1
            self._uploads -= 1
            self._uploaded.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RewindError(reason="this writer is closed")
