"""Packages in the repository: a small JSON document each, and a file that is fetched only when it is used.

blobs/KIND/ID-files    the file, put first
blobs/KIND/ID          the document; putting it makes the package exist
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from appliance.errors import IntegrityError, ObjectNotFound
from appliance.scratch import scratch_folder
from appliance.service.session import Session
from appliance.store.blobs import BlobRef

__all__ = ["Package", "Shelf"]

_FILES = "-files"


@dataclass(frozen=True, slots=True)
class Package:
    """`id` is unique on its shelf; `stored_bytes` of document and file."""

    id: str
    document: dict[str, Any]
    added: datetime
    stored_bytes: int


class Shelf:
    """All packages of one kind, in the repository of the session; used by its thread. Raises what the store raises."""

    def __init__(self, session: Session, kind: str) -> None:
        self._session, self._kind = session, kind

    def put(self, name: str, document: dict[str, Any], file: Path) -> None:
        """Durable on return. The same again is no error; a file without its document counts as nothing."""
        repo = self._session.repository
        repo.put_blob(self._kind, name + _FILES, file)
        with tempfile.NamedTemporaryFile("w", dir=self._session.home.path / "run") as text:
            json.dump(document, text, sort_keys=True)
            text.flush()
            repo.put_blob(self._kind, name, Path(text.name))

    def packages(self) -> list[Package]:
        """The oldest first. One listing, and one object read for each."""
        refs = {ref.name: ref for ref in self._session.repository.blobs(self._kind)}
        found = [self._load(ref, refs.get(name + _FILES)) for name, ref in refs.items() if not name.endswith(_FILES)]
        return sorted(found, key=lambda one: one.added)

    def fetch(self, name: str, path: Path) -> None:
        """The file of a package. Raises ObjectNotFound, IntegrityError."""
        self._session.repository.fetch_blob(BlobRef(self._kind, name + _FILES), path)

    def remove(self, name: str) -> None:
        """No error when it is gone."""
        for part in ("", _FILES):
            self._session.repository.delete_blob(BlobRef(self._kind, name + part))

    def have(self, name: str, where: Path, unpack: Callable[[Path, Path], object]) -> Path:
        """`where`, made by `unpack(file, where)` unless it is there. Two at once: the second finds the first one's."""
        if where.exists():
            return where
        with scratch_folder(where.parent, ".fetch-") as folder:
            file = folder / "file"
            self.fetch(name, file)
            try:
                unpack(file, where)
            except Exception:  # whatever it is, a folder that is there is the work of another one who was faster
                if not where.exists():
                    raise
        return where

    def _load(self, ref: BlobRef, files: BlobRef | None) -> Package:
        try:
            document = json.loads(self._session.repository.read_blob(ref))
            if not isinstance(document, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise IntegrityError(object=ref.object, reason=f"it is no document: {error}") from error
        if files is None:
            raise ObjectNotFound(url=self._session.repository.url, name=f"{ref.object}{_FILES}")
        return Package(ref.name, document, ref.modified, ref.stored + files.stored)
