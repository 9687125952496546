"""The master key of an encrypted repository, and the file it is kept in.

Whoever has the key reads everything; without it nothing can be read by anyone, ever. The key file holds it plainly
(mode 0600), or locked by a passphrase: Argon2id makes a key from the passphrase, AES-256-GCM wraps the master key.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from appliance.errors import ConfigError, PermissionDenied, TargetExists, VersionUnsupported, WrongKey

__all__ = ["Key"]

VERSION: Final = 1
_SIZE = 32
_LARGEST_FILE = 64 << 10
# RFC 9106's second recommendation (64 MiB, 3 passes, 4 lanes): half a second on a small machine.
_MEMORY_KIB, _PASSES, _LANES = 64 * 1024, 3, 4
_MOST_MEMORY_KIB = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Key:
    """A master key; its text form never shows the secret."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != _SIZE:
            raise ConfigError(reason=f"a key has {_SIZE} bytes, not {len(self.secret)}")

    @classmethod
    def generate(cls) -> Key:
        return cls(secrets.token_bytes(_SIZE))

    @classmethod
    def parse(cls, text: str, passphrase: Callable[[], str] | None = None, origin: str = "the key") -> Key:
        """From the text of a key file; `passphrase` is asked only when the key is locked.

        Raises WrongKey (no or wrong passphrase, not a key), VersionUnsupported.
        """
        try:
            values = json.loads(text)
            version = values["rewind_key"]
            if version != VERSION:
                raise VersionUnsupported(object=origin, version=version, supported=VERSION)
            if "argon2id" not in values:
                return cls(bytes.fromhex(values["secret"]))
        except (ValueError, KeyError, TypeError) as error:
            raise WrongKey(url=origin, reason="this is not a key file") from error
        if passphrase is None:
            raise WrongKey(url=origin, reason="the key is locked by a passphrase and none was given")
        return cls(_unlock(values, passphrase(), origin))

    @classmethod
    def load(cls, path: Path, passphrase: Callable[[], str] | None = None) -> Key:
        """Raises WrongKey, VersionUnsupported, PermissionDenied."""
        try:
            return cls.parse(path.read_text(), passphrase, str(path))
        except PermissionError as error:
            raise PermissionDenied(url=str(path.parent), name=path.name, reason="cannot be read") from error
        except (OSError, UnicodeDecodeError) as error:
            raise WrongKey(
                url=str(path), reason="there is no key file that can be read", hint=f"put a copy of the key as {path}"
            ) from error

    @classmethod
    def from_fd(cls, fd: int) -> Key:
        """From an inherited descriptor that holds a key file's text, so that no copy need lie on a disk."""
        try:
            # From the start, wherever others who inherited the same descriptor have read to.
            text = os.pread(fd, _LARGEST_FILE, 0)
        finally:
            os.close(fd)
        return cls.parse(text.decode(errors="replace"), origin="the key descriptor")

    def export(self, passphrase: str | None = None) -> str:
        """The text of a key file, to print or to write elsewhere."""
        values: dict[str, Any] = {"rewind_key": VERSION}
        values |= {"secret": self.secret.hex()} if passphrase is None else _lock(self.secret, passphrase)
        return json.dumps(values, indent=1) + "\n"

    def save(self, path: Path, passphrase: str | None = None) -> None:
        """Create the file, readable by the owner only and durable. Raises TargetExists (a key is never replaced),
        ConfigError without the folder, PermissionDenied."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise TargetExists(path=path) from None
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(reason=f"there is no folder {path.parent} for the key") from None
        except OSError as error:
            raise PermissionDenied(url=str(path.parent), name=path.name, reason=error.strerror) from error
        with os.fdopen(handle, "w") as file:
            file.write(self.export(passphrase))
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _lock(secret: bytes, passphrase: str) -> dict[str, Any]:
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    cost = {"memory_kib": _MEMORY_KIB, "passes": _PASSES, "lanes": _LANES, "salt": salt.hex()}
    wrapped = AESGCM(_stretch(passphrase, cost)).encrypt(nonce, secret, b"rewind key 1")
    return {"argon2id": cost, "nonce": nonce.hex(), "wrapped": wrapped.hex()}


def _unlock(values: dict[str, Any], passphrase: str, origin: str) -> bytes:
    try:
        aead = AESGCM(_stretch(passphrase, values["argon2id"]))
        return aead.decrypt(bytes.fromhex(values["nonce"]), bytes.fromhex(values["wrapped"]), b"rewind key 1")
    except InvalidTag:
        raise WrongKey(url=origin, reason="the passphrase is wrong", hint="try it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise WrongKey(url=origin, reason="this is not a key file") from error


def _stretch(passphrase: str, cost: dict[str, Any]) -> bytes:
    if not 8 <= cost["memory_kib"] <= _MOST_MEMORY_KIB:
        raise ValueError("unreasonable cost")
    kdf = Argon2id(
        salt=bytes.fromhex(cost["salt"]),
        length=32,
        iterations=cost["passes"],
        lanes=cost["lanes"],
        memory_cost=cost["memory_kib"],
    )
    return kdf.derive(passphrase.encode())
