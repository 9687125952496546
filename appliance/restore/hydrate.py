"""The process of a domain that runs from a view while its local disks fill: started at once, alone in the end.

Its images are overlays whose backing file is the view. What the guest reads comes from there at first touch, what it
writes stays local, and libvirt's own block-pull moves the rest. A small process beside it outlives whoever began it:

    view      kept at one path (kept.py): a read waits while it is brought back, and does not fail
    pull      of each disk that still has the view below it; again when one has failed or QEMU was started anew
    end       when no disk needs the view any more

It reads its order and writes down how it stands; those files, and what others do with them, are in hydrations.py. Its
repository session keeps gc away from what the view still has to read, whatever is forgotten meanwhile.

    python -m appliance.restore.hydrate HOME NAME [SETTINGS]
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.config import DEFAULT_SETTINGS, Home, Settings, load_settings
from appliance.errors import HypervisorError, RestoreError, RewindError
from appliance.hypervisor import connect
from appliance.hypervisor.base import Changes, Domain, DomainState, Hypervisor, Pulls
from appliance.hypervisor.graph.nodes import all_nodes
from appliance.process import alone, lives, process_key
from appliance.restore import hydrations, outliving
from appliance.restore.kept import KeptView
from appliance.restore.newhardware import without_stops
from appliance.restore.standstill import Standstill

if TYPE_CHECKING:
    from appliance.restore.export import ViewServer
    from appliance.store import Repository, RepositorySpec

__all__ = ["Hydration"]

_TICK = 0.5
_AGAIN = 5.0
# Less than this free is too little for a disk to be filled.
_ROOM = 4 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Seen:
    """`left`: targets that still need the view; bytes of their jobs; why it does not go on, or empty."""

    phase: str
    left: tuple[str, ...]
    done: int
    total: int
    error: str


class Hydration:
    """One domain's. `run` is its main thread and keeps the view alive; a second one talks to the hypervisor, which may
    take its time; a third pings the view."""

    def __init__(self, home: Home, name: str, settings: Settings) -> None:
        order = hydrations.load(home, name)
        if order is None:
            raise RestoreError(reason=f"nothing is known of an image called {name!r}")
        self._home, self._order, self._settings = home, order, settings
        self._folder = hydrations.folder(home, name)
        self._view = KeptView(name, self._make_view, hydrations.socket_path(home, order.uuid), settings.view_timeout)
        self._hypervisor: Hypervisor | None = None
        self._standstill = Standstill(home.path)
        self._next_pull: dict[str, float] = {}
        self._refused: dict[str, str] = {}  # target → why libvirt does not begin its pull
        self._seen = _Seen("off", tuple(order.disks), 0, 0, "")  # written by the second thread, read by the main one
        self._written: dict[str, Any] = {}

    def run(self) -> None:
        """Until every disk is alone. Returns at once if somebody else does it."""
        with alone(self._folder / "hydrate.lock") as first:
            if not first:
                return
            before = hydrations.state(self._home, self._order.domain)
            self._view.inherit(int(before.get("slot", 0)), int(before.get("served", 0)))
            self._note()
            threading.Thread(target=self._work, name="pull", daemon=True).start()
            while self._seen.phase != "done":
                self._view.tend("point")
                self._note()
                time.sleep(_TICK)
            self._view.stop()
            self._note()

    def _work(self) -> None:
        """Pull, in a session that keeps gc away."""
        while self._seen.phase != "done":
            try:
                with self._repository() as repo, repo.session(f"{self._order.domain} runs from {self._order.point}"):
                    while (seen := self._step()).phase != "done":
                        self._seen = seen
                        time.sleep(_TICK)
                self._seen = seen
            except (RewindError, OSError) as error:  # the repository is away: the view may have what it needs
                self._seen = replace(self._seen, error=str(error))
                _log.warning("%s: %s", self._order.domain, error)
                time.sleep(_AGAIN)

    def _step(self) -> _Seen:
        """How it stands, after a pull was begun where none was under way."""
        try:
            self._hypervisor = self._hypervisor or connect(self._order.uri)
            domain = self._hypervisor.domain(self._order.uuid)
            assert isinstance(domain, Pulls), "an order is made for a libvirt domain"
            left = tuple(target for target in self._order.disks if domain.backed(target))
            if not left and self._opened(domain):
                return replace(self._seen, phase="pulling", left=())
            if not left:
                return self._alone(domain)
            if domain.state() is DomainState.SHUTOFF:
                return _Seen("off", left, 0, 0, "")
            answers = lives(self._view.key) and not self._view.error
            stands = self._standstill.end(domain) if answers else ""
            jobs = [self._pull(domain, target) for target in left]
            full = "" if all(one[1] for one in jobs) else _full(Path(self._order.image))
        except HypervisorError as error:
            return replace(self._seen, phase="off", error=str(error))
        # Each reason once: several disks may have the same.
        why = "; ".join(dict.fromkeys(one for one in (stands, *(job[2] for job in jobs), full) if one))
        return _Seen("pulling", left, sum(one[0] for one in jobs), sum(one[1] for one in jobs), why)

    def _alone(self, domain: Domain) -> _Seen:
        """It needs the view no more: a guest that stood still for it goes on first, and after its next start it is told
        of errors of its disks like any other."""
        stands = "" if domain.state() is DomainState.SHUTOFF else self._standstill.end(domain)
        if self._standstill.trying:
            return replace(self._seen, phase="pulling", left=(), error=stands)
        if isinstance(domain, Changes):
            try:
                domain.change(lambda xml: without_stops(xml, self._order.domain, self._order.disks))
            except HypervisorError as error:
                _log.warning("%s is still stopped when a disk fails: %s", self._order.domain, error)
        size = sum(ref.size for ref in self._order.exports.values())
        return _Seen("done", (), size, size, stands)

    def _opened(self, domain: Domain) -> bool:
        """Whether QEMU still has the view open. libvirt calls a disk alone before it has QEMU close what was below: a
        view that went away in between would have QEMU wait for it, for minutes, with all that it is asked meanwhile."""
        if domain.state() is DomainState.SHUTOFF:
            return False
        place = str(hydrations.socket_path(self._home, self._order.uuid))
        return any(str(node.get("file", "")).partition("socket=")[2] == place for node in all_nodes(domain.monitor()))

    def _pull(self, domain: Pulls, target: str) -> tuple[int, int, str]:
        """(done, total) bytes of its job, which is started when there is none, and why it could not be."""
        if (job := domain.pulling(target)) is not None:
            return *job, ""
        if time.monotonic() < self._next_pull.get(target, 0.0):
            return 0, 0, self._refused.get(target, "")
        self._next_pull[target] = time.monotonic() + _AGAIN
        try:
            domain.pull(target, self._order.rate)
        except HypervisorError as error:
            _log.warning("%s: %s cannot be pulled now: %s", self._order.domain, target, error)
            self._refused[target] = str(error)
            return 0, 0, str(error)
        self._refused.pop(target, None)
        return 0, 0, ""

    def _repository(self) -> Repository:
        spec = self._spec()
        if spec.key_fd is not None:
            spec = replace(spec, key_fd=os.dup(spec.key_fd))  # it is closed when it has been read
        return spec.open()

    def _spec(self) -> RepositorySpec:
        from appliance.store import RepositorySpec

        spec = RepositorySpec.from_json(self._order.repository)
        if spec.key_fd is not None:
            os.lseek(spec.key_fd, 0, os.SEEK_SET)  # whoever read it before has read it to its end
        return spec

    def _make_view(self, socket: Path) -> ViewServer:
        from appliance.restore.export import ViewServer

        run = self._home.run(self._order.uuid)
        run.mkdir(parents=True, exist_ok=True)
        run.chmod(0o711)
        return ViewServer(
            run, self._spec(), self._order.exports, socket=socket, owner=self._order.owner,
            cache=self._settings.view_cache, log=self._home.log / "view.log", die_with_parent=False,
        )  # fmt: skip

    def _note(self) -> None:
        seen = self._seen
        now = {
            "key": process_key(os.getpid()), "view": self._view.key, "slot": self._view.slot,
            "served": self._view.served, "phase": seen.phase, "left": seen.left, "done": seen.done,
            "total": seen.total, "error": self._view.error or seen.error,
        }  # fmt: skip
        if now == self._written:
            return
        try:
            outliving.write_state(self._folder, now)
            self._written = now
        except OSError as error:  # a full disk must not take the view with it
            _log.warning("cannot write down how %s stands: %s", self._order.domain, error)


def _full(folder: Path) -> str:
    """Why a pull has ended early, where that can be seen: QEMU keeps no word of an ended job."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return ""  # libvirt tells what is wrong with it
    return f"{folder}: no space is left on its file system" if status.f_bavail * status.f_frsize < _ROOM else ""


def main(argv: list[str]) -> int:
    """The command of the process; its log is its standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s hydrate %(levelname)s %(message)s")
    home = Home(Path(argv[1]))
    settings = load_settings(home, Path(argv[3]) if len(argv) > 3 else DEFAULT_SETTINGS)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        Hydration(home, argv[2], settings).run()
    except RewindError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
