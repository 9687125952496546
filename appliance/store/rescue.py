"""What a point relies on is in packs that stay: a record that is only in condemned ones is stored again in time.

    chunk     while a map is made: that it is stored at all
    point     before a commit: all that the point does not share with its parent
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from appliance.errors import IntegrityError
from appliance.model import MapRef, Point
from appliance.store.codec import Codec, compress
from appliance.store.index import Index
from appliance.store.map import check_root, new_nodes
from appliance.store.node import BLOCK_SIZE, OFFSET_BITS, Blocks, block_record
from appliance.store.pack import BLOCK, CHUNK_RECORD
from appliance.store.reader import Reader
from appliance.store.writer import ChunkWriter
from appliance.units import CHUNK

__all__ = ["Rescue"]


class Rescue:
    """Thread-safe. `writers` are those that are open in this process, `new_writer` opens one more."""

    def __init__(
        self, codec: Codec, index: Index, blocks: Blocks, reader: Reader,
        writers: Callable[[], Iterable[ChunkWriter]], new_writer: Callable[[], ChunkWriter],
    ) -> None:  # fmt: skip
        self._codec, self._index, self._blocks, self._reader = codec, index, blocks, reader
        self._writers, self._new_writer = writers, new_writer

    def chunk(self, chunk: bytes, writer: ChunkWriter) -> None:
        """That the chunk is stored and stays: one in a condemned pack is stored again. Raises IntegrityError."""
        if not any(one.holds(chunk) for one in (writer, *self._writers())):
            self._rescue(CHUNK_RECORD, chunk, writer)

    def _rescue(self, kind: int, record: bytes, writer: ChunkWriter) -> None:
        """Copy a record that is in condemned packs only. Raises IntegrityError when it is in no pack at all."""
        what = "chunk" if kind == CHUNK_RECORD else "map block"
        if self._index.find(record) is None:
            self._index.refresh()
            if self._index.find(record) is None and self._index.verify():
                self._index.refresh()
            if self._index.find(record) is None:
                raise IntegrityError(object=f"{what} {record.hex()}", reason="no pack holds it")
        if self._index.find(record, avoid=True) is None:
            limit = CHUNK if kind == CHUNK_RECORD else BLOCK_SIZE
            writer.add(kind, record, compress(self._reader.read(kind, record, limit, what)))

    def point(self, point: Point, parent: Point | None) -> None:
        """Every new node and chunk is in a pack that stays. Raises IntegrityError."""
        known = {disk.disk: disk.map for disk in parent.disks} if parent is not None else {}
        with contextlib.ExitStack() as stack:
            rescue: list[ChunkWriter] = []

            def keep(kind: int, record: bytes) -> None:
                if self._index.find(record, avoid=True) is None:
                    if not rescue:
                        rescue.append(stack.enter_context(self._new_writer()))
                    self._rescue(kind, record, rescue[0])

            for disk in point.disks:
                check_root(disk.map, self._blocks, self._codec)
                _visit(self._blocks, known.get(disk.disk), disk.map, keep)


def _visit(blocks: Blocks, known: MapRef | None, ref: MapRef, keep: Callable[[int, bytes], None]) -> None:
    last = 0
    for new in new_nodes(blocks, known, ref):
        if (tag := new.place >> OFFSET_BITS) != last:
            last = tag
            keep(BLOCK, block_record(tag))
        if not new.level:
            for chunk in new.new_ids():
                keep(CHUNK_RECORD, chunk)
