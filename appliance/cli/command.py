"""What every verb has: the common options, and a help text that ends with its exit codes.

The common options may stand before or after the verb, since nobody remembers which; both set the same `Context`.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli.output import Output
from appliance.errors import Interrupted, RewindError

if TYPE_CHECKING:
    from appliance.service import Session

__all__ = ["Context", "Verb", "common_options", "exits", "verb"]


@dataclass(slots=True)
class Context:
    """One run of the command line: the common options. Opening the session is left to the verb that needs it."""

    home: Path | None = None
    connect: str | None = None
    verbose: bool = False
    output: Output = field(default_factory=Output)

    @property
    def home_path(self) -> Path:
        """The chosen home, absolute."""
        from appliance.config import DEFAULT_HOME

        return Path(os.path.abspath(self.home or DEFAULT_HOME))

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The service of the chosen home; closed when the verb ends."""
        from appliance.config import Home
        from appliance.service import Session

        if self.verbose:
            from appliance.log import to_stderr

            to_stderr()
        ask = _ask if sys.stdin.isatty() else None
        with Session(Home(self.home_path), self.connect, say=self.output.note, ask=ask) as session:
            yield session


def _ask(prompt: str) -> str:
    typed: str = click.prompt(prompt, hide_input=True, err=True)
    return typed


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Keep the option's value in the shared context; an option that was not given leaves what stood before the verb."""

    def callback(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
        context = ctx.ensure_object(Context)
        if value is None or value is False and name != "progress":
            return
        setattr(context if hasattr(context, name) else context.output, name, value)
        if name == "home" and ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            context.output.home = str(context.home_path)

    return callback


def common_options(environment: bool = False) -> list[click.Option]:
    """Fresh options each time: click's are bound to the command that has them. Only the program itself looks into the
    environment; a verb that did would let a variable win over an option that stands before it."""

    def option(*names: str, **rest: Any) -> click.Option:
        return click.Option(names, expose_value=False, is_eager=True, **rest)

    return [
        option(
            "--home", metavar="DIR", envvar="REWIND_HOME" if environment else None,
            type=click.Path(path_type=Path, file_okay=False, readable=False), callback=_set("home"),
            help="Where this instance keeps its state (default /var/lib/rewind).",
        ),
        option(
            "--connect", metavar="URI", envvar="REWIND_CONNECT" if environment else None, callback=_set("connect"),
            help="The hypervisor (default from the settings, qemu:///system).",
        ),
        option("--json", is_flag=True, callback=_set("json"), help="Print JSON lines, each with a type."),
        option("--quiet", "-q", is_flag=True, callback=_set("quiet"), help="Print nothing but errors."),
        option(
            "--progress/--no-progress", default=None, callback=_set("progress"),
            help="Show progress on standard error (default: on a terminal).",
        ),
        option("--verbose", "-v", is_flag=True, callback=_set("verbose"), help="Log what is done on standard error."),
    ]  # fmt: skip


class Verb(click.Command):
    """A command whose options include the common ones (hidden in its own help, listed by `rewind --help`)."""

    def __init__(
        self, *args: Any, exit_classes: Sequence[type[RewindError]] = (), codes: Mapping[int, str] | None = None,
        **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **rest)
        self.codes: Mapping[int, str] = codes or {}
        self.exit_classes: tuple[type[RewindError], ...] = (*exit_classes, Interrupted)
        for option in common_options():
            option.hidden = True
            self.params.append(option)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: click would cut it to the width of a terminal, `man` has none."""
        first = inspect.cleandoc(self.help or "").partition("\n\n")[0].replace("\n", " ")
        return first.partition(". ")[0].rstrip(".")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The exit codes close every help text."""
        with formatter.section("Exit codes"):
            formatter.write_dl([("0", "done"), *((str(code), text) for code, text in exits(self))])
        formatter.write_paragraph()
        formatter.write_text("The options of `rewind --help` (--home, --connect, --json, …) may stand here too.")


def exits(command: Verb) -> list[tuple[int, str]]:
    """(code, what it means) of the errors that this verb can end with, and of what it finds without failing."""
    from appliance.errors import ConfigError, RepositoryNotFound, Temporary, WrongKey

    # Who can meet the wrong key opens the repository, which may not be there or not answer.
    store = (RepositoryNotFound, Temporary) if WrongKey in command.exit_classes else ()
    found = {ConfigError, *store, *command.exit_classes}
    kinds: list[type[RewindError]] = sorted(found, key=lambda kind: kind.exit_code)
    return [*sorted(command.codes.items()), *((kind.exit_code, kind.__name__) for kind in kinds)]


def verb(name: str, *exit_classes: type[RewindError], **rest: Any) -> Callable[[Callable[..., Any]], Verb]:
    """Decorator: `@verb("points", DomainNotFound)`; the function gets the Context first. `codes` has the exit codes
    that are no errors, below all others, and what they mean."""
    take_context = click.make_pass_decorator(Context, ensure=True)

    def decorate(function: Callable[..., Any]) -> Verb:
        return click.command(name, cls=Verb, exit_classes=exit_classes, **rest)(take_context(function))

    return decorate
