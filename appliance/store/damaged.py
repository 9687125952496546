"""Records that are known to be unreadable, as `check` found them: an object `damaged/PACK` for each pack that has any.

Immutable; FORMAT.md has its fields. Such a record is stored again when it comes along, and its pack is not merged.
"""

from __future__ import annotations

import contextlib
import json

from appliance.errors import IntegrityError, ObjectNotFound
from appliance.store.backend.base import Backend

__all__ = ["DAMAGED", "load_damaged"]

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
