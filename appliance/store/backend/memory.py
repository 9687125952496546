"""Objects in this process's memory: `memory://NAME` is the same place for every opener of that name.

For tests and for trying things; durable in no sense.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from appliance.errors import AlreadyExists, ObjectNotFound
from appliance.store.backend.base import Buffer, Capabilities, ObjectInfo, check_name, check_prefix

__all__ = ["MemoryBackend"]


@dataclass(slots=True)
class _Place:
    """`lock` guards `objects`; its values are never changed."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)


_places: dict[str, _Place] = {}
_places_lock = threading.Lock()


class MemoryBackend:
    """Objects live as long as the process, also after `close`. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._url = f"memory://{name}"
        with _places_lock:
            self._place = _places.setdefault(name, _Place())

    @property
    def url(self) -> str:
        return self._url

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self._find(name)[0]
        return data[offset : None if length is None else offset + length]

    def put(self, name: str, data: Buffer) -> None:
        check_name(name)
        kept = bytes(data)
        with self._place.lock:
            if name in self._place.objects:
                raise AlreadyExists(url=self.url, name=name)
            self._place.objects[name] = (kept, time.time())

    def delete(self, name: str) -> None:
        check_name(name)
        with self._place.lock:
            self._place.objects.pop(name, None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._place.lock:
            found = [(name, *kept) for name, kept in self._place.objects.items() if name.startswith(prefix)]
        return iter([ObjectInfo(name, len(data), modified) for name, data, modified in sorted(found)])

    def stat(self, name: str) -> ObjectInfo:
        data, modified = self._find(name)
        return ObjectInfo(name, len(data), modified)

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def close(self) -> None:
        pass

    def _find(self, name: str) -> tuple[bytes, float]:
        check_name(name)
        with self._place.lock:
            try:
                return self._place.objects[name]
            except KeyError:
                raise ObjectNotFound(url=self.url, name=name) from None
