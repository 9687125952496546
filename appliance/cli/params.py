"""What the verbs take: domains, durations, rates. Each refuses what it cannot read in one sentence."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import click
from click.shell_completion import CompletionItem

from appliance.cli.command import Context
from appliance.errors import NotConfirmed
from appliance.units import parse_duration, parse_size

__all__ = ["complete_when", "confirm", "domain_argument", "duration_option", "rate_option", "wait_option"]

_F = TypeVar("_F", bound=Callable[..., Any])


def domain_argument(required: bool = True) -> Callable[[_F], _F]:
    """A name or UUID."""
    return click.argument("domain", required=required, callback=_domain, shell_complete=_complete_domain)


def duration_option(
    *names: str, default: float | None = None, text: str, zero: bool = False
) -> Callable[[_F], _F]:  # fmt: skip
    """Seconds, from `90s`, `15m`, `1h30m`, always with a unit; nothing at all only with `zero`."""
    return click.option(
        *names, metavar="DURATION", default=default, callback=_duration_or_none if zero else _duration, help=text
    )


def wait_option(default: str = "not at all") -> Callable[[_F], _F]:
    """The same for every verb that changes something; `default` tells what is done without it."""
    text = f"How long to wait while another rewind works on the domain (default: {default})."
    return click.option("--wait", metavar="DURATION", default="0", callback=_wait, help=text)


def rate_option(text: str) -> Callable[[_F], _F]:
    """Bytes a second, from `50M`."""
    return click.option("--rate", metavar="BYTES", callback=_rate, help=text)


def confirm(question: str, action: str) -> None:
    """Ask the person; without one, `--yes` is the only consent. Raises NotConfirmed, with a hint where nobody was
    asked: who has just said no needs none."""
    if not sys.stdin.isatty():
        raise NotConfirmed(action=action, hint="add --yes to do it without asking")
    if not click.confirm(question, err=True):
        raise NotConfirmed(action=action)


def _duration_or_none(ctx: click.Context, param: click.Parameter, value: Any) -> float | None:
    return None if value is None else _with_unit(ctx, param, value)


def _with_unit(ctx: click.Context, param: click.Parameter, value: Any) -> float:
    """Who types 15 means minutes as often as seconds, and for `--keep-within` days: it is not guessed."""
    text = str(value).strip()
    if text.replace(".", "", 1).isdigit() and float(text):
        error = click.BadParameter(f"{text!r} has no unit", ctx, param)
        error.hint = f"`{param.opts[0]} {text}m` means minutes; s, h, d and w are units, too"  # type: ignore[attr-defined]
        raise error
    return _seconds(ctx, param, value)


def _duration(ctx: click.Context, param: click.Parameter, value: Any) -> float | None:
    if value is None:
        return None
    seconds = _with_unit(ctx, param, value)
    if seconds <= 0:
        raise click.BadParameter(f"{value!r} is not more than nothing", ctx, param)
    return seconds


def _wait(ctx: click.Context, param: click.Parameter, value: Any) -> float:
    return _seconds(ctx, param, value)


def _seconds(ctx: click.Context, param: click.Parameter, value: Any) -> float:
    try:
        return parse_duration(str(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a duration; 90s, 15m, 1h30m are", ctx, param) from None


def _rate(ctx: click.Context, param: click.Parameter, value: Any) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(str(value).removesuffix("/s"))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a rate; 50M means 50 MiB a second", ctx, param) from None


def _domain(ctx: click.Context, param: click.Parameter, value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    if not text.strip() or not text.isprintable():
        raise click.BadParameter(f"{text!r} is not the name of a domain", ctx, param)
    return text


def _complete_domain(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """From the protection records alone: a tab must not wait for libvirt."""
    names = _names(ctx.ensure_object(Context).home_path / "domains")
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_when(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Labels and ids of the domain's newest points, as the catalogue last saw them: a tab opens no repository."""
    path = ctx.ensure_object(Context).home_path / "cache" / "catalogue.sqlite"
    # click does not tell the domain when the option to complete has no value yet: then any domain's will do.
    domain = ctx.params.get("domain") or ""
    query = "SELECT label, id FROM points WHERE ?1 IN (domain, uuid, '') ORDER BY time DESC LIMIT 100"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            found = database.execute(query, (domain,)).fetchall()
    except sqlite3.Error:
        return []  # completion is a courtesy
    words = ["latest", *dict.fromkeys(label for label, _id in found if label), *(point for _label, point in found)]
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _names(folder: Path) -> list[str]:
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(str(json.loads(path.read_text())["domain"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # completion is a courtesy; the verb itself will say what is wrong
    return sorted(found)
