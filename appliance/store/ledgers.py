"""Copies of ledgers: what continuous capture covered, opaque bytes here, so that it does not die with its host.

ledgers/DOMAIN-UUID/NUMBER      a manifest (manifest.py); the highest number is the newest, each is a whole
"""

from __future__ import annotations

import re
from typing import Final

from appliance.errors import AlreadyExists, ObjectNotFound
from appliance.store import manifest
from appliance.store.backend.base import Backend
from appliance.store.codec import Codec

__all__ = ["domains", "load", "put"]

_NAME: Final = re.compile(r"ledgers/([^/]+)/(\d{20})")


def put(backend: Backend, codec: Codec, domain_uuid: str, data: bytes) -> None:
    """The newest copy; durable on return. Older ones go when it is there. Two writers at once: the later one counts."""
    numbers = _numbers(backend, domain_uuid)
    number = max(numbers, default=0) + 1
    while True:
        name = _name(domain_uuid, number)
        try:
            backend.put(name, manifest.encode_ledger(codec, name, data))
            break
        except AlreadyExists:
            number += 1
    for old in numbers:
        backend.delete(_name(domain_uuid, old))


def load(backend: Backend, codec: Codec, domain_uuid: str) -> bytes | None:
    """The newest copy; None when there is none. Raises IntegrityError, VersionUnsupported, and what the backend raises:
    an older one would hide what ended since."""
    while numbers := _numbers(backend, domain_uuid):
        name = _name(domain_uuid, numbers[-1])
        try:
            return manifest.decode_ledger(codec, name, backend.get(name))
        except ObjectNotFound:
            continue  # a newer one has replaced it
    return None


def domains(backend: Backend) -> list[str]:
    """The uuids of domains that have one."""
    names = (_NAME.fullmatch(info.name) for info in backend.list(manifest.LEDGERS))
    return sorted({match[1] for match in names if match})


def _numbers(backend: Backend, domain_uuid: str) -> list[int]:
    names = (_NAME.fullmatch(info.name) for info in backend.list(f"{manifest.LEDGERS}{domain_uuid}/"))
    return sorted(int(match[2]) for match in names if match)


def _name(domain_uuid: str, number: int) -> str:
    return f"{manifest.LEDGERS}{domain_uuid}/{number:020}"
