"""Boots a client on a target and hears what it says of itself; tells in what that differs from what was expected.

    proof = boot(TARGETS["nvme-vmxnet3-uefi"], overlay(client, folder / "disk.qcow2"), Medium("esp", path), folder)
    assert compare(proof, expected(client, "first")) == []

The proof is one line of JSON that `proof` (tests/guests/client_files) writes to the second serial port once the boot
has ended. The first port is the console: each kernel that starts says one `Linux version` line there.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guests.clients import ORIGINS, ClientFiles, Instant
from tests.support.limits import limit
from tests.support.targets import Medium, Target
from tests.support.typist import answering, console_arguments

__all__ = ["Proof", "arguments", "boot", "compare", "expected", "watch"]

MEMORY_MIB = 768


@dataclass(frozen=True, slots=True)
class Proof:
    """What a boot showed. `document` is None when the client said nothing: then `ended` tells why nobody waited longer.

    `seconds` is from the start of QEMU to the proof, or to the end of waiting. `console` is all of the first port.
    """

    target: str
    document: dict[str, Any] | None
    console: str
    seconds: float
    ended: str
    qemu: str = field(repr=False, default="")

    @property
    def kernels(self) -> list[str]:
        """The release of every kernel that started, in order. Firmware and boot loader print none of these lines."""
        return re.findall(r"Linux version (\S+)", self.console)

    @property
    def up(self) -> bool:
        return self.document is not None

    def __str__(self) -> str:
        return f"{self.target}: {self.ended} after {self.seconds:.1f} s; console:\n{self.console[-3000:]}{self.qemu}"


def arguments(
    target: Target, disk: Path, medium: Medium | None, folder: Path, extra: Iterable[str] = (), answered: bool = False
) -> list[str]:
    """The whole command line of QEMU. `folder` gets console.log, proof.log and the variables of a UEFI; a socket
    `console`, too, where it is `answered`."""
    console, log = folder / "console", folder / "console.log"
    # The medium comes last: a stick has a SCSI bus inside, which would take the name of the disk's.
    # fmt: off
    return [
        "qemu-system-x86_64", "-name", target.name, *target.hardware(folder), "-m", str(MEMORY_MIB), "-smp", "2",
        "-no-reboot", *target.disk_args(disk), *target.nic_args(medium), *target.boot_args(medium),
        *(console_arguments(console, log) if answered else ("-serial", f"file:{log}")),
        "-serial", f"file:{folder / 'proof.log'}", *extra,
    ]
    # fmt: on


def boot(
    target: Target,
    disk: Path,
    medium: Medium | None,
    folder: Path,
    *,
    seconds: float = 180.0,
    until: str = "",
    power_off: bool = False,
    extra: Iterable[str] = (),
    answer: tuple[str, str] = ("", ""),
    change: Callable[[list[str]], list[str]] = list,
) -> Proof:
    """Boot until the proof is there, or `seconds` (of a quiet machine) are over, or the console shows `until`, a
    regular expression that ends the waiting for nothing; then QEMU is killed, however this function is left.

    `disk` is written to: give it an overlay. `folder` must exist, and be of this boot alone. With `power_off` the
    machine may first go off by itself, so that nothing is lost that it wrote; the client does that when its command
    line has `proof.poweroff`. A reset ends QEMU: no kernel gets a second try. `answer` is a question on the console and
    what is typed then. `change` has the last word on QEMU's command line.
    """
    begun = time.monotonic()
    with (folder / "qemu.log").open("wb") as log:
        command = change(arguments(target, disk, medium, folder, extra, answered=any(answer)))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        with answering(folder / "console", folder / "console.log", *answer):
            ended = _wait(process, folder, begun + limit(seconds), until)
        taken = time.monotonic() - begun
        if power_off and ended == "proof":
            process.wait(limit(60))
    finally:
        process.kill()
        process.wait(30)
    console, said = _text(folder / "console.log"), _text(folder / "qemu.log")
    return Proof(target.name, _document(folder), console, taken, ended, said)


def watch(name: str, folder: Path, seconds: float) -> Proof:
    """The proof of a machine that somebody else runs, whose two ports are files in `folder`."""
    begun = time.monotonic()
    while _document(folder) is None and time.monotonic() < begun + limit(seconds):
        time.sleep(0.2)
    ended = "no proof in time" if _document(folder) is None else "proof"
    return Proof(name, _document(folder), _text(folder / "console.log"), time.monotonic() - begun, ended)


def _wait(process: subprocess.Popen[bytes], folder: Path, deadline: float, until: str) -> str:
    """Why the waiting is over."""
    while time.monotonic() < deadline:
        over = process.poll() is not None
        if _document(folder) is not None:
            return "proof"
        if until and re.search(until, _text(folder / "console.log")):
            return "seen"
        if over:
            return f"qemu ended with {process.returncode}"
        time.sleep(0.2)
    return "no proof in time"


def _document(folder: Path) -> dict[str, Any] | None:
    """The last whole line of the proof's port."""
    lines = [line for line in _text(folder / "proof.log").split("\n")[:-1] if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# --- what was expected ----------------------------------------------------------------------------------------------

# What lies on the disk must be equal, whatever the hardware.
_SAME = ("hostname", "machine_id", "packages", "users", "services", "etc", "fstab")
# Words of the command line that say where the kernel came from, and not how it runs.
_NOT_SETTINGS = ("BOOT_IMAGE=", "initrd=")


def expected(client: ClientFiles, instant: Instant = "first", *, efi: bool | None = None) -> dict[str, Any]:
    """What a client must say after it came back from an instant. With `efi` also what it booted by."""
    told = client.expected[instant]
    wanted = {name: told[name] for name in _SAME}
    wanted |= {"kernel": client.kernel, "command_line": settings(told["menu"])}
    wanted |= {"running_hostname": told["hostname"], "nic": ORIGINS[client.name].nic_name, "port": "7070", "boots": 1}
    return wanted if efi is None else wanted | {"efi": efi}


def compare(proof: Proof, wanted: dict[str, Any], *, may_add: Iterable[str] = ("rewind.", "rw.")) -> list[str]:
    """The differences between a proof and what was expected, one sentence each; an empty list is a proof.

    Exactly one kernel started and it is the client's; what lies on the disk is equal; the command line has the same
    words in the same order, and of others only such as begin with one of `may_add`; the card is up under its old name;
    the client's service listens; no unit failed; it is the first boot since the instant.
    """
    document = proof.document
    if document is None:
        return [f"no proof: {proof.ended}"]
    found = []
    if proof.kernels != [wanted["kernel"]]:
        found.append(f"kernels that started: {proof.kernels} and not only {wanted['kernel']}")
    for name in (*_SAME, "kernel", "running_hostname", "boots", *(["efi"] if "efi" in wanted else [])):
        if document[name] != wanted[name]:
            found.append(f"{name}: {document[name]!r} and not {wanted[name]!r}")
    words = [word for word in settings(document["command_line"]) if not word.startswith(tuple(may_add))]
    if words != wanted["command_line"]:
        found.append(f"command line: {words} and not {wanted['command_line']}")
    return found + _network(document, wanted["nic"]) + _services(document, wanted["port"])


def settings(command_line: str) -> list[str]:
    """The words of a command line that decide how the kernel runs."""
    return [word for word in command_line.split() if not word.startswith(_NOT_SETTINGS)]


def _network(document: dict[str, Any], name: str) -> list[str]:
    card = document["interfaces"].get(name)
    if card is None:
        return [f"no network card {name}, only {sorted(document['interfaces'])}"]
    found = []
    if not card["carrier"] or not any(address.startswith("10.0.2.") for address in card["addresses"]):
        found.append(f"network card {name} is not up: {card}")
    if not document["gateway"]:
        found.append("the gateway does not answer")
    return found


def _services(document: dict[str, Any], port: str) -> list[str]:
    found = [f"failed unit {unit}" for unit in document["failed"]]
    if not any(address.rsplit(":", 1)[-1] == port for address in document["listening"]):
        found.append(f"nobody listens on port {port}, only on {document['listening']}")
    return found
