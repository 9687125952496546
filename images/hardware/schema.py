"""An Inventory as text, JSON or YAML, and back. What comes from outside is checked here and nowhere else.

    load    text → Inventory, or BadInventory that names the field (`devices[3].modalias`)
    dump    Inventory → JSON that `load` reads again, equal
    check   a document that was parsed already (the other ways to an inventory end here)

JSON is a subset of YAML for all that we write, but it is read by its own parser: that one is fast and has no anchors.
In YAML anchors are refused, because a few lines of them grow to gigabytes. Any thread may call everything here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from appliance.errors import BadInventory
from images.model import Inventory

__all__ = ["MOST_ALIAS", "MOST_DEVICES", "MOST_TEXT", "check", "dump", "fit_name", "load", "no_larger"]

# A big server has some 600 devices with an alias, and its script's output is 100 KiB.
MOST_TEXT = 4 << 20
# Read by a slow parser, and written by people.
_MOST_YAML = 256 << 10
MOST_DEVICES = 8192
# The alias of a CPU names each of its features: about 1 KiB.
MOST_ALIAS = 4096
_MOST_NESTED = 20
_PATTERN = "string_pattern_mismatch"
# What the patterns of the model say, for people.
_WORDS = {
    "name": "lower-case letters, digits, `-` and `_`, at most 63, a letter or digit first",
    "modalias": "a modalias as the kernel writes it, like pci:v00008086d000010D3…",
    "mac": "six pairs of lower-case hexadecimal digits with colons between",
}


def load(text: str, *, target: str = "") -> Inventory:
    """The inventory that JSON or YAML text describes. `target`, when given, is its name instead of what the text says,
    and what errors speak of.

    Raises BadInventory: not JSON or YAML, larger than 4 MiB (YAML: 256 KiB), more than 8192 devices, an unknown key, a
    wrong value.
    """
    spoken = target or "(text)"
    no_larger(text, spoken)
    document = _json(text, spoken) if text.lstrip()[:1] in ("{", "[") else _yaml(text, spoken)
    return check(document, target=target)


def check(document: object, *, target: str = "") -> Inventory:
    """The inventory of a parsed document. Raises BadInventory."""
    if not isinstance(document, Mapping):
        raise BadInventory(target=target or "(text)", field="document", reason="it is not a mapping of fields")
    fields: dict[str, Any] = dict(document)
    if target:
        fields["name"] = target
    spoken = str(fields.get("name", "(no name)"))[:80]
    _limits(fields, spoken)
    try:
        # By way of JSON: only then are `firmware: uefi` and lists for tuples accepted, and nothing else converted.
        return Inventory.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        named = first["type"] == _PATTERN and first["loc"] == ("name",)
        hint = f"{fit_name(spoken, 'rack')!r} can be a name" if named else ""
        raise BadInventory(target=spoken, field=_place(first["loc"]), reason=_reason(first), hint=hint) from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"it has a value that JSON does not know: {error}"
        raise BadInventory(target=spoken, field="document", reason=reason) from None


def dump(inventory: Inventory) -> str:
    """JSON text with a newline at its end, the same for equal inventories. Fields that have their default are left
    out."""
    return json.dumps(inventory.model_dump(mode="json", exclude_defaults=True), indent=1, ensure_ascii=False) + "\n"


def fit_name(text: str, default: str) -> str:
    """A name that a target may have, as near to the text as can be."""
    return re.sub(r"[^a-z0-9_-]", "-", text.lower()).strip("_-")[:63] or default


def no_larger(text: str, target: str, most: int = MOST_TEXT) -> None:
    """Raises BadInventory when there is more text than anyone needs."""
    if len(text) > most:
        raise BadInventory(target=target, field="document", reason=f"it has {len(text)} characters, {most} are allowed")


def _json(text: str, target: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInventory(target=target, field="document", reason=f"it is not JSON: {error}") from None


def _yaml(text: str, target: str) -> object:
    no_larger(text, target, _MOST_YAML)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MOST_NESTED:
                what = "an alias (*name)" if depth <= _MOST_NESTED else f"more than {_MOST_NESTED} levels"
                raise BadInventory(target=target, field="document", reason=f"its YAML has {what}, which is not allowed")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        words = " ".join(str(error).split())
        raise BadInventory(target=target, field="document", reason=f"it is neither JSON nor YAML: {words}") from None


def _limits(fields: Mapping[str, Any], target: str) -> None:
    for name in ("devices", "nics", "notes"):
        entries = fields.get(name, ())
        if isinstance(entries, list | tuple) and len(entries) > MOST_DEVICES:
            reason = f"it has {len(entries)} entries, {MOST_DEVICES} are allowed"
            raise BadInventory(target=target, field=name, reason=reason)
        for number, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
            alias = entry.get("modalias", "") if isinstance(entry, Mapping) else entry
            if isinstance(alias, str) and len(alias) > MOST_ALIAS:
                reason = f"it has {len(alias)} characters, {MOST_ALIAS} are allowed"
                raise BadInventory(target=target, field=f"{name}[{number}]", reason=reason)


def _place(path: tuple[int | str, ...]) -> str:
    """`devices[3].modalias`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "document"


def _reason(error: Any) -> str:
    kind, value = error["type"], repr(error["input"])[:120]
    if kind == "extra_forbidden":
        return "there is no such field"
    if kind == "missing":
        return "it is missing"
    if kind == _PATTERN:
        return f"it has to be {_WORDS[error['loc'][-1]]}, not {value}"
    words = str(error["msg"])
    return f"{words[:1].lower()}{words[1:]}, not {value}"
