"""The chosen steps as files for /run.

    /run/rewind/settle/run, lib, settings        the runner, what steps share, shell variables
    /run/rewind/settle/steps/PHASE/NN-NAME       the scripts
    /run/systemd/system/rewind-PHASE.service     runs a phase; a drop-in of a target has it started

What came of it is in /run/rewind/settle/report, in the journal, on the console, and in the client's /var/lib/rewind.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from images.model import Plan
from images.settle.step import Step, validated

__all__ = ["Choice", "Laid", "lay"]

# Step → its fields.
Choice = Mapping[str, Mapping[str, Any]]

_HERE = "rewind/settle"
_UNITS = "systemd/system"
# Before anything reads a host name, a key or an address; the disk can be written from local-fs.target on.
_IDENTITY = """[Unit]
Description=Give this machine an identity of its own
DefaultDependencies=no
Conflicts=shutdown.target
After=local-fs.target systemd-remount-fs.service systemd-machine-id-commit.service
Wants=network-pre.target
Before=sysinit.target network-pre.target cloud-init-local.service ssh.service sshd.service shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh /run/rewind/settle/run identity
"""
# Not a oneshot: the start of the system does not wait for it.
_SETTLE = """[Unit]
Description=Let this disk start by itself on this hardware
After=multi-user.target

[Service]
ExecStart=/bin/sh /run/rewind/settle/run settle
Nice=10
IOSchedulingClass=idle
KillMode=mixed
TimeoutStopSec=600
"""
_PHASES = {"identity": (_IDENTITY, "sysinit.target"), "settle": (_SETTLE, "multi-user.target")}


@dataclass(frozen=True, slots=True)
class Laid:
    """`run`: for `Settings.run`. `words`: for the command line. `identity` changes with choice and image: each step is
    done once for it."""

    run: Mapping[str, bytes]
    words: tuple[str, ...]
    identity: str


def lay(plan: Plan, choice: Choice, seed: str) -> Laid:
    """`seed` tells images apart that have the same choice (point and target). Nothing for an empty choice. Raises
    ImageError for a step or field that is none."""
    chosen = [(*validated(name, fields), dict(fields)) for name, fields in choice.items()]
    chosen.sort(key=lambda one: (one[0].phase, one[0].order, one[0].name))
    if not chosen:
        return Laid({}, (), "")
    identity = hashlib.sha256(json.dumps([seed, {name: dict(it) for name, it in choice.items()}]).encode())
    run = _common(plan, identity.hexdigest()[:16])
    words: list[str] = []
    for step, fields, _ in chosen:
        variables = step.variables(plan, fields)
        text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
        run[f"{_HERE}/steps/{step.phase}/{step.order:02}-{step.name}"] = f"{text}{step.script}".encode()
        words += step.words(plan, fields)
    for phase in dict.fromkeys(step.phase for step, _, _ in chosen):
        unit, target = _PHASES[phase]
        run[f"{_UNITS}/rewind-{phase}.service"] = unit.encode()
        run[f"{_UNITS}/{target}.d/rewind-{phase}.conf"] = f"[Unit]\nWants=rewind-{phase}.service\n".encode()
    return Laid(run, tuple(words), identity.hexdigest()[:16])


def described(chosen: Sequence[Step]) -> list[str]:
    """One sentence each."""
    return [f"{one.name}: {one.description}" for one in chosen]


def _common(plan: Plan, identity: str) -> dict[str, bytes]:
    client, target = plan.client, plan.inventory
    values = {
        "RW_IMAGE": identity, "RW_RELEASE": client.release, "RW_INITRD": client.initrd,
        "RW_GENERATOR": client.generator.value, "RW_TARGET": target.name,
    }  # fmt: skip
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    found = {f"{_HERE}/settings": text.encode()}
    for name in ("run", "lib"):
        found[f"{_HERE}/{name}"] = (files("images.settle") / f"{name}.sh").read_bytes()
    return found
