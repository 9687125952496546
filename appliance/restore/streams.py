"""Streamed sessions, for everybody: each is a machine somewhere that boots from a point, and a process that serves it.

    prepare ─► launch ─► the process (serve.py) ─► state, phase_of: how it stands
       tidy: ended and forgotten, whatever of these there is

    HOME/streams/NAME/order.json      what it has to do, written once
    HOME/streams/NAME/state.json      {"key": its process, "view", "slot", "served", "ready", "answers", "phase",
                                       "done", "total", "rate", "read", "written", "boots", "service", "heard", "error"}
    HOME/streams/NAME/DISK.qcow2      what the machine has written to that disk
    HOME/streams/NAME/control         what it has said (control.py)
    HOME/streams/NAME/claim           which machine it is (claim.py)
    HOME/streams/NAME/tls/            the certificates of the session, if there are any
    HOME/log/serve-daemon-NAME.log    what its storage daemon says

Phases: `waiting` (nobody came yet), `booting`, `pulling` or `copying`, `done` (the machine is alone), and for those who
look: `stopped` when the process has died before. `answers`: a machine would be served now. `rate`: bytes a second that
the local disks got in the last half minute. `heard`: when its machine last gave a sign of life, in seconds of Unix, 0
for never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import DEFAULT_SETTINGS, Home
from appliance.model import MapRef
from appliance.process import lives, run
from appliance.restore import claim as claims
from appliance.restore import outliving
from appliance.restore.kept import holders, kill, views_of

__all__ = [
    "LOCK", "Order", "daemon_log", "folder", "half_forgotten", "launch", "load", "names", "needed", "phase_of",
    "prepare", "socket_path", "state", "tidy", "unfinished",
]  # fmt: skip

LOCK = "serve.lock"  # in a session's folder, held by the process that serves it
_START = 60.0


@dataclass(frozen=True, slots=True)
class Order:
    """`exports` are the disks of the point by their targets. `host` and `port` are where it listens; `tls` whether it
    speaks with nobody who has no certificate. `mode` is `stream` or `copy`; `target` and `image` tell a person more."""

    name: str
    session: str
    uuid: str
    point: str
    target: str
    repository: str
    exports: Mapping[str, MapRef]
    host: str
    port: int
    tls: bool
    mode: str
    image: str

    def to_json(self) -> dict[str, Any]:
        exports = {name: [ref.root.hex(), ref.size, ref.place] for name, ref in self.exports.items()}
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "exports"}
        return {**plain, "exports": exports}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Order:
        exports = {name: MapRef(bytes.fromhex(one[0]), one[1], one[2]) for name, one in value["exports"].items()}
        return cls(**{**value, "exports": exports})


# All sessions of a home: their orders and how they stand.
_KIND = outliving.Kind("streams", "appliance.restore.serve", Order.from_json)
folder, names, load, state = _KIND.folder, _KIND.names, _KIND.load, _KIND.state
half_forgotten = _KIND.half_forgotten
unfinished, needed = _KIND.unfinished, _KIND.needed


def phase_of(home: Home, name: str) -> str:
    """The phase as it is now, `stopped` included."""
    found = state(home, name)
    phase = str(found.get("phase", "stopped"))
    return phase if phase == "done" or lives(found.get("key", "")) else "stopped"


def prepare(home: Home, order: Order, certificates: Mapping[str, bytes]) -> Path:
    """The folder of a new session, with its overlays and certificates, but for the control file and the order that
    makes it exist. Raises ToolFailed; the caller removes the folder then."""
    where = folder(home, order.name)
    where.parent.mkdir(mode=0o700, exist_ok=True)
    where.mkdir(mode=0o700)
    for disk, ref in order.exports.items():
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=1.1", where / f"{disk}.qcow2", str(ref.size)])
    claims.create(where / claims.CLAIM)
    (where / "tls").mkdir(mode=0o700)
    for name, data in certificates.items():
        path = where / "tls" / name
        path.touch(mode=0o600)
        path.write_bytes(data)
    return where


def launch(home: Home, order: Order, settings_file: Path = DEFAULT_SETTINGS) -> None:
    """Write the order down and start the process; machines can connect when this returns. May be repeated. Raises
    RestoreError with the reason when nobody answers in time, and the process goes on trying then; or when it has ended
    before: its repository could not be opened."""
    key = _KIND.start(home, order.name, order, settings_file)
    _KIND.await_state(home, order.name, key, _is_ready, _START, "the server")


def socket_path(home: Home, uuid: str) -> Path:
    """Of the view that a session of this machine reads from."""
    return home.run(uuid) / "stream.sock"


def daemon_log(home: Home, name: str) -> Path:
    """Of its storage daemon: one of its own, whose last words are its own."""
    return home.log / f"serve-daemon-{name}.log"


def _is_ready(found: Mapping[str, Any]) -> bool:
    """Of a state: an old one says nothing of a process that has just begun."""
    return bool(found.get("ready")) and lives(found.get("key", ""))


def tidy(home: Home, name: str) -> None:
    """End a session and forget it, with what its machine has written, and its log. May be repeated."""
    found, order = state(home, name), load(home, name)
    # Whoever holds the lock may not have been able to write down who it is.
    for one in (found.get("key", ""), *holders(folder(home, name) / LOCK), found.get("view", "")):
        kill(one)
    for view in views_of(socket_path(home, order.uuid)) if order is not None else ():
        kill(view)  # of a server that was killed before it could write it down
    daemon_log(home, name).unlink(missing_ok=True)
    _KIND.drop(home, name)
