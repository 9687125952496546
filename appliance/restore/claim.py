"""Which machine a session serves: one boot at a time.

An image is a file, and two machines can be started from it: both would write to the same root. So a machine asks first,
and is answered, in a file of two blocks of text that is served to all:

      0   4096   what a machine asks: lines `rewind 1`, `boot ID`, `machine WORD`, `end`
   4096   4096   what was answered: `rewind 1`, `granted ID`, `machine WORD`, `refused ID WHY`, `end`

ID is new for every boot, WORD the same for every boot of a machine. The answer is what is kept: a server that is
started anew serves the boot that the one before had granted. A boot that is served gives a sign of life every few
seconds (control.py). A second one that asks is refused as soon as such a sign has come since; where none comes, the
first has lost its power, and the second is granted. A guess that is wrong costs the first machine its disks' link, and
never mixes what the two write: the exports have the boot's ID in their names (storagedaemon.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLAIM", "Answer", "Asked", "Claims", "create", "read_answer", "read_asked"]

CLAIM = "claim"
_BLOCK = 4096
_BOOT = re.compile(r"[0-9a-f]{16}")
_MACHINE = re.compile(r"[A-Za-z0-9.:_-]{1,200}")
# Without a sign of life for so many seconds a boot is over: of the machine that asks again, and of another one, which
# may know less of a network that does not work. A machine whose link has broken is silent for as long as its kernel
# waits for an answer (30 s, images/stream/settings.py), until its next sign (3 s) and until it has connected again: by
# its second try at the latest, for which it gives up the first one (5 s, images/stream/keeper.sh).
_OVER_SAME, _OVER_OTHER = 8.0, 45.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a machine asks; `boot` is empty when nobody did."""

    boot: str = ""
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """`granted` is the boot that is served, of `machine`; `refused` the one that was sent away last. Both may be
    empty."""

    granted: str = ""
    machine: str = ""
    refused: str = ""
    why: str = ""


class Claims:
    """Of one session; for one thread. `now` is a clock in seconds. `answer` is what holds, `asked`
    who has asked last."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path, self._now = path, now
        if not path.exists():
            create(path)
        self.answer = read_answer(path)
        self._heard = now()
        self.asked, self._since = Asked(), 0.0

    def heard(self) -> None:
        """The boot that is served has given a sign of life."""
        self._heard = self._now()

    def deaf(self) -> None:
        """No sign of life could reach us: silence says nothing of the boot that is served, and the patience with it
        begins anew. Not a sign either, or whoever has asked would be sent away for it."""
        self._heard = self._since = self._now()

    def tend(self) -> None:
        """Answer who has asked. To be called again and again. Raises OSError when the answer cannot be kept; the old
        one holds then."""
        asked, now = read_asked(self._path), self._now()
        if asked != self.asked:
            self.asked, self._since = asked, now
        if not asked.boot or asked.boot in (self.answer.granted, self.answer.refused):
            return
        if not self.answer.granted or now - self._heard > self._patience(asked):
            self._say(Answer(asked.boot, asked.machine))
            self._heard = now
        elif self._heard > self._since:
            self._say(Answer(self.answer.granted, self.answer.machine, asked.boot, self._why()))

    def _patience(self, asked: Asked) -> float:
        return _OVER_SAME if asked.machine == self.answer.machine else _OVER_OTHER

    def _why(self) -> str:
        return f"another machine, {self.answer.machine}, runs from this session"

    def _say(self, answer: Answer) -> None:
        lines = ["rewind 1"]
        lines += [f"granted {answer.granted}", f"machine {answer.machine}"] if answer.granted else []
        lines += [f"refused {answer.refused} {answer.why}"] if answer.refused else []
        with self._path.open("r+b", buffering=0) as file:
            file.seek(_BLOCK)
            file.write("\n".join([*lines, "end", ""]).encode().ljust(_BLOCK, b"\0"))
            os.fsync(file.fileno())
        self.answer = answer


def create(path: Path) -> None:
    """A new file: nobody has asked. Raises OSError."""
    path.touch(mode=0o600)
    os.truncate(path, 2 * _BLOCK)


def read_asked(path: Path) -> Asked:
    """What is asked; nothing when it is not well formed: whoever wrote it is a machine that we do not know."""
    words = _words(path, 0)
    boot, machine = words.get("boot", ""), words.get("machine", "")
    if not _BOOT.fullmatch(boot) or not _MACHINE.fullmatch(machine):
        return Asked()
    return Asked(boot, machine)


def read_answer(path: Path) -> Answer:
    """What was answered last. Every machine could have written there: what is not well formed is no answer."""
    words = _words(path, _BLOCK)
    granted, machine = words.get("granted", ""), words.get("machine", "")
    refused, _, why = words.get("refused", "").partition(" ")
    if not _BOOT.fullmatch(granted) or not _MACHINE.fullmatch(machine):
        return Answer()
    if not _BOOT.fullmatch(refused):
        return Answer(granted, machine)
    return Answer(granted, machine, refused, "".join(one for one in why[:300] if one.isprintable()))


def _words(path: Path, offset: int) -> dict[str, str]:
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read(_BLOCK).rstrip(b"\0").decode(errors="replace").splitlines()
    if not lines or lines[0] != "rewind 1" or lines[-1] != "end":
        return {}
    pairs = (line.partition(" ") for line in lines[1:-1])
    return {word: value for word, _, value in pairs}
