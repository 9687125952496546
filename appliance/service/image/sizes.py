"""Disks of a point that are brought up larger or smaller than they were."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from appliance import nbd
from appliance.errors import ConfigError
from appliance.model import DiskPoint
from appliance.process import run
from appliance.restore.newhardware import NewDisk
from appliance.units import CHUNK
from images.guest import Guest
from images.guest.fit import HEAD, check_fit, tables_for
from images.room import free_in, refuse_without

if TYPE_CHECKING:
    from appliance.store import Repository

__all__ = ["Sizes"]


class Sizes:
    """`sizes` are bytes by the names that `disks` have in the point; the others stay as large as they are. For one
    thread: first `look`, then `put_tables` for each."""

    def __init__(self, disks: Sequence[DiskPoint], sizes: Mapping[str, int]) -> None:
        """Raises ConfigError for a disk that the point does not have."""
        names = [one.disk for one in disks]
        if unknown := sorted(sizes.keys() - set(names)):
            raise ConfigError(reason=f"the point has no disk {unknown[0]!r}", hint=f"it has {', '.join(names)}")
        self.disks, self._sizes = disks, sizes
        self._with_new_tables: set[str] = set()

    def look(self, guest: Guest) -> None:
        """Whether all that is in use fits. Raises ImageError."""
        for one in self.disks:
            if one.disk in self._sizes and check_fit(one.disk, one.size, self.of(one), guest.volumes):
                self._with_new_tables.add(one.disk)

    def refuse_without_room(self, repository: Repository, folder: Path, name: str) -> None:
        """Raises NoSpace, with how much they take, when the disks of `name` cannot come to be whole in `folder`."""
        free = free_in(folder)
        # A disk of a terabyte has many millions of chunks: they are counted only where it matters.
        if free is None or free >= sum(self.of(one) for one in self.disks):
            return
        held = [(one, CHUNK * sum(1 for _ in repository.diff(None, one.map))) for one in self.disks]
        refuse_without(sum(min(size, self.of(one)) for one, size in held), folder, f"the disks of {name}")

    def of(self, disk: DiskPoint) -> int:
        return self._sizes.get(disk.disk, disk.size)

    def put_tables(self, disk: DiskPoint, new: NewDisk) -> None:
        """Into the new overlay, where the old tables would not be found. Raises ToolFailed, NbdFailed."""
        if disk.disk not in self._with_new_tables:
            return
        assert new.socket is not None, "an overlay has a view"
        with nbd.connect(new.socket, new.export, contexts=()) as view:
            head = bytes(view.pread(HEAD, 0))
        with tempfile.TemporaryDirectory(prefix="rewind-") as scratch:
            for offset, data in tables_for(head, disk.size, self.of(disk)):
                # qemu-io takes words without blanks only.
                piece = Path(scratch, "table")
                piece.write_bytes(data)
                run(["qemu-io", "-f", "qcow2", "-c", f"write -s {piece} {offset} {len(data)}", new.path])
