"""help, completion: the command line about itself."""

from __future__ import annotations

import os
import re
import sys

import click

from appliance.cli.command import Context, verb

__all__ = ["completion_command", "help_command"]


@verb("help")
@click.argument("topic", required=False, metavar="[VERB|settings|exit-codes|json|man|systemd]")
def help_command(context: Context, topic: str | None) -> None:
    """Explain a verb, list the settings or the exit codes, or print the documentation of --json, the manual page, or a
    unit of systemd for the daemon of this --home and --connect.

    Without a topic: the same as `rewind --help`.
    """
    from appliance.cli.app import VERBS, program

    root = click.Context(program, info_name="rewind")
    if topic is None:
        click.echo(program.get_help(root))
    elif topic == "exit-codes":
        _exit_codes(context)
    elif topic in ("json", "settings"):
        from importlib.resources import files

        click.echo((files("appliance.cli") / f"{topic.upper()}.md").read_text())
    elif topic == "systemd":
        click.echo(_unit(context), nl=False)
    elif topic == "man":
        from appliance.cli.man import page

        click.echo(page(), nl=False)
    elif topic in VERBS:
        command = program.get_command(root, topic)
        assert command is not None
        click.echo(command.get_help(click.Context(command, info_name=topic, parent=root)))
    else:
        raise click.UsageError(f"there is no help for {topic!r}")


def _unit(context: Context) -> str:
    """With the program that was started, and what it was told of where to work: systemd has another environment."""
    from importlib.resources import files

    started = os.path.abspath(sys.argv[0])
    words = [started if os.path.basename(started) == "rewind" else "/usr/local/bin/rewind"]
    words += [] if context.home is None else ["--home", str(context.home_path)]
    words += [] if context.connect is None else ["--connect", context.connect]
    text = (files("appliance.cli") / "rewind.service").read_text()
    return text.replace("/usr/local/bin/rewind", " ".join(map(_quoted, words)))


def _quoted(word: str) -> str:
    """One word of a command line of systemd, which has names of its own behind % and variables behind $."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"' if re.search(r"[\s\"'\\;]", word) or not word else plain


def _exit_codes(context: Context) -> None:
    from appliance.cli.man import exit_table
    from appliance.cli.ui import table

    context.output.emit_all(
        exit_table(),
        lambda rows: table(("code", "id", "meaning"), [(str(r.code), r.id, r.meaning) for r in rows], right=("code",)),
    )


@verb("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(context: Context, shell: str) -> None:
    """Print the completion script of a shell: `eval "$(rewind completion bash)"`."""
    from click.shell_completion import get_completion_class

    from appliance.cli.app import program

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(program, {}, "rewind", "_REWIND_COMPLETE").source())
