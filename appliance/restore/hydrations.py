"""Domains that run from a view while their disks fill, for everybody: each has an order and a process that fills them.

    launch ─► the process (hydrate.py) ─► state: how it stands
       tidy: ended and forgotten, whatever of these there is

    HOME/images/NAME/order.json     what it has to do, written once
    HOME/images/NAME/state.json     {"key": its process, "view": process of the view, "slot", "served", "phase":
                                     "pulling" | "off" | "done", "done", "total" bytes, "left": targets, "error"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import DEFAULT_SETTINGS, Home
from appliance.model import MapRef
from appliance.process import lives
from appliance.restore import outliving
from appliance.restore.kept import kill, views_of

__all__ = [
    "Order", "folder", "half_forgotten", "launch", "load", "names", "needed", "socket_path", "state", "tidy",
    "unfinished",
]  # fmt: skip

_START = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """`exports` are the disks of the point by their own targets, `disks` the targets of the new domain with the export
    that each begins as. `owner` is QEMU's user and group, None for our own. `rate` in bytes a second, 0 for no limit.
    `image` is the folder of the bootable image, `point` what it is of. `settles` names the report that the guest writes
    once its disk starts by itself, empty if it does not."""

    domain: str
    uuid: str
    uri: str
    point: str
    repository: str
    exports: Mapping[str, MapRef]
    disks: Mapping[str, str]
    owner: tuple[int, int] | None
    rate: int
    image: str
    settles: str = ""

    def to_json(self) -> dict[str, Any]:
        exports = {name: [ref.root.hex(), ref.size, ref.place] for name, ref in self.exports.items()}
        return {
            "domain": self.domain, "uuid": self.uuid, "uri": self.uri, "point": self.point,
            "repository": self.repository, "exports": exports, "disks": dict(self.disks), "owner": self.owner,
            "rate": self.rate, "image": self.image, "settles": self.settles,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Order:
        exports = {name: MapRef(bytes.fromhex(one[0]), one[1], one[2]) for name, one in value["exports"].items()}
        owner = value["owner"]
        return cls(**{**value, "exports": exports, "owner": None if owner is None else (owner[0], owner[1])})


# All domains that were brought up from a home: their orders and how they stand.
_KIND = outliving.Kind("images", "appliance.restore.hydrate", Order.from_json)
folder, names, load, state = _KIND.folder, _KIND.names, _KIND.load, _KIND.state
half_forgotten = _KIND.half_forgotten
unfinished, needed = _KIND.unfinished, _KIND.needed


def socket_path(home: Home, uuid: str) -> Path:
    """Where QEMU finds the view."""
    return home.run(uuid) / "image.sock"


def launch(home: Home, order: Order, settings_file: Path = DEFAULT_SETTINGS) -> None:
    """Write the order down and start the process; its view can be read when this returns. May be repeated. Raises
    RestoreError with the reason when there is no view in time, and the process goes on trying then; or when it has
    ended before."""
    key = _KIND.start(home, order.domain, order, settings_file)
    _KIND.await_state(home, order.domain, key, _is_ready, _START, "the view")


def _is_ready(found: Mapping[str, Any]) -> bool:
    """Of a state. One whose disks were complete already needs no view."""
    return found.get("phase") == "done" or lives(found.get("view", ""))


def tidy(home: Home, name: str) -> None:
    """Forget a hydration that is over, or end one whose domain is gone."""
    order = load(home, name)
    kill(state(home, name).get("key", ""))
    for view in views_of(socket_path(home, order.uuid)) if order is not None else ():
        kill(view)
    _KIND.drop(home, name)
