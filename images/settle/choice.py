"""What a person chooses of the steps: `--settle`, `--identity`, `--keep`, `--host-name`, `--grow`."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, replace
from typing import Any, Literal

from appliance.errors import ConfigError
from images.media.base import check_command_line
from images.model import Plan
from images.settle.lay import lay
from images.settle.steps.host_name import fits
from images.settle.steps.kept import PARTS
from images.template.settings import Settings, settings_for

__all__ = ["REPORTS", "After", "report_of", "with_steps"]

# Where a client keeps what came of it (`run.sh`).
REPORTS = "/var/lib/rewind"


@dataclass(frozen=True, slots=True)
class After:
    """What is to become of a client once it runs. `settle`: its disk starts by itself. `identity`: `new` gives it a
    host name, a machine id, SSH host keys and addresses of its own, but for those named in `keep`. `host_name`: the new
    one; empty for one that is made from the old one. `grow`: the root takes the room of a larger disk."""

    settle: bool = False
    identity: Literal["keep", "new"] = "keep"
    host_name: str = ""
    grow: bool = False
    keep: tuple[str, ...] = ()

    def named(self, name: str) -> After:
        """With that host name where a new one is wanted and none was chosen, if a host may be called so."""
        if self.identity != "new" or self.host_name or "host-name" in self.keep or not fits(name):
            return self
        return replace(self, host_name=name)

    def choice(self, plan: Plan, seed: str) -> dict[str, dict[str, Any]]:
        """Steps and their fields; the same for the same arguments."""
        chosen: dict[str, dict[str, Any]] = {part: {} for part in self._new()}
        digest = hashlib.sha256(f"{seed}\0{self.host_name}".encode()).digest()
        if "host-name" in chosen:
            old = plan.client.host.partition(".")[0]
            chosen["host-name"] = {"name": self.host_name or f"{old[:58]}-{digest.hex()[:4]}"}
        if "machine-id" in chosen:
            chosen["machine-id"] = {"id": uuid.UUID(bytes=digest[:16], version=4).hex}
        kept = [part for part in PARTS if part not in chosen]
        if self.settle or chosen or self.identity == "new":
            chosen |= {"cloud-init": {}, "cards": {}}
            if kept:
                chosen["kept"] = {"parts": kept}
        if self.settle:
            chosen |= {"nics": {}, "initramfs": {}, "loader": {}}
        if self.grow:
            chosen["grow"] = {}
        return chosen

    def _new(self) -> list[str]:
        """The parts of an identity that it gets anew."""
        if self.host_name and "host-name" in self.keep:
            raise ConfigError(reason=f"the host name is to be kept, and to be {self.host_name!r}", hint="choose one")
        new = [part for part in PARTS if self.identity == "new" and part not in self.keep]
        return new if "host-name" in new or not self.host_name else ["host-name", *new]


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


def report_of(settings: Settings) -> str:
    """The name that the report of the settling phase has in `REPORTS`; empty when no disk is to start by itself."""
    told = settings.run.get("rewind/settle/settings", b"").decode()
    found = re.search(r"^RW_IMAGE=([0-9a-f]+)$", told, re.M)
    settling = any(re.search("/steps/settle/[0-9]+-loader$", name) for name in settings.run)
    return f"settle-{found[1]}" if found and settling else ""
