"""From what was seen of a boot to a verdict.

    over       what ends the waiting: the report, or something on the console after which nothing more will come
    judge      booted or not, and each reason

Booted is a point when exactly one kernel started, the client's own, and its system came up: it tells so itself, or,
where nothing of ours can run in it, the console does. Failed units and differences are told beside it: a system may
have had them before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from images.verify.manifest import Manifest, differences, heard

__all__ = ["Verdict", "Waiting", "judge", "printable"]

# What a console says when the boot is over, and after how many seconds nobody waits for more: a login comes before the
# last services have started, and a rescue shell may be one that goes on by itself.
_ENDS: tuple[tuple[bytes, str, float], ...] = (
    (rb"Kernel panic - not syncing", "the kernel panicked", 3),
    (rb"rewind: CANNOT GO ON", "the image did not find what it boots", 3),
    (rb"You are in (emergency|rescue) mode", "the system went into a rescue shell", 5),
    (rb"Gave up waiting for|\(initramfs\) |dracut:/#", "the root file system did not appear", 5),
    (rb"\r?\n[\w.-]{1,64} login: ", "there is a login", 180),
)
_UP = rb"Reached target (\x1b\[[\d;]*m)?([Gg]raphical|[Mm]ulti-[Uu]ser)|Startup finished in| login: "
_UNIT = rb"Failed to start (?:\x1b\[[\d;]*m)?([\w@.:\\-]{1,100}\.\w+)"


class Waiting:
    """Asked again and again while a boot goes on. For one boot, and one thread."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def over(self, console: bytes, report: bytes, now: float) -> str:
        """Why it need not go on, empty as long as it must. `now` in seconds of any clock."""
        told = heard(report)
        if told.complete:
            return "the system has told what it is"
        for pattern, what, patience in _ENDS:
            if what == "there is a login" and told.begun:
                continue
            if re.search(pattern, console) and now - self._since.setdefault(what, now) >= patience:
                return what
        return ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` why it is not `booted`. `kernels` are the releases of all that started, in order; `failed` units;
    `differences` from the point."""

    booted: bool
    reasons: tuple[str, ...]
    kernels: tuple[str, ...]
    failed: tuple[str, ...]
    differences: tuple[str, ...]


def judge(console: bytes, told: Manifest, point: Manifest, release: str, ended: str) -> Verdict:
    """`release` is the client's kernel, `ended` why nobody waited longer."""
    kernels = re.findall(rb"Linux version ([\w.+~-]{1,64})", console)
    names = tuple(name.decode() for name in kernels) or tuple(filter(None, (told.facts.get("kernel", ""),)))
    reasons = []
    if not names:
        reasons.append("no kernel was seen to start")
    elif names != (release,):
        reasons.append(f"kernels that started: {', '.join(names)}, and not {release} once")
    elif told.facts.get("kernel", release) != release:
        reasons.append(f"the system says that its kernel is {told.facts['kernel']}, and not {release}")
    if not (told.begun or re.search(_UP, console)):
        reasons.append(f"it did not come up: {ended}")
    failed = told.lists.get("failed", ())
    if not told.complete:
        failed = tuple(dict.fromkeys(name.decode() for name in re.findall(_UNIT, console)))
    return Verdict(not reasons, tuple(reasons), names, failed, tuple(differences(point, told)))


def printable(console: bytes, lines: int) -> Sequence[str]:
    """The last lines of a console without what would move a terminal's cursor or colour it."""
    text = re.sub(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()].|.)", b"", console).decode(errors="replace")
    clean = ("".join(c for c in line if c.isprintable()).rstrip() for line in text.replace("\r", "\n").split("\n"))
    return [line for line in clean if line][-lines:]
