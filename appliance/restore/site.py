"""What a revert works on, and with what: one domain, its home and its repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.capture import protection
from appliance.config import Home, Settings
from appliance.errors import DomainBusy
from appliance.hypervisor.base import Domain
from appliance.restore.retrieval import Progress

if TYPE_CHECKING:
    from appliance.store import Repository, RepositorySpec

__all__ = ["Site"]


@dataclass(frozen=True, slots=True)
class Site:
    """Of one domain, whose lock the caller holds. `settings_file` is for the keeper."""

    home: Home
    settings: Settings
    spec: RepositorySpec
    repo: Repository
    domain: Domain
    settings_file: Path
    progress: Progress

    def record(self) -> protection.Protection:
        """As it is now. Raises NotProtected."""
        return protection.require(self.home, self.domain.uuid, self.domain.name)

    def refuse_saved_memory(self) -> None:
        """The next start would go on from it, with caches of file systems that the disks do not hold any more. Raises
        DomainBusy. It cannot be kept with the disks: it belongs to the present."""
        name = self.domain.name
        if self.domain.managed_save():
            raise DomainBusy(
                domain=name, reason="libvirt would go on from its saved memory, which fits only the present disks",
                hint=f"`virsh start {name}` goes on from it now, `virsh managedsave-remove {name}` gives it up",
            )  # fmt: skip
