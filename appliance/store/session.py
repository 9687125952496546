"""The session of this process in a repository: one shared lock as long as anybody here needs it.

gc deletes nothing that a session which began before may rely on, and writes down what it is about to drop. `learn`
reads that, so that nothing new comes to rely on it.
"""

from __future__ import annotations

import threading

from appliance.store import collection
from appliance.store.backend.base import Backend
from appliance.store.damaged import load_damaged
from appliance.store.index import Index
from appliance.store.lock import Lock, Locks

__all__ = ["Session"]


class Session:
    """Thread-safe. `_entering` guards all fields that change."""

    def __init__(self, backend: Backend, index: Index, locks: Locks) -> None:
        self._backend, self._index, self._locks = backend, index, locks
        self._entering = threading.Lock()
        self._shared: Lock | None = None
        self._users = 0
        self._swept = -1

    def enter(self, purpose: str) -> None:
        """gc waits for us until `leave`. Raises Locked while somebody has the repository for himself."""
        with self._entering:
            if self._shared is None or not self._shared.held():
                lost, self._shared = self._shared, self._locks.acquire("shared", purpose)
                if lost is not None:
                    lost.release()
                self._swept = -1
            self._users += 1

    def leave(self) -> None:
        """Once for each `enter`."""
        with self._entering:
            self._users -= 1
            ended = None if self._users else self._shared
            if ended is not None:
                self._shared = None
                ended.release()

    def learn(self, always: bool = False) -> None:
        """What gc is about to drop; and, when it dropped something since we last looked, which packs are left."""
        with self._entering:
            shared, known = self._shared, self._swept
        found = collection.load(self._backend)
        session = shared.id if shared is not None else ""
        # gc waits for a session that it has listed, or has yet to list; packs it condemned are safe for us then.
        self._index.avoid(
            pack for one in found if one.sessions is not None and session not in one.sessions for pack in one.packs
        )
        swept = max((one.number for one in found if one.sweeping), default=0)
        if always or swept != known:
            self._index.damaged(load_damaged(self._backend))
            self._index.refresh()
            with self._entering:
                if self._shared is shared:  # under another lock gc may have been through meanwhile
                    self._swept = swept
