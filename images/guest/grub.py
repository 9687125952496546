"""grub.cfg and grubenv: which entry GRUB would start.

The file is a script; what distributions generate needs no more of it than this: entries and submenus by their braces,
`set NAME=VALUE` (also inside an `if`, where the last one counts), and variables in a line. `if` itself is not decided,
but for one case: a `default` that is taken from `next_entry` counts only when grubenv has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from images.guest.texts import fields, lines
from images.words import one_word

__all__ = ["Entry", "GrubMenu", "parse_grub", "parse_grubenv", "version_key"]

_MENUS = 2000
_DEPTH = 16
# A variable in a variable in a line: what that grows to is limited by these.
_VARIABLES, _VALUE, _LINE = 1000, 4096, 16384
_VARIABLE = re.compile(r"\$(?:\{(\w{1,64})\}|(\w{1,64}))")
# A part of a word: in single quotes, in double ones, after a backslash, or none of these.
_PIECE = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^\s"'\\]+)""")
_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+""")


@dataclass(slots=True)
class Entry:
    """One line of a boot menu. `id` is how a saved default names it. A submenu has `children` and no kernel."""

    title: str
    id: str = ""
    kernel: str = ""
    options: str = ""
    initrds: tuple[str, ...] = ()
    children: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class GrubMenu:
    """`bls`: entries are in files of their own (`blscfg`)."""

    entries: list[Entry]
    default: str
    variables: dict[str, str]
    bls: bool

    def chosen(self) -> Entry | None:
        """What GRUB would start by itself; its first entry when the default names none, as GRUB does."""
        return choose(self.entries, self.default) or next(iter(_leaves(self.entries)), None)


def parse_grubenv(content: str) -> dict[str, str]:
    """The file is filled up with `#`."""
    return {key: value.rstrip("#") if key == "" else value for key, value in fields(content.replace("\0", "")).items()}


def parse_grub(content: str, environment: Mapping[str, str]) -> GrubMenu:
    """Never fails: what is not understood is passed over."""
    parser = _Parser(environment)
    for line in lines(content.replace("\\\n", " ")):
        parser.take(line)
    return GrubMenu(parser.top, parser.default, parser.variables, parser.bls)


def choose(entries: list[Entry], default: str) -> Entry | None:
    """By `0`, `1>2`, a title, an id, or `id>id`."""
    here = default.partition(">")[0].strip()
    below = default.partition(">")[2]
    for index, entry in enumerate(entries):
        if here in (str(index), entry.title, entry.id) and here:
            if not entry.children:
                return entry
            return choose(entry.children, below or "0")
    # A title may have `>` in it, and an id may be of an entry in a submenu.
    return next((entry for entry in _leaves(entries) if default and default in (entry.title, entry.id)), None)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Unknown ones are empty, as in GRUB."""
    return _VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), text)


def version_key(name: str) -> list[tuple[int, int | str]]:
    """Orders names as versions: numbers by value, and above letters."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.findall(r"[0-9]{1,15}|[A-Za-z~]+", name)]


class _Parser:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.top: list[Entry] = []
        self.variables = {name: value[:_VALUE] for name, value in environment.items()}
        self.default = ""
        self.bls = False
        self._environment = environment
        self._open: list[Entry | None] = []  # None: braces of something else
        self._count = 0

    def take(self, line: str) -> None:
        words = _words(line)
        if not words:
            return
        if words[-1] == "{":
            self._begin(words)
        elif words[0] == "}":
            del self._open[-1:]
        elif words[0] == "set" and len(words) > 1 and "=" in words[1]:
            self._set(*words[1].split("=", 1))
        elif words[0] in ("blscfg", "bls_import"):
            self.bls = True
        else:
            self._in_entry(words, line)

    def _begin(self, words: list[str]) -> None:
        entry = None
        self._count += 1
        if words[0] in ("menuentry", "submenu") and len(words) > 2 and self._count < _MENUS:
            entry = Entry(words[1], _id(words))
            outer = [one for one in self._open if one is not None]
            (outer[-1].children if outer else self.top).append(entry)
        if len(self._open) < _DEPTH:
            self._open.append(entry)

    def _set(self, name: str, value: str) -> None:
        if name == "default":
            self._set_default(value)
        elif len(self.variables) < _VARIABLES and (self.top or self._open or name not in self._environment):
            self.variables[name] = expand(value, self.variables)[:_VALUE]

    def _set_default(self, value: str) -> None:
        found = _VARIABLE.fullmatch(value)
        name = (found[1] or found[2]) if found else ""
        if name == "next_entry":
            if self._environment.get(name):
                self.default = self._environment[name]
        elif not self._environment.get("next_entry"):
            self.default = expand(value, self.variables)

    def _in_entry(self, words: list[str], line: str) -> None:
        entry = next((one for one in reversed(self._open) if one is not None), None)
        if entry is None or len(words) < 2:
            return
        if words[0] in ("linux", "linux16", "linuxefi"):
            entry.kernel = expand(words[1], self.variables)
            entry.options = " ".join(map(one_word, filter(None, _arguments(line, self.variables)[2:])))
        elif words[0] in ("initrd", "initrd16", "initrdefi"):
            entry.initrds = tuple(expand(word, self.variables) for word in words[1:])


def _words(line: str) -> list[str]:
    """As a shell splits them, with quotes taken off; variables stay."""
    found = _WORD.findall(line[:_LINE])
    words: list[str] = []
    for word in found:
        if word.startswith("#"):
            break
        words.append(re.sub(r"""\\(.)|["']""", r"\1", word))
    return words


def _arguments(line: str, variables: Mapping[str, str]) -> list[str]:
    """The words of a line as a command of GRUB gets them: with variables, whose spaces make words unless they are in
    quotes. For the kernel GRUB puts quotes around a word that has spaces (grub-core/lib/cmdline.c)."""
    found: list[str] = []
    for token in _WORD.findall(line[:_LINE]):
        if token.startswith("#"):
            break
        words = [""]
        for single, double, escaped, bare in _PIECE.findall(token):
            first, *others = re.split(r"\s+", expand(bare, variables))
            quoted = single or escaped or expand(re.sub(r"\\(.)", r"\1", double), variables)
            words = [*words[:-1], words[-1] + quoted + first, *others]
        found += words
    return found


def _id(words: list[str]) -> str:
    """What follows `--id` or Debian's `$menuentry_id_option`."""
    for option, value in pairwise(words):
        if option in ("--id", "$menuentry_id_option", "${menuentry_id_option}"):
            return value
    return ""


def _leaves(entries: list[Entry]) -> list[Entry]:
    return [leaf for entry in entries for leaf in (_leaves(entry.children) if entry.children else [entry])]
