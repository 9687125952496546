"""What a person chooses of the steps: `--settle`, `--identity`, `--host-name`, `--grow`."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, replace
from typing import Any, Literal

from images.media.base import check_command_line
from images.model import Plan
from images.settle.lay import lay
from images.settle.steps.host_name import fits
from images.template.settings import Settings, settings_for

__all__ = ["After", "with_steps"]


@dataclass(frozen=True, slots=True)
class After:
    """What is to become of a client once it runs. `settle`: its disk starts by itself. `identity`: `new` gives it a
    host name, a machine id, SSH host keys and addresses of its own. `host_name`: the new one; empty for one that is
    made from the old one. `grow`: the root takes the room of a larger disk."""

    settle: bool = False
    identity: Literal["keep", "new"] = "keep"
    host_name: str = ""
    grow: bool = False

    def named(self, name: str) -> After:
        """With that host name where a new one is wanted and none was chosen, if a host may be called so."""
        if self.identity != "new" or self.host_name or not fits(name):
            return self
        return replace(self, host_name=name)

    def choice(self, plan: Plan, seed: str) -> dict[str, dict[str, Any]]:
        """Steps and their fields; the same for the same arguments."""
        chosen: dict[str, dict[str, Any]] = {}
        digest = hashlib.sha256(f"{seed}\0{self.host_name}".encode()).digest()
        if self.host_name or self.identity == "new":
            old = plan.client.host.partition(".")[0]
            chosen["host-name"] = {"name": self.host_name or f"{old[:58]}-{digest.hex()[:4]}"}
        if self.identity == "new":
            chosen["machine-id"] = {"id": uuid.UUID(bytes=digest[:16], version=4).hex}
            chosen |= {"ssh-keys": {}, "addresses": {}}
        if self.settle:
            chosen |= {"nics": {}, "initramfs": {}, "loader": {}}
        if self.grow:
            chosen["grow"] = {}
        return chosen


def with_steps(plan: Plan, after: After, seed: str, settings: Settings | None = None) -> tuple[Plan, Settings]:
    """The plan and settings of an image whose client does these steps. `seed` tells images of the same choice apart;
    `settings` are the plan's own if not given. Raises ImageError for a field that is none, or a command line that has
    become too long."""
    settings = settings or settings_for(plan)
    laid = lay(plan, after.choice(plan, seed), seed)
    if laid.words:
        line = " ".join([plan.command_line, *laid.words])
        check_command_line(line)
        plan = replace(plan, command_line=line)
    return plan, replace(settings, run={**settings.run, **laid.run})
