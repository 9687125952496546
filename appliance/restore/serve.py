"""The server of one streamed session: a machine somewhere boots from a point, and needs us until its disks are full.

    point ◄─ view (kept.py) ◄─ overlay of the session ◄─ qemu-storage-daemon ◄─ TLS ◄─ the machine

What the machine writes goes into the overlays, which are durable when it is told so: the point never changes, and a
machine that loses its power, or a server that is killed, goes on from there. One machine at a time is served, claim.py.

It reads its order and writes down how it stands; those files, and what others do with them, are in streams.py. It ends
when the machine says that it has let go. Its repository session keeps gc away from what still has to be read.

    python -m appliance.restore.serve HOME NAME [SETTINGS]
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.errors import RestoreError, RewindError
from appliance.process import alone, process_key
from appliance.restore import claim as claims
from appliance.restore import outliving, streams
from appliance.restore.control import CONTROL, Pace, Record, read_record, sign_of_life
from appliance.restore.kept import KeptView
from appliance.restore.storagedaemon import Place, StorageDaemon

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer
    from appliance.store import RepositorySpec

__all__ = ["Serving"]

_TICK = 0.5
# Since a machine was last heard of, once it has let go: it has to hear an answer to its last word. One that was started
# anew after that is there for a machine which still has to boot and to ask, and waits for it for minutes. Not for ever,
# whatever is heard: a wrong machine that boots again and again would keep all of it, and gc away.
_GRACE, _GRACE_AGAIN, _GRACE_AT_MOST = 10.0, 300.0, 1800.0
# A step that comes later than this after the one before: we stood still, and nobody could be heard.
_STOOD_STILL = 3.0
_PHASES = {
    "": "waiting", "refused": "waiting", "booting": "booting", "filling": "pulling", "copying": "copying",
    "alone": "done", "detached": "done",
}  # fmt: skip

_log = logging.getLogger(__name__)


class Serving:
    """One session. `run` is its only thread besides the one that pings the view."""

    def __init__(self, home: Home, name: str, settings: Settings) -> None:
        order = streams.load(home, name)
        if order is None:
            raise RestoreError(reason=f"nothing is known of a session called {name!r}")
        self._home, self._order, self._settings = home, order, settings
        self._folder = streams.folder(home, name)
        self._socket = streams.socket_path(home, order.uuid)
        self._view = KeptView(name, self._make_view, self._socket, settings.view_timeout)
        place = Place(order.host, order.port, order.tls)
        log = streams.daemon_log(home, name)
        self._daemon = StorageDaemon(name, place, order.exports, self._folder, self._socket, log)
        self._claims = claims.Claims(self._folder / claims.CLAIM, time.monotonic)
        self._pace = Pace()
        self._life, self._heard = b"", 0.0
        self._listened = time.monotonic()
        self._written: dict[str, Any] = {}
        self._grace = _GRACE
        self._last: tuple[object, ...] = ()  # what was last seen of any machine
        self._last_time = 0.0
        self._failed = ""
        self._over = 0.0  # since when the machine has let go, 0 while it has not

    def run(self) -> None:
        """Until the machine has let go. Returns at once if somebody else does it."""
        with alone(self._folder / streams.LOCK) as first:
            if not first:
                return
            self._begin()
            spec = self._spec()
            if spec.key_fd is not None:
                spec = replace(spec, key_fd=os.dup(spec.key_fd))  # it is closed when it has been read
            try:
                with spec.open() as repo, repo.session(f"{self._order.target} boots from {self._order.point}"):
                    while not self._step():
                        time.sleep(_TICK)
            except RewindError as error:
                self._fail(error)
                raise
            finally:  # also when the folder is gone: nobody else knows of this view then
                self._daemon.stop()
                self._view.stop()

    def _fail(self, error: RewindError) -> None:
        """Say why we end: whoever began us waits for it."""
        self._failed = str(error)
        with suppress(OSError):  # the folder may be gone
            self._note(read_record(self._folder / CONTROL))

    def _begin(self) -> None:
        """Go on from what the process before knew, and say who we are: a repository and a view take their time to
        open, and nobody may take us for dead meanwhile. What that one failed of is the reason until it is known better:
        one that cannot open its repository is started again and again."""
        before = streams.state(self._home, self._order.name)
        self._failed = str(before.get("error", ""))
        self._view.inherit(int(before.get("slot", 0)), int(before.get("served", 0)))
        self._life, self._heard = sign_of_life(self._folder / CONTROL), float(before.get("heard", 0.0))
        record = read_record(self._folder / CONTROL)
        self._note(record)
        if record.state == "detached":
            self._grace = _GRACE_AGAIN

    def _step(self) -> bool:
        """Whether all is done. The repository is open."""
        self._failed = ""
        self._view.tend("point")
        self._listen()
        if self._view.key:
            self._daemon.tend(self._claims.answer.granted)
        record = read_record(self._folder / CONTROL)
        self._note(record)
        return self._has_ended(record, time.monotonic())

    def _has_ended(self, record: Record, now: float) -> bool:
        last = (record.state, self._life, self._claims.asked, self._claims.answer)
        if last != self._last:
            self._last, self._last_time = last, now
        if record.state != "detached":
            self._over = 0.0
            return False
        self._over = self._over or now
        return now - self._last_time > self._grace or now - self._over > _GRACE_AT_MOST

    def _listen(self) -> None:
        """For a sign of life first: who is granted depends on it. While we answer nobody none can come; after we stood
        still (a control group that was frozen, a disk that hung) none has had the time to."""
        if (life := sign_of_life(self._folder / CONTROL)) != self._life:
            self._life, self._heard = life, time.time()
            self._claims.heard()
        now = time.monotonic()
        if not self._answers or now - self._listened > _STOOD_STILL:
            self._claims.deaf()
        self._listened = now
        before = self._claims.answer
        try:
            self._claims.tend()
        except OSError as error:
            _log.warning("%s: cannot answer who has asked: %s", self._order.name, error)
        if (answer := self._claims.answer) != before:
            _log.info("%s: serves %s, refused: %s", self._order.name, answer.machine, answer.refused or "nobody")

    @property
    def _answers(self) -> bool:
        return self._daemon.answers and bool(self._view.key)

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
            "served": self._view.served, "ready": self._daemon.ready, "answers": self._answers,
            "phase": _PHASES[record.state],
            "done": record.done, "total": record.total or sum(ref.size for ref in self._order.exports.values()),
            "rate": self._pace.of(record, time.monotonic()), "read": record.read, "written": record.written,
            "boots": record.boots, "service": record.service, "heard": self._heard,
            "error": self._failed or self._view.error or self._daemon.error or record.error or self._sent_away(record),
        }  # fmt: skip
        if now == self._written:
            return
        try:
            outliving.write_state(self._folder, now)
            self._written = now
        except OSError as error:  # a full disk must not take the machine's root with it
            _log.warning("cannot write down how %s stands: %s", self._order.name, error)

    def _sent_away(self, record: Record) -> str:
        refused = "" if record.alone else self._claims.answer.refused
        return f"boot {refused} was refused: {self._claims.answer.why}" if refused else ""


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
