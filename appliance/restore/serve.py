"""The server of one streamed session: a machine somewhere boots from a point, and needs us until its disks are full.

    point ◄─ view (kept.py) ◄─ overlay of the session ◄─ qemu-storage-daemon ◄─ TLS ◄─ the machine

What the machine writes goes into the overlays, which are durable when it is told so: the point never changes, and a
machine that loses its power, or a server that is killed, goes on from there. The exports are written through: the
machine believes a write that was answered, and a server that is killed must not forget it with its own cache.

    HOME/streams/NAME/order.json      what it has to do, written once
    HOME/streams/NAME/state.json      {"key": its process, "view", "slot", "served", "ready", "phase", "done", "total",
                                       "read", "written", "boots", "service", "error"}
    HOME/streams/NAME/DISK.qcow2      what the machine has written to that disk
    HOME/streams/NAME/control         what it has said (control.py)
    HOME/streams/NAME/tls/            the certificates of the session, if there are any

Phases: `waiting` (nobody came yet), `booting`, `pulling` or `copying`, `done` (the machine is alone), and for those who
look: `stopped` when the process has died before. It ends when the machine says that it has let go. Its repository
session keeps gc away from what still has to be read.

    python -m appliance.restore.serve HOME NAME [SETTINGS]
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.errors import RestoreError, RewindError
from appliance.model import MapRef
from appliance.process import Child, alone, lives, process_key, run
from appliance.restore import outliving
from appliance.restore.control import CONTROL, Record, read_record
from appliance.restore.kept import KeptView, kill

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer
    from appliance.store import RepositorySpec

__all__ = ["Order", "Serving", "folder", "launch", "load", "names", "needed", "phase_of", "prepare", "state", "tidy"]

_KIND = "streams"
_TICK = 0.5
_START = 60.0
_AGAIN = 2.0
_LOOK = 5.0
# After the last word of the machine, which it has to hear an answer to.
_GRACE = 10.0
# A daemon that greets nobody for so long hangs.
_SILENT = 30.0
# Reads of the view wait for so long while it is brought back; then the machine is told of an error, and tries again.
_RECONNECT = 300
_GREETING = b"NBDMAGICIHAVEOPT"
_GOODBYE = b"\0\0\0\1IHAVEOPT\0\0\0\2\0\0\0\0"
_PHASES = {
    "": "waiting", "refused": "waiting", "booting": "booting", "filling": "pulling", "copying": "copying",
    "alone": "done", "detached": "done",
}  # fmt: skip

_log = logging.getLogger(__name__)


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


# --- for everybody --------------------------------------------------------------------------------------------------


def folder(home: Home, name: str) -> Path:
    """What is kept for that session. Raises ConfigError as `outliving.folder`."""
    return outliving.folder(home, _KIND, name)


def names(home: Home) -> list[str]:
    """Of all sessions of this home that are not tidied away."""
    return outliving.names(home, _KIND)


def load(home: Home, name: str) -> Order | None:
    """Raises ConfigError as `outliving.folder`."""
    found = outliving.order(home, _KIND, name)
    return None if found is None else Order.from_json(found)


def state(home: Home, name: str) -> dict[str, Any]:
    """The state file; empty if there is none."""
    return outliving.state(home, _KIND, name)


def needed(home: Home) -> dict[str, str]:
    """Points that machines still read their disks from → the session."""
    orders = {name: load(home, name) for name in names(home) if state(home, name).get("phase") != "done"}
    return {order.point: name for name, order in orders.items() if order is not None}


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
    (where / "tls").mkdir(mode=0o700)
    for name, data in certificates.items():
        path = where / "tls" / name
        path.touch(mode=0o600)
        path.write_bytes(data)
    return where


def launch(home: Home, order: Order, settings_file: Path = DEFAULT_SETTINGS) -> None:
    """Write the order down and start the process; machines can connect when this returns. May be repeated. Raises
    RestoreError with the reason when nobody answers in time; the process goes on trying then."""
    outliving.start(home, _KIND, order.name, order.to_json(), "appliance.restore.serve", settings_file)
    outliving.await_state(home, _KIND, order.name, _is_ready, _START, "the server")


def _is_ready(found: Mapping[str, Any]) -> bool:
    """Of a state: an old one says nothing of a process that has just begun."""
    return found.get("phase") == "done" or (bool(found.get("ready")) and lives(found.get("key", "")))


def tidy(home: Home, name: str) -> None:
    """End a session and forget it, with what its machine has written. May be repeated."""
    found = state(home, name)
    kill(found.get("key", ""))
    kill(found.get("view", ""))
    shutil.rmtree(folder(home, name), ignore_errors=True)


# --- the process ----------------------------------------------------------------------------------------------------


class Serving:
    """One session. `run` is its only thread besides the one that pings the view."""

    def __init__(self, home: Home, name: str, settings: Settings) -> None:
        order = load(home, name)
        if order is None:
            raise RestoreError(reason=f"nothing is known of a session called {name!r}")
        self._home, self._order, self._settings = home, order, settings
        self._folder = folder(home, name)
        self._socket = home.run(order.uuid) / "stream.sock"
        self._view = KeptView(name, self._make_view, self._socket, settings.view_timeout)
        self._daemon = _Daemon(order, self._folder, self._socket, home.log / "serve-daemon.log")
        self._written: dict[str, Any] = {}
        self._detached = 0.0

    def run(self) -> None:
        """Until the machine has let go. Returns at once if somebody else does it."""
        with alone(self._folder / "serve.lock") as first:
            if not first:
                return
            before = state(self._home, self._order.name)
            self._view.inherit(int(before.get("slot", 0)), int(before.get("served", 0)))
            spec = self._spec()
            if spec.key_fd is not None:
                spec = replace(spec, key_fd=os.dup(spec.key_fd))  # it is closed when it has been read
            with spec.open() as repo, repo.session(f"{self._order.target} boots from {self._order.point}"):
                while not self._step():
                    time.sleep(_TICK)
            self._daemon.stop()
            self._view.stop()

    def _step(self) -> bool:
        """Whether all is done."""
        self._view.tend("point")
        if self._view.key:
            self._daemon.tend()
        record = read_record(self._folder / CONTROL)
        self._note(record)
        if record.state == "detached" and not self._detached:
            self._detached = time.monotonic()
        return bool(self._detached) and time.monotonic() - self._detached > _GRACE

    def _spec(self) -> RepositorySpec:
        from appliance.store import RepositorySpec

        spec = RepositorySpec.from_json(self._order.repository)
        if spec.key_fd is not None:
            os.lseek(spec.key_fd, 0, os.SEEK_SET)  # whoever read it before has read it to its end
        return spec

    def _make_view(self, socket: Path) -> ViewServer:
        from appliance.restore.export import ViewServer

        folder = self._home.run(self._order.uuid)
        folder.mkdir(parents=True, exist_ok=True)
        return ViewServer(
            folder, self._spec(), self._order.exports, socket=socket, cache=self._settings.view_cache,
            log=self._home.log / "view.log", die_with_parent=False,
        )  # fmt: skip

    def _note(self, record: Record) -> None:
        now = {
            "key": process_key(os.getpid()), "view": self._view.key, "slot": self._view.slot,
            "served": self._view.served, "ready": self._daemon.ready, "phase": _PHASES[record.state],
            "done": record.done, "total": record.total or sum(ref.size for ref in self._order.exports.values()),
            "read": record.read, "written": record.written, "boots": record.boots, "service": record.service,
            "error": self._view.error or self._daemon.error or record.error,
        }  # fmt: skip
        if now != self._written:
            outliving.write_state(self._folder, now)
            self._written = now


class _Daemon:
    """The qemu-storage-daemon of a session, started anew when it has died or hangs; the machine waits meanwhile. It
    dies with us: nobody would look after it. `ready` is whether it has greeted."""

    def __init__(self, order: Order, folder: Path, view: Path, log: Path) -> None:
        self._order, self._folder, self._view, self._log = order, folder, view, log
        self._child: Child | None = None
        self._next_start = self._next_look = self._seen = 0.0
        self.ready = False
        self.error = ""

    def tend(self) -> None:
        """To be called again and again."""
        now = time.monotonic()
        if self._child is not None and not self._child.alive():
            self.error = f"the storage daemon has ended: {self._child.tail().splitlines()[-1:]}"
            _log.warning("%s: %s", self._order.name, self.error)
            self.stop()
        if self._child is None and now >= self._next_start:
            self._next_start = now + _AGAIN
            self._child = Child(self._command(), name="qemu-storage-daemon", log=self._log)
            self._seen, self._next_look = now, 0.0
        if self._child is not None and now >= self._next_look:
            self._look(now)

    def _look(self, now: float) -> None:
        greeted = _greets(self._order.host, self._order.port)
        self.ready |= greeted
        self._next_look = now + (_LOOK if greeted else 0.1)
        if greeted:
            self._seen, self.error = now, ""
        elif now - self._seen > _SILENT:
            _log.warning("%s: the storage daemon answers nobody: another takes its place", self._order.name)
            self.stop()

    def stop(self) -> None:
        """May be repeated."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def _command(self) -> list[str | Path]:
        order = self._order
        server = f"addr.type=inet,addr.host={order.host},addr.port={order.port}"
        words: list[str | Path] = ["qemu-storage-daemon"]
        if order.tls:
            place = str(self._folder / "tls")
            tls = {"qom-type": "tls-creds-x509", "id": "tls", "dir": place, "endpoint": "server", "verify-peer": True}
            words += ["--object", json.dumps(tls)]
            server += ",tls-creds=tls"
        words += ["--nbd-server", server]
        for disk in order.exports:
            words += self._disk(disk)
        control = {"driver": "file", "node-name": CONTROL, "filename": str(self._folder / CONTROL)}
        return [*words, "--blockdev", json.dumps(control), *_export(CONTROL, CONTROL)]

    def _disk(self, disk: str) -> list[str]:
        view = {
            "driver": "nbd", "node-name": f"view-{disk}", "read-only": True, "reconnect-delay": _RECONNECT,
            "server": {"type": "unix", "path": str(self._view)}, "export": disk,
        }  # fmt: skip
        overlay = {
            "driver": "qcow2", "node-name": f"disk-{disk}", "backing": f"view-{disk}",
            "file": {"driver": "file", "filename": str(self._folder / f"{disk}.qcow2")},
        }  # fmt: skip
        return ["--blockdev", json.dumps(view), "--blockdev", json.dumps(overlay), *_export(disk, f"disk-{disk}")]


def _export(name: str, node: str) -> list[str]:
    return ["--export", f"type=nbd,id={name},name={name},node-name={node},writable=on,writethrough=on"]


def _greets(host: str, port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, port), timeout=2.0) as client:
            greeted = client.recv(len(_GREETING) + 2).startswith(_GREETING)
            client.sendall(_GOODBYE)  # one that just leaves is an error in the daemon's log
            return greeted
    except OSError:
        return False


def main(argv: list[str]) -> int:
    """The command of the process; its log is its standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s serve %(levelname)s %(message)s")
    home = Home(Path(argv[1]))
    settings = load_settings(home, Path(argv[3]) if len(argv) > 3 else DEFAULT_SETTINGS)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        Serving(home, argv[2], settings).run()
    except RewindError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
