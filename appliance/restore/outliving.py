"""Processes that outlive the verb that began them. Each has a name and a folder of its own in the home:

    HOME/KIND/NAME/order.json     what it has to do, written before it starts
    HOME/KIND/NAME/state.json     how it stands, replaced whenever that changes; `key` is its process

KIND is `images` (hydrate.py) or `streams` (serve.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.config import Home, write_json
from appliance.errors import ConfigError, RestoreError
from appliance.process import Child, lives

__all__ = ["await_state", "folder", "names", "order", "start", "state", "unfinished", "write_state"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,62}")


def folder(home: Home, kind: str, name: str) -> Path:
    """Its folder, made or not. Raises ConfigError for a name that could lead anywhere else: the folder is removed when
    what it stands for is forgotten."""
    if _NAME.fullmatch(name) is None:
        reason = f"nothing can be called {name!r} here"
        raise ConfigError(reason=reason, hint="letters, digits, and . _ + - behind the first one")
    return home.path / kind / name


def names(home: Home, kind: str) -> list[str]:
    """Of all that have an order, sorted."""
    return sorted(path.parent.name for path in (home.path / kind).glob("*/order.json"))


def unfinished(home: Home, kind: str) -> list[str]:
    """Of those that do not say that they are done; somebody has to do it, also after this host was restarted."""
    return [name for name in names(home, kind) if state(home, kind, name).get("phase") != "done"]


def order(home: Home, kind: str, name: str) -> dict[str, Any] | None:
    """What it has to do; None when there is none of that name. Raises ConfigError as `folder`."""
    try:
        found: dict[str, Any] = json.loads((folder(home, kind, name) / "order.json").read_text())
    except FileNotFoundError:
        return None
    return found


def state(home: Home, kind: str, name: str) -> dict[str, Any]:
    """How it stands; empty when that is not known. Raises ConfigError as `folder`."""
    try:
        found: dict[str, Any] = json.loads((folder(home, kind, name) / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def write_state(where: Path, now: dict[str, Any]) -> None:
    """Replace the state in that folder. Raises OSError; the old one stays then."""
    temporary = where / ".state.json"
    temporary.write_text(json.dumps(now))
    temporary.replace(where / "state.json")


def start(home: Home, kind: str, name: str, wanted: dict[str, Any], module: str, settings_file: Path) -> None:
    """Write the order down and start `python -m MODULE HOME NAME SETTINGS`, unless its process lives. `wanted` has a
    `repository` (RepositorySpec as JSON), whose key may come through a descriptor that is handed on."""
    where = folder(home, kind, name)
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / "order.json", wanted)
    if lives(state(home, kind, name).get("key", "")):
        return
    key_fd = json.loads(wanted["repository"]).get("key_fd")
    places = [str(Path(__file__).resolve().parents[2]), *(place for place in sys.path if place)]
    short = module.rpartition(".")[2]
    Child(
        [sys.executable, "-m", module, home.path, name, settings_file],
        name=short,
        log=home.log / f"{short}.log",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))},
        pass_fds=() if key_fd is None else (key_fd,),
        die_with_parent=False,
    ).leave()


def await_state(
    home: Home, kind: str, name: str, ready: Callable[[dict[str, Any]], bool], seconds: float, what: str
) -> None:
    """Until it says so itself. Raises RestoreError with its own reason after that time; it goes on trying then."""
    deadline = time.monotonic() + seconds
    while not ready(found := state(home, kind, name)):
        if time.monotonic() > deadline:
            raise RestoreError(reason=f"{what} of {name!r} does not start: {found.get('error') or 'no answer'}")
        time.sleep(0.05)
