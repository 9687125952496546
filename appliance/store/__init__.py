"""The repository: chunks, maps, points and locks in a folder or a bucket.

    from appliance.store import Key, Repository, RepositorySpec, open_backend

Names are loaded when they are first used: the command line starts without the libraries that only some verbs need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appliance.store.backend import Backend, open_backend
    from appliance.store.key import Key
    from appliance.store.map import Map
    from appliance.store.repository import Repository
    from appliance.store.spec import RepositorySpec
    from appliance.store.writer import ChunkWriter, WriterStats

__all__ = [
    "Backend",
    "ChunkWriter",
    "Key",
    "Map",
    "Repository",
    "RepositorySpec",
    "WriterStats",
    "open_backend",
]

_HOMES = {
    "Backend": "backend",
    "ChunkWriter": "writer",
    "Key": "key",
    "Map": "map",
    "Repository": "repository",
    "RepositorySpec": "spec",
    "WriterStats": "writer",
    "open_backend": "backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
