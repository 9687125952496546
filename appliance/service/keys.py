"""The key of an instance: where it is found, who is asked for its passphrase, and the verbs `key …`.

A locked key is unlocked once, in this process. Our child processes get it through a descriptor of anonymous memory, so
that it lies neither on a disk nor in an environment.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.errors import ConfigError, WrongKey

if TYPE_CHECKING:
    from appliance.service.session import Session
    from appliance.store import Key, RepositorySpec

__all__ = ["KeyFacts", "change_passphrase", "export", "facts", "fingerprint", "key_of", "specification", "was_exported"]

PASSPHRASE_VARIABLE = "REWIND_PASSPHRASE"
_EXPORTED = "key-exported"


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """`id` is a fingerprint that tells keys apart and nothing about them; `exported` whether a copy was ever made."""

    id: str
    path: Path
    locked: bool
    exported: bool


def key_of(session: Session) -> Key | None:
    """The instance's key, or None when its repository is not encrypted. Raises WrongKey."""
    from appliance.store import Key

    if not session.instance.get("encrypted", True):
        return None
    return Key.load(key_path(session), lambda: passphrase(session, "passphrase of the key"))


def key_path(session: Session) -> Path:
    named = session.instance.get("key_file")
    return Path(named) if named else session.home.key_file


def explained(session: Session, key: Key | None, error: WrongKey) -> WrongKey:
    """The same with the file that was tried and what to do about it."""
    path = key_path(session)
    if key is None:
        return error  # a home without encryption: the repository that lies there now is another one
    reason = f"the key {fingerprint(key)} in {path} is not this repository's"
    return WrongKey(
        url=error.fields["url"], reason=reason,
        hint=f"put the right copy of the key as {path} (`rewind key show` tells keys apart), or is another repository"
        " mounted there?",
    )  # fmt: skip


def passphrase(session: Session, prompt: str) -> str:
    """From the environment, or from the person at the terminal. Raises WrongKey where there is neither."""
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    if session.ask is None:
        raise WrongKey(
            url=str(key_path(session)),
            reason="the key is locked by a passphrase and nobody can be asked",
            hint=f"set {PASSPHRASE_VARIABLE}, or run it on a terminal",
        )
    return session.ask(prompt)


def specification(session: Session) -> RepositorySpec:
    """How child processes open the repository. A locked key goes along as a descriptor, an open one as its path."""
    from appliance.store import RepositorySpec

    instance, key_file, key_fd = session.instance, None, None
    if instance.get("encrypted", True):
        key_file = key_path(session)
        if _locked(key_file):
            key = session.key
            assert key is not None
            key_file, key_fd = None, _in_memory(key)
    return RepositorySpec(url=instance["url"], cache=session.home.cache, key_file=key_file, key_fd=key_fd)


def facts(session: Session) -> KeyFacts:
    """About the instance's key. Raises ConfigError when the repository has none."""
    key = session.key
    if key is None:
        raise ConfigError(reason=f"the repository {session.instance['url']} is not encrypted and has no key")
    path = key_path(session)
    return KeyFacts(fingerprint(key), path, _locked(path), was_exported(session))


def export(session: Session, target: Path | None, new_passphrase: str | None) -> str:
    """A copy of the key: into a new file, or as text when `target` is None. Remembered, so that `doctor` is content.
    Raises TargetExists."""
    key = session.key
    if key is None:
        raise ConfigError(reason=f"the repository {session.instance['url']} is not encrypted and has no key")
    text = key.export(new_passphrase)
    if target is not None:
        key.save(target, new_passphrase)
    (session.home.path / _EXPORTED).touch(0o600)
    return text


def change_passphrase(session: Session, new_passphrase: str | None) -> KeyFacts:
    """Lock the key file by another passphrase, or by none. The old file is whole until the new one is durable."""
    found = facts(session)
    key = session.key
    assert key is not None
    new = found.path.with_name(f".{found.path.name}.new")
    new.unlink(missing_ok=True)
    key.save(new, new_passphrase)
    os.replace(new, found.path)
    folder = os.open(found.path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return KeyFacts(found.id, found.path, new_passphrase is not None, found.exported)


def was_exported(session: Session) -> bool:
    """Whether a copy was ever made with `export`. Whether it still exists, nobody here can know."""
    return (session.home.path / _EXPORTED).exists()


def fingerprint(key: Key) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.blake2b(key.secret, digest_size=8, person=b"rewind key id").hexdigest()


def _locked(path: Path) -> bool:
    try:
        return '"argon2id"' in path.read_text()
    except (OSError, UnicodeDecodeError):
        return False  # whoever opens it says what is wrong with it


def _in_memory(key: Key) -> int:
    handle = os.memfd_create("rewind-key", 0)
    os.write(handle, key.export().encode())
    os.lseek(handle, 0, os.SEEK_SET)
    return handle
