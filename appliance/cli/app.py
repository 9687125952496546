"""The program `rewind`: the table of its verbs, and the one place where an exception becomes words and an exit code."""

from __future__ import annotations

import importlib
import signal
from typing import Any

import click

from appliance.cli import records
from appliance.cli.command import Context, common_options
from appliance.errors import ConfigError, Interrupted, RewindError, of_the_system

__all__ = ["VERBS", "program", "run"]

# verb → module of appliance.cli.verbs that has it, in the order of the help text. A module is imported when one of its
# verbs is wanted.
VERBS = {
    "init": "setup", "doctor": "setup", "key": "setup",
    "protect": "protection", "unprotect": "protection", "pause": "protection", "point": "protection",
    "status": "protection",
    "points": "history", "diff": "history", "timeline": "timeline",
    "revert": "recovery", "undo": "recovery", "resume": "recovery",
    "export": "elsewhere", "restore": "elsewhere", "image": "image",
    "check": "upkeep", "gc": "upkeep", "forget": "upkeep",
    "daemon": "service",
    "help": "manual", "completion": "manual",
}  # fmt: skip


class _Program(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"appliance.cli.verbs.{VERBS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            close = _nearest(args[0])
            told = f"there is no verb {args[0]!r}" + (f"; did you mean {close!r}?" if close else "")
            raise click.UsageError(told, ctx)
        return super().resolve_command(ctx, args)


def _nearest(word: str) -> str:
    import difflib

    image: click.Group = importlib.import_module("appliance.cli.verbs.image").image_command
    if word in image.commands:
        return f"image {word}"
    return next(iter(difflib.get_close_matches(word, VERBS, 1)), "")


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from appliance import __version__

        click.echo(f"rewind {__version__}")
        ctx.exit()


program = _Program(
    name="rewind",
    help="Take recovery points of QEMU and libvirt guests, and take a guest back to any of them by rewriting only the "
    "blocks that differ.",
    epilog="`rewind VERB --help` explains a verb, `rewind help exit-codes` lists the exit codes, `rewind help man` is "
    "the manual page.",
    params=[
        *common_options(environment=True),
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
        ),
    ],  # fmt: skip
    no_args_is_help=False,
    subcommand_metavar="VERB [ARGUMENT]...",
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
)


def run(arguments: list[str]) -> int:
    """One command line, from words to exit code."""
    context = Context()
    arguments = arguments or ["--help"]
    # Before parsing, so that an error of the parser itself is printed the way the caller can read.
    context.output.json = "--json" in arguments
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        result = program.main(arguments, prog_name="rewind", standalone_mode=False, obj=context)
        return result if isinstance(result, int) else 0
    except BaseException as error:  # noqa: BLE001  this is where every exception ends
        return _ended(error, context)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(_number: int, _frame: Any) -> None:
    """SIGTERM takes the same way out as Ctrl-C, so that everything in progress is put back."""
    raise KeyboardInterrupt("terminated")


def _ended(error: BaseException, context: Context) -> int:
    """The last words for what ended the run, and its code."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, KeyboardInterrupt):
        error = error.__cause__  # click hides it, and with it which of the two it was
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 0
        case click.exceptions.Exit():
            return error.exit_code
        case KeyboardInterrupt() if error.args:
            return _tell(Interrupted(reason=_cut("terminated", error)), context, 128 + signal.SIGTERM)
        case KeyboardInterrupt() | click.Abort():
            return _tell(Interrupted(reason=_cut("by the keyboard", error)), context)
        case click.ClickException():
            return _tell(_usage(error), context)
        case RewindError():
            return _tell(error, context)
        case OSError() if (ours := of_the_system(error)) is not None:
            return _tell(ours, context)
        case _:
            return _bug(error, context)


def _cut(how: str, error: BaseException) -> str:
    """With what becomes of the work that was cut short, as a note on the exception says."""
    return "; ".join((how, *getattr(error, "__notes__", ())))


def _tell(error: RewindError, context: Context, code: int | None = None) -> int:
    code = error.exit_code if code is None else code
    context.output.fail(records.Error(error.id, error.message, error.hint, code, error.fields))
    return code


def _usage(error: click.ClickException) -> RewindError:
    """A bad argument in our own form: one sentence without full stop, and where to look."""
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "rewind"
    message = " ".join(error.format_message().split()).rstrip(".")
    hint = getattr(error, "hint", "") or f"`{path} --help` shows what it takes"
    return ConfigError(reason=message[:1].lower() + message[1:], hint=hint)


def _bug(error: BaseException, context: Context) -> int:
    """What no class of ours foresaw: the traceback goes into a file, the terminal gets a sentence."""
    from appliance.log import keep_traceback

    where = keep_traceback(error, context.home)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    context.output.fail(
        records.Error(
            "bug", f"unexpected error, which is a bug of rewind: {text}", f"please report it with {where}", 2,
            {"traceback": str(where)},
        )
    )  # fmt: skip
    return 2
