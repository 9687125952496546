"""The manual page, made from the verbs themselves so that it cannot fall behind: `rewind help man > rewind.1`.

The page in the tree (`rewind.1`) is that output; a test compares them. man(7) macros only, which every `man` reads.
"""

from __future__ import annotations

import inspect
import re

import click

from appliance.cli import records
from appliance.cli.app import VERBS, program
from appliance.cli.command import Verb, exits
from appliance.errors import exit_codes

__all__ = ["exit_table", "page"]

_WHEN = """\
A point in the history of a domain is named by its id (or enough of its beginning), a label, `latest`, an ISO time of
any precision (`2026-03-01T14:02:11`), `HH:MM` or `HH:MM:SS` (the last time that it was), or an age (`10m ago`). A time
means the newest point at or before it. Of what is captured continuously a time means the last write before it, to the
microsecond, and `#81726` means the write of that number; a point is made of it when there is none yet. When the clock
was set back and a time came twice, the earlier one is meant. After the host or the capture has died without a word the
last writes are recorded but were not seen to be all: `#81726?` takes such a one, and its point has the reason `unseen`.
`latest`, times, ages, `#81726` and ids mean themselves: they are refused as labels. `81726` means the same write as
long as no point has it for a label.

Points with the reason `before-revert` or `safety` were taken by a revert: the present while the guest still ran, and
what it had written when it was stopped. Right after a revert `latest` is therefore the safety point, the state that was
left. The state that was reverted to keeps the id or label that it had: name it by that."""
_DOMAIN = """\
DOMAIN is a name, or the UUID that never changes. Where several domains had a name one after the other, it means the one
that is protected under it; points, diff, timeline, export and restore take the one before it as long as that one alone
has points, and say so. Where nothing decides, the UUIDs are listed: name one of them.

A protected domain that was lost comes back as the same domain, with its UUID, its protection and its history, when a
whole point of it is restored under its old name: `rewind restore web --at latest --into FOLDER --name web`. One that
was made anew under the old name, or restored where it was not protected, has another UUID and begins a history of its
own with `rewind protect web`; `rewind points UUID` reaches the old points."""
_FILES = (
    ("/var/lib/rewind", "the default home: instance.json, key, cache, protection records, reverts that have not ended"),
    ("/etc/rewind/rewind.yaml", "settings; files in /etc/rewind/conf.d and HOME/rewind.yaml are merged over it"),
)
_ENVIRONMENT = (
    ("REWIND_HOME", "as --home"),
    ("REWIND_CONNECT", "as --connect"),
    ("REWIND_PASSPHRASE", "the passphrase of the key, where nobody can be asked for it"),
)


def page() -> str:
    """The whole page."""
    root = click.Context(program, info_name="rewind")
    lines = [
        '.TH REWIND 1 "" "Rewind" "User Commands"',
        ".SH NAME",
        "rewind \\- recovery points of QEMU and libvirt guests",
    ]
    lines += [".SH SYNOPSIS", ".B rewind", "[\\fIOPTION\\fR]... \\fIVERB\\fR [\\fIARGUMENT\\fR]..."]
    lines += [".SH DESCRIPTION", *_text(program.help or ""), ".SH OPTIONS OF ALL VERBS"]
    lines += [".PP", "They may stand before or after the verb.", *_options(root, program)]
    lines += [".SH VERBS"]
    for name in VERBS:
        command = program.get_command(root, name)
        assert isinstance(command, Verb | click.Group)
        lines += _verb(root, f"rewind {name}", command)
    lines += [".SH NAMING A DOMAIN", *_text(_DOMAIN)]
    lines += [".SH NAMING AN INSTANT", *_text(_WHEN), ".SH EXIT STATUS"]
    lines += _terms([(f"{one.code} {one.id}", one.meaning) for one in exit_table()])
    lines += [".SH ENVIRONMENT", *_terms(_ENVIRONMENT), ".SH FILES", *_terms(_FILES)]
    lines += [".SH SEE ALSO", ".BR virsh (1), nbdinfo (1), nbdcopy (1), qemu-img (1), guestfish (1)"]
    return "\n".join(lines) + "\n"


def exit_table() -> list[records.ExitCode]:
    """Every exit code with its id and what it means, ascending."""
    found = [
        records.ExitCode(0, "done", "everything asked for is done"),
        records.ExitCode(1, "warnings", "done, and something deserves a look (doctor, status)"),
    ]
    found += [records.ExitCode(code, name, _meaning(template)) for code, name, template in exit_codes()]
    return [*found, records.ExitCode(143, "terminated", "ended by SIGTERM, everything in progress put back")]


def _meaning(template: str) -> str:
    """The message with `{object}` placeholders as a reader of a table wants them."""
    if template == "{reason}":
        return "several reasons, told in the message"
    return re.sub(r"\{(\w+)(!r)?\}", r"<\1>", template)


def _verb(root: click.Context, path: str, command: click.Command) -> list[str]:
    ctx = click.Context(command, info_name=path, parent=None)
    usage = " ".join(command.collect_usage_pieces(ctx))
    lines = [f".SS {_escape(path)} {_escape(usage)}", *_text(inspect.cleandoc(command.help or ""))]
    lines += _options(ctx, command)
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            nested = command.get_command(ctx, name)
            assert nested is not None
            lines += _verb(root, f"{path} {name}", nested)
    if isinstance(command, Verb):
        codes = ", ".join(f"{code} {name}" for code, name in exits(command))
        lines += [".PP", f"Exit codes: 0, {_escape(codes)}."]
    return lines


def _options(ctx: click.Context, command: click.Command) -> list[str]:
    found = [one.get_help_record(ctx) for one in command.params if isinstance(one, click.Option) and not one.hidden]
    return _terms([record for record in found if record])


def _terms(pairs: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> list[str]:
    return [line for term, text in pairs for line in (".TP", f".B {_escape(term)}", _escape(text))]


def _text(text: str) -> list[str]:
    """Paragraphs, each behind `.PP`."""
    paragraphs = re.split(r"\n\s*\n", text.strip().replace("\b", ""))
    return [line for paragraph in paragraphs for line in (".PP", _escape(" ".join(paragraph.split())))]


def _escape(text: str) -> str:
    """roff reads a backslash, a leading dot and a plain hyphen in its own way."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return f"\\&{text}" if text[:1] in ".'" else text
