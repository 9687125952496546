"""Passphrases of guests: read when they are needed, into memory that is kept from this host's disks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from appliance.errors import ConfigError

__all__ = ["luks_keys", "luks_option"]

_F = TypeVar("_F", bound=Callable[..., Any])
_LONGEST = 4096


def luks_option(function: _F) -> _F:
    """The function gets `luks_key`, for `luks_keys`."""
    text = "A file with a passphrase of the guest's encrypted disks, to read them; `-` asks for it. May be repeated."
    return click.option("--luks-key", multiple=True, metavar="FILE", help=text)(function)


def luks_keys(given: Sequence[str]) -> tuple[bytes, ...]:
    """The passphrases, each without the line break at its end. Raises ConfigError for what is none, and where this host
    would write them to its swap."""
    if not given:
        return ()
    from appliance import secrecy

    secrecy.guard()  # before the first one is in memory
    return tuple(_typed() if one == "-" else _from_file(Path(one)) for one in given)


def _typed() -> bytes:
    if sys.stdin.isatty():
        typed: str = click.prompt("Passphrase of the guest's disks", hide_input=True, err=True)
        return _checked(typed.encode(), "what was typed")
    return _checked(sys.stdin.buffer.readline(_LONGEST + 2), "the standard input")


def _from_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return _checked(file.read(_LONGEST + 2), str(path))
    except OSError as error:
        raise ConfigError(reason=f"passphrase file {path} cannot be read: {error.strerror}") from error


def _checked(text: bytes, origin: str) -> bytes:
    """LUKS' own tools stop at a zero byte where they are given a text, as they are here."""
    found = text.removesuffix(b"\n")
    if not found or len(found) > _LONGEST or b"\0" in found:
        raise ConfigError(reason=f"{origin} has no passphrase: it is 1 to {_LONGEST} bytes, none of them zero")
    try:
        found.decode()
    except UnicodeDecodeError:
        # Not chained: the error has the passphrase in it.
        raise ConfigError(reason=f"{origin} has a passphrase that is not UTF-8, which libguestfs cannot take") from None
    return found
