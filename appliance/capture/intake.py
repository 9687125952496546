"""The NBD server that an epoch is pushed into, seen from its parent.

One nbdkit process takes all disks of a domain (export name = disk) and does the whole work of `ingest`. What it found
is in one changes file for each disk, which is complete as soon as the client's flush has been answered and stays
readable whatever happens to the process afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from appliance.capture.changes import read_changes, read_header
from appliance.capture.ingest import result_path
from appliance.model import MapRef
from appliance.nbdkit import Server

if TYPE_CHECKING:
    from appliance.store import RepositorySpec

__all__ = ["Intake", "read_order"]

# The client's own requests in flight are the parallelism: QEMU opens one connection, and more threads than this were
# measured to bring nothing.
_THREADS = 4


class Intake:
    """Paths of one intake are all in its folder `run`; one at a time may use a folder.

    `disks` gives size and base map of each. A base of None is an empty disk: everything that is not zero is a change.
    Any thread may call everything.
    """

    def __init__(
        self,
        run: Path,
        spec: RepositorySpec,
        disks: Mapping[str, tuple[int, MapRef | None]],
        *,
        owner: tuple[int, int] | None = None,
        log: Path | None = None,
    ) -> None:
        self._results = run / "intake"
        self._order = run / "intake.json"
        self._spec = spec
        self._disks = dict(disks)
        key_fd = getattr(spec, "key_fd", None)
        self._server = Server(
            "intake", run / "intake.sock", {"order": self._order}, threads=_THREADS, owner=owner, log=log,
            pass_fds=() if key_fd is None else (key_fd,),
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

    def start(self) -> None:
        """Forget earlier results and start serving. Raises ToolFailed with the reason; nothing runs then."""
        from appliance.config import write_json  # the plugin imports this module too, and starts in half the time

        self._results.mkdir(parents=True, exist_ok=True)
        for old in self._results.glob("*.changes"):
            old.unlink()
        write_json(self._order, {
            "repository": self._spec.to_json(),
            "results": str(self._results),
            "disks": {name: {"size": size, "base": _to_json(base)} for name, (size, base) in self._disks.items()},
        })  # fmt: skip
        self._server.start()

    def alive(self) -> bool:
        return self._server.alive()

    def stop(self) -> None:
        """End it; results stay. May be repeated."""
        self._server.stop()

    def kill(self) -> None:
        """End it at once, also when it hangs; what was sealed stays. May be repeated."""
        self._server.kill()

    def tail(self) -> str:
        """Its last words, for the message when a job failed."""
        return self._server.tail()

    def changes(self, disk: str) -> Iterator[tuple[int, bytes]]:
        """(index, id) of the chunks that differ from the base, ascending; b"" for all zero.

        Raises CaptureError, before the first, when the disk was not flushed completely.
        """
        return read_changes(result_path(self._results, disk))

    def counters(self, disk: str) -> dict[str, int]:
        """At its last flush: `moved` and `zeroed` bytes, `writes` and `zeroes` requests of this disk; `stored` bytes
        and `new_chunks` of the whole intake in the repository. Raises CaptureError as `changes`."""
        return {name: int(value) for name, value in read_header(result_path(self._results, disk)).items()}


def read_order(path: Path) -> tuple[Any, dict[str, tuple[int, MapRef | None]], Path]:
    """(repository, disks, folder for the results) that the parent ordered; for the plugin."""
    order = json.loads(path.read_text())
    disks = {name: (int(disk["size"]), _from_json(disk["base"])) for name, disk in order["disks"].items()}
    return order["repository"], disks, Path(order["results"])


def _to_json(ref: MapRef | None) -> dict[str, Any] | None:
    return None if ref is None else {"root": ref.root.hex(), "size": ref.size, "place": ref.place}


def _from_json(value: dict[str, Any] | None) -> MapRef | None:
    return None if value is None else MapRef(bytes.fromhex(value["root"]), value["size"], value["place"])
