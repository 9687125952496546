"""Which patterns of a table of aliases fit one alias, in bounded time whatever the patterns are.

The tables come from a guest. A pattern like `*a*a*a*a*b` must not make a matcher try every way to split, so none here
ever goes back: between two stars the first place that fits is as good as any later one, which makes one comparison
linear in both lengths (pieces with `?` or `[…]` cost their product). What the comparisons of one plan may cost
together is a Budget.

    normalise   `-` and `_` are the same outside brackets, as for kmod
    Index       patterns by the text before their first wildcard: an alias meets a few dozen of 25 000

Source of the rules: fnmatch(3) without escapes, as kmod uses it; a bracket without an end stands for itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from appliance.errors import GuestUnreadable

__all__ = ["Budget", "Index", "fits", "normalise"]

_WILD = "*?["
# One lookup in a real table costs some 10 000; this much is a second or two.
_PLENTY = 30_000_000


class Budget:
    """What comparisons may cost together, about one unit for each character looked at. Not thread-safe."""

    def __init__(self, left: int = _PLENTY) -> None:
        self.left = left

    def spend(self, cost: int, what: str) -> None:
        """Raises GuestUnreadable when it is used up; `what` names the table."""
        self.left -= cost
        if self.left < 0:
            raise GuestUnreadable(what=what, reason="its patterns take too long to compare, no kernel's do")


def normalise(text: str) -> str:
    """With `_` for each `-` that is not inside brackets."""
    if "-" not in text:
        return text
    if "[" not in text:
        return text.replace("-", "_")
    out = []
    for part in _parts(text):
        out.append(part if len(part) > 1 else part.replace("-", "_"))
    return "".join(out)


def fits(pattern: str, text: str) -> bool:
    """Whether the whole text fits the pattern."""
    pieces = _pieces(pattern)
    if len(pieces) == 1:
        return len(pieces[0]) == len(text) and _fits_at(pieces[0], text, 0)
    first, last = pieces[0], pieces[-1]
    at, end = len(first), len(text) - len(last)
    if at > end or not _fits_at(first, text, 0) or not _fits_at(last, text, end):
        return False
    for piece in pieces[1:-1]:
        found = _find(piece, text, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True


class Index:
    """Patterns with a name each, made once, then only read: any thread may share it."""

    def __init__(self, pairs: Iterable[tuple[str, str]], what: str) -> None:
        """`pairs` are (pattern, name); `what` names the table in an error."""
        self._what = what
        self._by_start: dict[str, list[tuple[int, str, str]]] = {}
        for number, (pattern, name) in enumerate(pairs):
            pattern = normalise(pattern)
            start = pattern[: _first_wild(pattern)]
            self._by_start.setdefault(start, []).append((number, pattern[len(start) :], name))
        self._lengths = sorted({len(start) for start in self._by_start})

    def match(self, alias: str, budget: Budget) -> tuple[str, ...]:
        """The names whose patterns fit, in the order of the table, each once. Raises GuestUnreadable (the budget)."""
        alias = normalise(alias)
        found: list[tuple[int, str]] = []
        for length in self._lengths:
            if length > len(alias):
                break
            rest = alias[length:]
            for number, pattern, name in self._by_start.get(alias[:length], ()):
                budget.spend(_cost(pattern, rest), self._what)
                if fits(pattern, rest):
                    found.append((number, name))
        return tuple(dict.fromkeys(name for _, name in sorted(found)))


def _first_wild(pattern: str) -> int:
    places = [place for place in (pattern.find(mark) for mark in _WILD) if place >= 0]
    return min(places, default=len(pattern))


def _cost(pattern: str, text: str) -> int:
    plain = "?" not in pattern and "[" not in pattern
    return 1 + len(pattern) + (len(text) if plain else len(text) * len(pattern))


def _parts(pattern: str) -> list[str]:
    """Single characters, and whole brackets with their ends."""
    out = []
    at = 0
    while at < len(pattern):
        end = at + 1
        if pattern[at] == "[":
            # A `]` right behind the opening (or behind `!`) is a member. Without an end the bracket is itself.
            behind = at + 2 if pattern[at + 1 : at + 2] in ("!", "^") else at + 1
            closing = pattern.find("]", behind + 1)
            if closing < 0:
                out += list(pattern[at:])
                return out
            end = closing + 1
        out.append(pattern[at:end])
        at = end
    return out


# A piece is what stands between two stars: text, or parts when it has `?` or brackets.
_Piece = str | list[str]


def _pieces(pattern: str) -> list[_Piece]:
    if "[" not in pattern:
        return [piece if "?" not in piece else list(piece) for piece in pattern.split("*")]
    pieces: list[list[str]] = [[]]
    for part in _parts(pattern):
        if part == "*":
            pieces.append([])
        else:
            pieces[-1].append(part)
    return list(pieces)


def _fits_at(piece: _Piece, text: str, at: int) -> bool:
    if isinstance(piece, str):
        return text.startswith(piece, at)
    return all(_is_one(part, text[at + step]) for step, part in enumerate(piece))


def _find(piece: _Piece, text: str, start: int, end: int) -> int:
    if isinstance(piece, str):
        return text.find(piece, start, end)
    for at in range(start, end - len(piece) + 1):
        if _fits_at(piece, text, at):
            return at
    return -1


def _is_one(part: str, character: str) -> bool:
    if len(part) == 1:
        return part == "?" or part == character
    inside = part[1:-1]
    negated = inside[0] in "!^"
    inside = inside[1:] if negated else inside
    at, found = 0, False
    while at < len(inside):
        if inside[at + 1 : at + 2] == "-" and at + 2 < len(inside):
            found = found or inside[at] <= character <= inside[at + 2]
            at += 3
        else:
            found = found or inside[at] == character
            at += 1
    return found != negated
