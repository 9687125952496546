"""How a child process of ours opens the repository: a few words that fit into an argument, no secret among them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.store.repository import Repository

__all__ = ["RepositorySpec"]


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """`key_file` is read by the child; or `key_fd`, a descriptor it inherits, has a key file's text (a key that was
    locked by a passphrase). Neither: the repository is not encrypted.
    """

    url: str
    cache: Path
    key_file: Path | None = None
    key_fd: int | None = None

    def to_json(self) -> str:
        return json.dumps(
            {
                "url": self.url,
                "cache": str(self.cache),
                "key_file": None if self.key_file is None else str(self.key_file),
                "key_fd": self.key_fd,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RepositorySpec:
        """Raises ValueError, KeyError for what `to_json` did not make."""
        values = json.loads(text)
        key_file = values["key_file"]
        return cls(values["url"], Path(values["cache"]), None if key_file is None else Path(key_file), values["key_fd"])

    def open(self) -> Repository:
        """Raises what `Repository.open` and `Key` raise. `key_fd` is read to its end and closed."""
        from appliance.store.backend import open_backend
        from appliance.store.key import Key
        from appliance.store.repository import Repository

        key = Key.load(self.key_file) if self.key_file else None
        if self.key_fd is not None:
            key = Key.from_fd(self.key_fd)
        return Repository.open(open_backend(self.url), cache=self.cache, key=key)
