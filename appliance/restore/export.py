"""The NBD server that gives disks as of one instant, seen from its parent.

One nbdkit process serves all disks of a point (export name = disk), read-only. A writable export lies on an overlay
that is thrown away when the server ends; nbdkit's overlay assumes that all exports are the same disk, so a writable
server has one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from appliance import nbd
from appliance.errors import ConfigError, RewindError, ToolFailed
from appliance.model import MapRef
from appliance.nbdkit import Server
from appliance.timeline.view import CACHE

if TYPE_CHECKING:
    from appliance.store import RepositorySpec

__all__ = ["STATS_EXPORT", "ViewOrder", "ViewServer", "read_order"]

# An export whose content is the statistics at the moment it is opened: the file is up to a second old. Not on a
# writable server, whose overlay would take it for the disk.
STATS_EXPORT = ".stats"

_THREADS = 16


class ViewServer:
    """Its files are all in the folder `run`, named after the socket. `pending` names, for exports of a revert, files
    written by `timeline.view.write_pending`. Any thread may call everything."""

    def __init__(
        self,
        run: Path,
        spec: RepositorySpec,
        exports: Mapping[str, MapRef],
        *,
        writable: bool = False,
        pending: Mapping[str, Path] | None = None,
        socket: Path | None = None,
        owner: tuple[int, int] | None = None,
        cache: int = CACHE,
        log: Path | None = None,
        die_with_parent: bool = True,
    ) -> None:
        if writable and len(exports) != 1:
            raise ConfigError(reason=f"a writable server has one export, not {len(exports)}")
        socket = socket or run / "view.sock"
        self._order = run / f"{socket.stem}.json"
        self.stats_file = run / f"{socket.stem}.stats.json"
        self._spec = spec
        self._exports = dict(exports)
        self._pending = dict(pending or {})
        self._cache = cache
        self._writable = writable
        key_fd = getattr(spec, "key_fd", None)
        self._server = Server(
            "view", socket, {"order": self._order}, threads=_THREADS, owner=owner, log=log,
            filters=("cow",) if writable else (), env={"TMPDIR": str(run)} if writable else None,
            pass_fds=() if key_fd is None else (key_fd,), die_with_parent=die_with_parent,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def socket(self) -> Path:
        return self._server.socket

    @property
    def pid(self) -> int:
        return self._server.pid

    def uri(self, export: str) -> str:
        """For nbdinfo, nbdcopy, qemu-img."""
        return f"nbd+unix:///{quote(export)}?socket={quote(os.fspath(self.socket))}"

    def size(self, export: str) -> int:
        """In bytes. Raises ToolFailed for one that is not shown."""
        if export not in self._exports:
            raise ToolFailed(tool="nbdkit-view", reason=f"no disk {export!r} is shown here")
        return self._exports[export].size

    def start(self) -> None:
        """Serve. Raises ToolFailed with the reason; nothing runs then. After `kill` it may be started again."""
        from appliance.config import write_json  # the plugin imports this module too, and starts in half the time

        write_json(self._order, {
            "repository": self._spec.to_json(),
            "stats": str(self.stats_file),
            "cache": self._cache,
            "writable": self._writable,
            "exports": {
                name: {
                    "root": ref.root.hex(), "size": ref.size, "place": ref.place,
                    "pending": str(self._pending[name]) if name in self._pending else None,
                }
                for name, ref in self._exports.items()
            },
        })  # fmt: skip
        self._server.start()

    def alive(self) -> bool:
        """Whether the process is there; it may hang."""
        return self._server.alive()

    def answers(self, timeout: float) -> bool:
        """Whether it greets a client within `timeout` seconds."""
        return self._server.answers(timeout)

    def stop(self) -> None:
        """End it. May be repeated."""
        self._server.stop()

    def kill(self, *, succeeded: bool = False) -> None:
        """End it at once, also when it hangs. May be repeated. `succeeded`: as in `nbdkit.Server.kill`."""
        self._server.kill(succeeded=succeeded)

    def take_place(self, path: Path) -> None:
        """See `nbdkit.Server.take_place`."""
        self._server.take_place(path)

    def tail(self) -> str:
        """Its last words."""
        return self._server.tail()

    def stats(self) -> dict[str, Any]:
        """`{"exports": {name: {bytes, requests, pending, touched, touched_first}}, "cache": {hits, loads, ahead}}`:
        of this moment from a running server (a writable one: up to a second old), else as it was last written; empty
        if it never was. Counted since the process began."""
        text = self._stats_now() or self._stats_written()
        found: dict[str, Any] = json.loads(text)
        return found

    def _stats_now(self) -> bytes:
        if self._writable or not self.alive():
            return b""
        try:
            with nbd.connect(self.socket, STATS_EXPORT, contexts=()) as connection:
                return bytes(connection.pread(connection.size(), 0))
        except RewindError:  # it was killed this moment
            return b""

    def _stats_written(self) -> bytes:
        try:
            return self.stats_file.read_bytes()
        except FileNotFoundError:
            return b"{}"


class ViewOrder:
    """What the parent ordered; for the plugin."""

    def __init__(self, path: Path) -> None:
        order = json.loads(path.read_text())
        self.repository: Any = order["repository"]
        self.stats = Path(order["stats"])
        self.cache = int(order["cache"])
        self.writable = bool(order["writable"])
        self.exports: dict[str, tuple[MapRef, Path | None]] = {
            name: (
                MapRef(bytes.fromhex(one["root"]), one["size"], one["place"]),
                Path(one["pending"]) if one["pending"] else None,
            )
            for name, one in order["exports"].items()
        }


def read_order(path: Path) -> ViewOrder:
    return ViewOrder(path)
