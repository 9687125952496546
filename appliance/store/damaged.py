"""Records that are known to be unreadable, as `check` found them: an object `damaged/PACK` for each pack that has any.

Immutable; FORMAT.md has its fields. Such a record is stored again when it comes along, and its pack is not merged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection

from appliance.errors import IntegrityError, ObjectNotFound
from appliance.store.backend.base import Backend

__all__ = ["DAMAGED", "forget_damaged", "load_damaged", "put_damaged"]

DAMAGED = "damaged/"


def load_damaged(backend: Backend) -> dict[bytes, frozenset[bytes]]:
    """The records known to be damaged, by pack; none stands for the whole pack."""
    found = {}
    for info in backend.list(DAMAGED):
        with contextlib.suppress(ObjectNotFound):
            try:
                values = json.loads(backend.get(info.name))
                found[bytes.fromhex(values["pack"])] = frozenset(bytes.fromhex(one) for one in values["records"])
            except (ValueError, KeyError, TypeError) as error:
                raise IntegrityError(object=info.name, reason="it cannot be read") from error
    return found


def put_damaged(backend: Backend, pack: bytes, records: Collection[bytes]) -> None:
    """Write it down, durably. Raises AlreadyExists when something is written of that pack already."""
    values = {"format": 1, "pack": pack.hex(), "records": sorted(one.hex() for one in records)}
    backend.put(DAMAGED + pack.hex(), json.dumps(values).encode())


def forget_damaged(backend: Backend, pack: bytes) -> None:
    """No error when nothing is written of it."""
    backend.delete(DAMAGED + pack.hex())
