"""nbdkit plugin: gives disks as of one instant, read-only. Manual: nbdkit-rewind-view-plugin(1).

    nbdkit python plugin.py order=FILE       FILE is what `appliance.restore.export.ViewServer` wrote

The export `.stats` holds the statistics of the moment it is opened.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbdkit

from appliance.errors import StoreError
from appliance.nbdkit import keep_thread, settle_parents_death
from appliance.restore.export import STATS_EXPORT, ViewOrder
from appliance.store import RepositorySpec
from appliance.timeline.view import ChunkCache, DiskView, read_pending
from appliance.units import CHUNK

API_VERSION = 2

_MAX_REQUEST = 32 << 20
_STATS_INTERVAL = 1.0


class _Text:
    """A few bytes as a disk."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self.size = len(text)

    def readinto(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._text[offset : offset + len(buffer)]


class _Server:
    def __init__(self, order: ViewOrder) -> None:
        self._repo = RepositorySpec.from_json(order.repository).open()
        self._stats = order.stats
        self._writable = order.writable
        self.cache = ChunkCache(self._repo.read_chunk, order.cache)
        self.views = {name: DiskView(self._repo, ref, self.cache) for name, (ref, _) in order.exports.items()}
        for name, (_, pending) in order.exports.items():
            if pending is not None:
                self.views[name].set_pending(read_pending(pending))
        self._write(self.stats())  # the numbers of a server that was here before are not ours
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._write_regularly, name="stats", daemon=True)
        self._writer.start()
        # Beside: a repository that is slow to take a lock must not hold up a guest that waits for its blocks.
        self._session = contextlib.ExitStack()
        threading.Thread(target=self._enter_session, name="session", daemon=True).start()

    def _enter_session(self) -> None:
        """Keep gc from what is shown here, should its point be deleted meanwhile. Where no lock can be put (a key that
        may only read), nobody can delete either."""
        try:
            self._session.enter_context(self._repo.session("view"))
        except StoreError as error:
            nbdkit.debug(f"no session with the repository: {error}")

    def open(self, export: str) -> DiskView | _Text:
        if export == STATS_EXPORT and not self._writable:
            return _Text(self.stats())
        if export not in self.views:
            raise ValueError(f"no disk {export!r} is shown here")
        return self.views[export]

    def stats(self) -> bytes:
        cache = {"hits": self.cache.hits, "loads": self.cache.loads, "ahead": self.cache.ahead}
        exports = {name: asdict(view.stats()) for name, view in self.views.items()}
        return json.dumps({"pid": os.getpid(), "exports": exports, "cache": cache}).encode()

    def close(self) -> None:
        self._stop.set()
        self._writer.join()
        self.cache.close()
        with contextlib.suppress(StoreError):
            self._session.close()
        self._repo.close()

    def _write_regularly(self) -> None:
        last = b""
        stopped = False
        while not stopped:
            stopped = self._stop.wait(_STATS_INTERVAL)
            now = self.stats()
            if now != last:
                last = now
                self._write(now)

    def _write(self, text: bytes) -> None:
        # Whole or not at all, but not durable: it is of use only while this process or its parent lives.
        temporary = self._stats.with_suffix(".new")
        try:
            temporary.write_bytes(text)
            temporary.replace(self._stats)
        except OSError as error:
            nbdkit.debug(f"cannot write {self._stats}: {error}")


_order: Path | None = None
_server: _Server | None = None


def config(key: str, value: str) -> None:
    global _order
    if key != "order":
        raise ValueError(f"unknown parameter {key!r}")
    _order = Path(value)


def config_complete() -> None:
    if _order is None:
        raise ValueError("parameter order=FILE is missing")


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    settle_parents_death()


def after_fork() -> None:
    # Not earlier: threads would not survive a fork.
    global _server
    assert _order is not None
    _server = _Server(ViewOrder(_order))


def cleanup() -> None:
    if _server is not None:
        _server.close()


def list_exports(readonly: bool, is_tls: bool) -> list[str]:
    return list(_running().views)


def default_export(readonly: bool, is_tls: bool) -> str:
    """The only disk, if there is only one: then clients need no name."""
    names = list(_running().views)
    return names[0] if len(names) == 1 else ""


def open(readonly: bool) -> DiskView | _Text:
    return _running().open(str(nbdkit.export_name()))


def get_size(view: DiskView | _Text) -> int:
    return view.size


def block_size(view: DiskView | _Text) -> tuple[int, int, int]:
    return 1, CHUNK, _MAX_REQUEST


def can_multi_conn(view: DiskView | _Text) -> bool:
    return True


def can_extents(view: DiskView | _Text) -> bool:
    return isinstance(view, DiskView)


def pread(view: DiskView | _Text, buf: bytearray, offset: int, flags: int) -> None:
    if isinstance(view, DiskView):  # not for every client that looks at the statistics
        keep_thread()
    try:
        view.readinto(memoryview(buf), offset)
    except BaseException:  # whatever it is, the client gets an errno; nbdkit tells the rest
        nbdkit.set_error(errno.EIO)
        raise


def extents(view: DiskView, count: int, offset: int, flags: int) -> list[tuple[int, int, Any]]:
    try:
        one = flags & nbdkit.FLAG_REQ_ONE
        found = [view.first_extent(offset, count)] if one else view.extents(offset, count)
    except BaseException:  # whatever it is, the client gets an errno; nbdkit tells the rest
        nbdkit.set_error(errno.EIO)
        raise
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    return [(extent.offset, extent.length, hole if extent.zero else 0) for extent in found]


def _running() -> _Server:
    assert _server is not None, "nbdkit serves before after_fork"
    return _server
