"""Small libraries that belong to a repository and to no domain, as files in parts (parted.py).

blobs/KIND/NAME        KIND is `templates`, `targets`, `drivers`, `evidence`; needed by no point, gc deletes none
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError
from appliance.store import parted
from appliance.store.backend.base import Backend
from appliance.store.codec import Codec

__all__ = ["PREFIX", "BlobRef", "listing", "put"]

PREFIX: Final = "blobs/"
# No dot: a name's part number stands behind one.
_NAME: Final = re.compile(r"blobs/([a-z]+)/([a-z0-9_-]{1,100})(?:\.([1-9]\d*))?")


@dataclass(frozen=True, slots=True, order=True)
class BlobRef:
    """`stored` are the bytes of its objects, `modified` is when it was put, by the clock of the place."""

    kind: str
    name: str
    stored: int = field(default=0, compare=False)
    modified: datetime = field(default=datetime.min.replace(tzinfo=UTC), compare=False)

    @property
    def object(self) -> str:
        return f"{PREFIX}{self.kind}/{self.name}"


def put(backend: Backend, codec: Codec, kind: str, name: str, path: Path) -> None:
    """As `parted.put`; also raises ConfigError for a name that is none."""
    ref = BlobRef(kind, name)
    if _NAME.fullmatch(ref.object) is None:
        raise ConfigError(reason=f"name {name!r} has more than a-z 0-9 - _, or more than 100 letters")
    parted.put(backend, codec, ref.object, path)


def listing(backend: Backend, kind: str = "") -> list[BlobRef]:
    """Those that are whole, by kind and name. One listing, nothing is opened."""
    found: dict[str, BlobRef] = {}
    sizes: dict[str, int] = {}
    for info in backend.list(PREFIX + (f"{kind}/" if kind else "")):
        if (match := _NAME.fullmatch(info.name)) is None:
            continue
        name = f"{PREFIX}{match[1]}/{match[2]}"
        sizes[name] = sizes.get(name, 0) + info.size
        if not match[3]:
            found[name] = BlobRef(match[1], match[2], 0, datetime.fromtimestamp(info.modified, UTC))
    return sorted(BlobRef(one.kind, one.name, sizes[name], one.modified) for name, one in found.items())
