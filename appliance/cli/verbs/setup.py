"""init, key, doctor."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from appliance.cli import records
from appliance.cli.command import Context, verb
from appliance.cli.params import domain_argument
from appliance.errors import (
    AlreadyExists,
    ConfigError,
    FenceError,
    PermissionDenied,
    TargetExists,
    VersionUnsupported,
    WrongKey,
)

__all__ = ["doctor_command", "init_command", "key_command"]


@verb("init", AlreadyExists, WrongKey, PermissionDenied, VersionUnsupported)
@click.option(
    "--repository", metavar="URL", help="A folder, or s3://BUCKET/PREFIX?endpoint=…  (default HOME/repository)."
)
@click.option("--key-file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="The key: used if the file exists, else made (default HOME/key).")  # fmt: skip
@click.option("--passphrase", is_flag=True, help="Lock the new key file by a passphrase, which is asked for.")
@click.option("--no-encryption", is_flag=True, help="Store everything readable for whoever can read the repository.")
def init_command(
    context: Context, repository: str | None, key_file: Path | None, passphrase: bool, no_encryption: bool
) -> None:
    """Make a home, with its key and its repository.

    If there is a repository at URL already, the home is joined to it; then its key is needed.
    """
    from appliance.service.setup import init

    if no_encryption and (passphrase or key_file):
        raise click.UsageError("--no-encryption leaves no key to name or to lock")
    with context.session() as session:
        new = _new_passphrase() if passphrase else None
        made = init(session, repository, encrypt=not no_encryption, key_file=key_file, new_passphrase=new)
    record = records.Initialised(
        context.home_path, made.url, made.repository_id, made.encrypted, made.created, made.key_file
    )
    context.output.emit(record, _initialised(record))


def _initialised(record: records.Initialised) -> str:
    lines = [f"{'made' if record.created else 'joined'} the repository {record.repository}"]
    if record.key_file:
        lines.append(f"its key is {record.key_file}: without it nothing can be read, by anyone")
        lines.append("keep a copy elsewhere: `rewind key export FILE`")
    return "\n".join(lines)


def _new_passphrase() -> str:
    """Asked twice, or from the environment. Raises WrongKey where there is neither a terminal nor the variable."""
    from appliance.service.keys import PASSPHRASE_VARIABLE

    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given:
        return given
    if not sys.stdin.isatty():
        raise ConfigError(reason="no passphrase was given and nobody can be asked", hint=f"set {PASSPHRASE_VARIABLE}")
    entered: str = click.prompt("new passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return entered


@click.group("key", no_args_is_help=False, short_help="Show, copy or lock the repository's key.")
def key_command() -> None:
    """Show, copy or lock the repository's key."""


@verb("show", WrongKey)
def _show(context: Context) -> None:
    """Show the key's fingerprint and where it lies; never the key."""
    from appliance.service import keys

    with context.session() as session:
        found = keys.facts(session)
    _emit_key(
        context,
        found,
        "show",
        f"key {found.id} in {found.path}, {'locked by a passphrase' if found.locked else 'not locked'}",
    )


@verb("export", WrongKey, TargetExists, PermissionDenied)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--passphrase", is_flag=True, help="Lock the copy by a passphrase, which is asked for.")
def _export(context: Context, file: Path, passphrase: bool) -> None:
    """Copy the key into FILE (`-`: standard output), to be kept away from this host."""
    from appliance.service import keys

    with context.session() as session:
        found = keys.facts(session)
        text = keys.export(session, None if str(file) == "-" else file, _new_passphrase() if passphrase else None)
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    _emit_key(context, found, "export", f"copied key {found.id} to {file}", file)


@verb("passphrase", WrongKey, PermissionDenied)
@click.option("--remove", is_flag=True, help="Leave the key file without a passphrase.")
def _passphrase(context: Context, remove: bool) -> None:
    """Lock the key file by a new passphrase. Copies made before keep theirs."""
    from appliance.service import keys

    with context.session() as session:
        keys.facts(session)
        found = keys.change_passphrase(session, None if remove else _new_passphrase())
    _emit_key(
        context,
        found,
        "passphrase",
        f"key {found.id} is {'locked by the new' if found.locked else 'without a'} passphrase",
    )


key_command.add_command(_show)
key_command.add_command(_export)
key_command.add_command(_passphrase)


def _emit_key(context: Context, found: object, action: str, text: str, path: Path | None = None) -> None:
    from appliance.service.keys import KeyFacts

    assert isinstance(found, KeyFacts)
    context.output.emit(records.Key(found.id, action, path or found.path, found.locked), text)


@verb("doctor", FenceError, codes={1: "something deserves a look", 2: "something has to be mended"})
@domain_argument(required=False)
@click.option("--fix", is_flag=True, help="Install the libvirt hook that reverts need, then look.")
def doctor_command(context: Context, domain: str | None, fix: bool) -> int:
    """Tell what on this host hinders or endangers protection, and the exact remedy.

    With DOMAIN only that domain is looked at, and whether the key and the repository are there. Exit code 1: something
    deserves a look; 2: something must be mended before protection works.
    """
    from appliance.cli.ui import table
    from appliance.service import doctor

    with context.session() as session:
        if fix:
            doctor.fix(session)
        found = [records.DoctorCheck(c.name, c.status, c.finding, c.remedy) for c in doctor.examine(session, domain)]
    context.output.emit_all(found, lambda rows: table(("status", "check", "finding"), [_row(row) for row in rows]))
    count = [sum(one.status == status for one in found) for status in ("ok", "warn", "fail")]
    summary = records.DoctorSummary(*count)
    context.output.emit(summary, "\n" + _remedies(found) if count[1] or count[2] else _fine(domain))
    return 2 if summary.failures else 1 if summary.warnings else 0


def _fine(domain: str | None) -> str:
    """Says what was looked at: who reads it must not take the host for sound because of one domain."""
    looked = f"of {domain}: its disks, the key and the repository were looked at; `rewind doctor` looks at the host"
    return "\nnothing stands in the way" + (f" {looked}" if domain else "")


def _row(check: records.DoctorCheck) -> tuple[str, str, str]:
    return check.status, check.name, check.finding


def _remedies(found: list[records.DoctorCheck]) -> str:
    return "\n".join(f"{one.name}: {one.remedy}" for one in found if one.status != "ok" and one.remedy)
