"""Processes that outlive the verb that began them. Each has a name and a folder of its own in the home:

    HOME/KIND/NAME/order.json     what it has to do, written before it starts
    HOME/KIND/NAME/state.json     how it stands, replaced whenever that changes; `key` is its process

KIND is `images` (hydrations.py and hydrate.py) or `streams` (streams.py and serve.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from appliance.config import Home, write_json
from appliance.errors import ConfigError, RestoreError
from appliance.process import Child, lives, process_key

__all__ = ["Kind", "write_state"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,62}")


class Order(Protocol):
    """What such a process has to do. `repository` is a RepositorySpec as JSON, whose key may come through a descriptor
    that is handed on; `point` is what it reads from."""

    @property
    def point(self) -> str: ...
    @property
    def repository(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


_Order = TypeVar("_Order", bound=Order)


class Kind(Generic[_Order]):
    """All processes of one kind. `name` is their folder in the home, `module` what `python -m` runs, `read` makes an
    order of its JSON. Holds nothing, so any thread may use it. Whatever takes a name raises ConfigError for one that
    could lead anywhere else: the folder is removed when what it stands for is forgotten."""

    def __init__(self, name: str, module: str, read: Callable[[dict[str, Any]], _Order]) -> None:
        self._name, self._module, self._read = name, module, read

    def folder(self, home: Home, name: str) -> Path:
        """Its folder, made or not."""
        if _NAME.fullmatch(name) is None:
            reason = f"nothing can be called {name!r} here"
            raise ConfigError(reason=reason, hint="letters, digits, and . _ + - behind the first one")
        return home.path / self._name / name

    def names(self, home: Home) -> list[str]:
        """Of all that have an order and are not tidied away, sorted."""
        return sorted(path.parent.name for path in (home.path / self._name).glob("*/order.json"))

    def unfinished(self, home: Home) -> list[str]:
        """Of those that do not say that they are done; somebody has to do it, also after this host was restarted."""
        return [name for name in self.names(home) if self.state(home, name).get("phase") != "done"]

    def needed(self, home: Home) -> dict[str, str]:
        """Points that are still read from → one such name."""
        orders = {name: self.load(home, name) for name in self.unfinished(home)}
        return {order.point: name for name, order in orders.items() if order is not None}

    def load(self, home: Home, name: str) -> _Order | None:
        """What it has to do; None when there is none of that name."""
        try:
            found: dict[str, Any] = json.loads((self.folder(home, name) / "order.json").read_text())
        except FileNotFoundError:
            return None
        return self._read(found)

    def state(self, home: Home, name: str) -> dict[str, Any]:
        """How it stands; empty when that is not known."""
        try:
            found: dict[str, Any] = json.loads((self.folder(home, name) / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def start(self, home: Home, name: str, order: _Order, settings_file: Path) -> str:
        """Write the order down and start `python -m MODULE HOME NAME SETTINGS`, unless its process lives. The key of
        that process. The folder has to be there: it is not made again for one that was forgotten."""
        where = self.folder(home, name)
        write_json(where / "order.json", order.to_json())
        if lives(before := str(self.state(home, name).get("key", ""))):
            return before
        key_fd = json.loads(order.repository).get("key_fd")
        places = [str(Path(__file__).resolve().parents[2]), *(place for place in sys.path if place)]
        child = Child(
            [sys.executable, "-m", self._module, home.path, name, settings_file],
            name=self._short,
            log=self._log(home),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))},
            pass_fds=() if key_fd is None else (key_fd,),
            die_with_parent=False,
        )
        key = process_key(child.pid)
        child.leave()
        return key

    def await_state(
        self, home: Home, name: str, key: str, ready: Callable[[dict[str, Any]], bool], seconds: float, what: str
    ) -> None:
        """Until the process `key` says so itself. Raises RestoreError with its own reason: when it has ended, or after
        that time, and it goes on trying then."""
        deadline = time.monotonic() + seconds
        while True:
            lived = lives(key)  # before its state, which then has its last words
            found = self.state(home, name)
            if ready(found):
                return
            if not lived and not lives(found.get("key", "")):  # another one may have come first
                why, hint = "its process has ended", f"`tail {self._log(home)}` shows its last words"
                raise RestoreError(reason=f"{what} of {name!r} does not start: {found.get('error') or why}", hint=hint)
            if time.monotonic() > deadline:
                raise RestoreError(reason=f"{what} of {name!r} does not start: {found.get('error') or 'no answer'}")
            time.sleep(0.05)

    def half_forgotten(self, home: Home, name: str) -> bool:
        """Whether there is what `drop` has left that was broken off, or a beginning that did not get to its order."""
        return self.load(home, name) is None and self.folder(home, name).exists()

    def drop(self, home: Home, name: str) -> None:
        """Forget it: the order first, by which it exists. Raises OSError where anything stays: keys may be in there,
        and no other one can have the name. May be repeated."""
        where = self.folder(home, name)
        (where / "order.json").unlink(missing_ok=True)
        shutil.rmtree(where, ignore_errors=True)
        if where.exists():  # as much of it as can be is gone, now for the reason
            shutil.rmtree(where)

    @property
    def _short(self) -> str:
        return self._module.rpartition(".")[2]

    def _log(self, home: Home) -> Path:
        return home.log / f"{self._short}.log"


def write_state(where: Path, now: dict[str, Any]) -> None:
    """Replace the state in that folder. Raises OSError; the old one stays then."""
    temporary = where / ".state.json"
    temporary.write_text(json.dumps(now))
    temporary.replace(where / "state.json")
