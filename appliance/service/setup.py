"""init: a home, a key and a repository; or a home for a repository that already exists."""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from appliance.config import write_json
from appliance.errors import (
    AlreadyExists,
    ConfigError,
    IntegrityError,
    PermissionDenied,
    RepositoryNotFound,
    VersionUnsupported,
    WrongKey,
)

if TYPE_CHECKING:
    from appliance.service.session import Session
    from appliance.store import Key, Repository

__all__ = ["Initialised", "init"]

_VERSION = 1
_log = logging.getLogger(__name__)
# sockaddr_un takes 107 bytes; below the home comes /run/UUID/intake.sock, and names a little longer.
_LONGEST_HOME = 50


@dataclass(frozen=True, slots=True)
class Initialised:
    """`created` is false when the home was joined to a repository that was there already."""

    url: str
    repository_id: str
    encrypted: bool
    created: bool
    key_file: Path | None


def init(
    session: Session,
    url: str | None = None,
    *,
    encrypt: bool = True,
    key_file: Path | None = None,
    new_passphrase: str | None = None,
) -> Initialised:
    """Make the home and its repository (`HOME/repository` unless `url` names another).

    With an existing repository the key is `key_file`, or the home's own. Raises AlreadyExists when the home is one
    already, RepositoryNotFound or WrongKey when an existing repository cannot be opened. After a failure the home may
    have empty folders and a key, never an instance file; `init` can simply be repeated.
    """
    home = session.home
    if home.instance_file.exists():
        raise AlreadyExists(
            url=str(home.path), name=home.instance_file.name,
            hint="nothing was changed, and nothing has to be made again: `rewind status` tells what there is;"
            " --home names another home",
        )
    if len(os.fsencode(home.path)) > _LONGEST_HOME:
        raise ConfigError(
            reason=f"the path of home {home.path} is longer than {_LONGEST_HOME} bytes",
            hint="sockets lie below it, and a socket's path has 107 bytes at most",
        )
    try:
        home.create()
    except OSError as error:
        raise PermissionDenied(url=str(home.path), name="home", reason=error.strerror or str(error)) from error
    # A path relative to where `init` was typed would mean something else to the daemon.
    where = _absolute(url or str(home.path / "repository"))
    if key_file is not None:
        key_file = Path(os.path.abspath(key_file))
    repository, created, found = _repository(session, where, encrypt, key_file, new_passphrase)
    try:
        key_path = None if not repository.encrypted else found
        made = Initialised(where, repository.id, repository.encrypted, created, key_path)
        if not created:
            _take_over(session, repository)
        write_json(home.instance_file, _instance(made))
    finally:
        repository.close()
    return made


def _take_over(session: Session, repository: Repository) -> None:
    """What continuous capture covered on a host that may be lost: with it every instant that was shipped is found.

    Nobody captures here yet, so what comes after is no gap.
    """
    from appliance.capture.salvage import adopt
    from appliance.timeline.ledger import Ledger

    for domain in repository.captured():
        ledger = Ledger(session.home.ledger(domain))
        try:
            if adopt(repository, domain, ledger.path) and (spans := ledger.spans()):
                ledger.stopped(spans[-1].seen)
        except (IntegrityError, VersionUnsupported) as error:
            _log.warning("what was captured of domain %s is not known here: %s", domain, error)


def _instance(made: Initialised) -> dict[str, Any]:
    key_file = None if made.key_file is None else str(made.key_file)
    return {
        "version": _VERSION, "id": uuid.uuid4().hex, "url": made.url, "repository": made.repository_id,
        "encrypted": made.encrypted, "key_file": key_file,
    }  # fmt: skip


def _repository(
    session: Session, url: str, encrypt: bool, key_file: Path | None, new_passphrase: str | None
) -> tuple[Any, bool, Path]:
    from appliance.store import Repository, open_backend

    path = key_file or session.home.key_file
    backend, known = open_backend(url), _existing_key(session, path)
    try:
        return Repository.open(backend, cache=session.home.cache, key=known), False, path
    except RepositoryNotFound:
        pass
    except WrongKey as error:
        tried = "" if known is None else f" ({path} was tried)"
        hint = f"give a copy of its key{tried}: `rewind init --repository {quote(url)} --key-file FILE`"
        raise WrongKey(**error.fields, hint=hint) from None
    key = _new_key(session, path, new_passphrase) if encrypt else None
    return Repository.create(backend, cache=session.home.cache, key=key), True, path


def _existing_key(session: Session, path: Path) -> Key | None:
    from appliance.service.keys import passphrase
    from appliance.store import Key

    if not path.exists():
        return None
    return Key.load(path, lambda: passphrase(session, f"passphrase of {path}"))


def _new_key(session: Session, path: Path, new_passphrase: str | None) -> Key:
    """A key that lies there already (an earlier `init` that failed, or one the admin brought) is used, not replaced."""
    from appliance.store import Key

    found = _existing_key(session, path)
    if found is not None:
        return found
    key = Key.generate()
    key.save(path, new_passphrase)
    return key


def _absolute(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return os.path.abspath(url)
    if scheme == "memory":
        raise ConfigError(reason=f"{url!r} ends with this process", hint="use a path, file:///… or s3://…")
    if not rest:
        raise ConfigError(reason=f"{url!r} is not the URL of a repository", hint="use a path, file:///… or s3://…")
    return url
