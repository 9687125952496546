"""The object `config`: by which a repository is one, of which version, and which key is its own."""

from __future__ import annotations

import json
import secrets
from typing import Any, Final

from appliance.errors import IntegrityError, ObjectNotFound, RepositoryNotFound, VersionUnsupported, WrongKey
from appliance.store.backend.base import Backend
from appliance.store.codec import Codec
from appliance.store.key import Key
from appliance.units import CHUNK

__all__ = ["CONFIG", "VERSION", "create", "read"]

VERSION: Final = 1
CONFIG: Final = "config"


def create(backend: Backend, key: Key | None) -> tuple[dict[str, Any], Codec]:
    """Make it, with an id of its own. Raises AlreadyExists, and what the backend raises."""
    identity = secrets.token_bytes(16)
    codec = _codec(identity, key)
    config = {
        "rewind_repository": VERSION,
        "id": identity.hex(),
        "chunk": CHUNK,
        "encrypted": key is not None,
        "key_check": codec.key_check().hex(),
    }
    backend.put(CONFIG, json.dumps(config, indent=1).encode() + b"\n")
    return config, codec


def read(backend: Backend, key: Key | None) -> tuple[dict[str, Any], Codec]:
    """Raises RepositoryNotFound, WrongKey, VersionUnsupported, IntegrityError, and what the backend raises."""
    config = _load(backend)
    if config["encrypted"] and key is None:
        raise WrongKey(url=backend.url, reason="the repository is encrypted and no key was given")
    codec = _codec(bytes.fromhex(config["id"]), key if config["encrypted"] else None)
    if codec.key_check().hex() != config["key_check"]:
        raise WrongKey(url=backend.url, reason="the key is not this repository's")
    return config, codec


def _codec(identity: bytes, key: Key | None) -> Codec:
    return Codec((key.secret if key is not None else b"not encrypted") + identity, encrypted=key is not None)


def _load(backend: Backend) -> dict[str, Any]:
    try:
        config = json.loads(backend.get(CONFIG))
        version = config["rewind_repository"]
        if version != VERSION:
            raise VersionUnsupported(object=f"repository {backend.url}", version=version, supported=VERSION)
        bytes.fromhex(config["id"] + config["key_check"])
        if config["chunk"] != CHUNK or not isinstance(config["encrypted"], bool):
            raise ValueError("values out of range")
    except ObjectNotFound:
        raise RepositoryNotFound(url=backend.url) from None
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(object=f"{backend.url}/{CONFIG}", reason=f"it cannot be read: {error}") from error
    return dict(config)
