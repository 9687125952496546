"""Kinds of machines that are known beforehand: `profiles/NAME.yaml`, an inventory without name and source each.

A profile does not say which of its disk controllers carries the restored disks: one of those with its `disk_bus` must
have a driver, or one of all of them where it has none. `like: OTHER` takes the fields of another profile first. A new
profile is one new file; the first line of its comment is what lists show. Any thread may call everything here.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any

import yaml

from appliance.errors import BadInventory
from images.hardware.schema import check
from images.model import Inventory

__all__ = ["about", "profile", "profile_names"]

_FOLDER = files("images.hardware") / "profiles"


def profile_names() -> tuple[str, ...]:
    """Of all profiles, sorted."""
    names = (one.name for one in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def about(name: str) -> str:
    """One sentence on the profile, for lists. Raises BadInventory when there is no such profile."""
    return _text(name).partition("\n")[0].lstrip("# ")


def profile(name: str, *, target: str = "") -> Inventory:
    """The inventory of that kind of machine. `target` is its name, by default the profile's; other fields may be
    changed with `model_copy(update=…)`. Raises BadInventory when there is no such profile."""
    return check({**_fields(name), "source": "profile", "name": target or name})


def _fields(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(_text(name))
    like = fields.pop("like", "")
    return {**_fields(like), **fields} if like else fields


def _text(name: str) -> str:
    known = profile_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInventory(
            target=name, field="profile", reason=f"there is no profile {name!r}",
            hint=f"{hint}known: {', '.join(known)}",
        )  # fmt: skip
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
