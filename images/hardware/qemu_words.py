"""The words of a QEMU command line: options with their values, and the two ways in which a value is written.

QEMU's own writing is `driver,id=x,file=a,,b`, in which `,,` is a comma; newer libvirt writes JSON. Source: qemu(1), and
util/keyval.c. Pure functions.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence

from appliance.errors import BadInventory
from images.hardware.schema import no_larger

__all__ = ["device_words", "options_of", "split"]

# Options without a value: what follows one of them is an image. Of all others the next word is the value.
_FLAGS = frozenset({
    "-enable-kvm", "-S", "-s", "-nodefaults", "-no-user-config", "-nographic", "-daemonize", "-snapshot", "-no-reboot",
    "-no-shutdown", "-usb", "-no-acpi", "-no-hpet", "-win2k-hack", "-full-screen", "-no-quit", "-only-migratable",
    "-preconfig", "-mem-prealloc", "-no-fd-bootchk", "-singlestep", "-curses",
})  # fmt: skip


def options_of(command: Sequence[str] | str, target: str) -> Iterator[tuple[str, str]]:
    """(option, value) in order; text is taken apart as a shell would, without expanding anything. Settings of the
    environment and the program may stand before them. An image by itself is `-hda`. Raises BadInventory."""
    words = _shell_words(command, target) if isinstance(command, str) else list(command)
    start = 0
    while start < len(words) and re.match(r"[A-Za-z_][A-Za-z0-9_]*=", words[start]):
        start += 1
    if start < len(words) and not words[start].startswith("-"):
        _check_program(words[start], target)
        start += 1
    while start < len(words):
        option = words[start].replace("--", "-", 1) if words[start].startswith("--") else words[start]
        start += 1
        if not option.startswith("-"):
            yield "-hda", option
        elif option in _FLAGS or start == len(words) or words[start].startswith("-"):
            yield option, ""
        else:
            yield option, words[start]
            start += 1


def split(value: str, first: str) -> dict[str, str]:
    """QEMU's own writing. A first word without `=` is the value of `first`, a later one is a switch that is on."""
    found: dict[str, str] = {}
    for number, word in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, rest = word.replace("\0", ",").partition("=")
        if not equals and number == 0:
            key, equals, rest = first, "=", key
        found[key] = rest if equals else "on"
    return found


def device_words(value: str, target: str) -> dict[str, str]:
    """The value of `-device` in either writing, the driver under `driver`. Raises BadInventory."""
    if not value.startswith("{"):
        return split(value, "driver")
    try:
        document = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadInventory(target=target, field="-device", reason=f"it is not JSON: {error}") from None
    return {str(key): _json_word(one) for key, one in document.items()}


def _json_word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _shell_words(text: str, target: str) -> list[str]:
    no_larger(text, target)
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise BadInventory(target=target, field="command line", reason=f"it cannot be taken apart: {error}") from None


def _check_program(program: str, target: str) -> None:
    base = program.rpartition("/")[2]
    if "qemu" not in base and "kvm" not in base:
        raise BadInventory(target=target, field="command line", reason=f"it is of {base!r}, which is no QEMU")
    if base.startswith("qemu-system-") and base != "qemu-system-x86_64":
        reason = f"{base} is not for x86_64, the one architecture there is"
        raise BadInventory(target=target, field="arch", reason=reason)
