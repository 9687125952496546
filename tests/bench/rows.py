"""The rows that are measured on the one disk, and the order in which a round goes through them.

    first_full → (the guest writes 1 %) → epoch → diff → check → restore → export_read → reverts → all is made new

In a round each contender does each row once, in turn (ABBA from round to round). What later rows need and was not
asked for is done all the same, unmeasured.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.bench import disk, figures
from tests.bench.contenders import ALL, Contender, Rewind
from tests.bench.disk import Change, Prepared
from tests.bench.guest import Guest
from tests.bench.measure import Cost, measure

__all__ = ["ROWS", "Rounds", "say"]

ROWS = ("first_full", "epoch", "diff", "diff_exact", "check", "restore", "export_read", "revert_live", "revert_offline")
_FIRST = ("first_full", "epoch")


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Rounds:
    """One guest, one raw file with the same bytes, and the contenders, in `folder`."""

    def __init__(self, folder: Path, prepared: Prepared, rows: Iterable[str], names: Iterable[str]) -> None:
        self._folder, self._prepared = folder, prepared
        self._wanted = [row for row in ROWS if row in set(rows)]
        self.raw = folder / "disk.raw"
        # shutil would fill the holes, and nbdcopy and the disk would be measured with more bytes than the others.
        subprocess.run(["cp", "--sparse=always", prepared.raw, self.raw], check=True)
        self.data = disk.data_bytes(prepared.raw)
        self.guest = Guest(folder, prepared.qcow2)
        self.left_out: dict[str, str] = {}
        self._contenders = list(self._present(set(names)))
        self._costs: dict[str, dict[str, list[Cost]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._change: Change | None = None

    def _present(self, names: set[str]) -> Iterable[Contender]:
        for kind in ALL:
            if names and kind.name not in names:
                self.left_out[kind.name] = "not asked for"
            elif shutil.which(kind.program) is None:
                self.left_out[kind.name] = f"{kind.program} is not installed"
            else:
                yield kind(self._folder / kind.name, self.guest, self.raw)

    def run(self, rounds: int) -> None:
        self.guest.start()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            self._round(number)
        self.guest.stop()

    def document(self) -> list[dict[str, Any]]:
        """Rows as far as contenders have done them in every round."""
        return [
            figures.row(name, figures.complete(costs), self._size_of(name), self._facts.get(name, {}))
            for name, costs in self._costs.items()
        ]

    def _size_of(self, row: str) -> int:
        """What the rates of the row are about: the changed bytes, or all data."""
        assert self._change is not None
        about_change = row in ("epoch", "diff", "diff_exact", "revert_live", "revert_offline")
        return self._change.changed if about_change else self.data

    # --- one round ---

    def _round(self, number: int) -> None:
        for one in self._contenders:
            one.before()
        self._all("first_full", number)
        self._write(number)
        self._all("epoch", number)
        for row in ("diff", "diff_exact", "check", "restore", "export_read"):
            self._all(row, number)
        for one in self._contenders:
            if isinstance(one, Rewind):
                self._reverts(one, number)
        for one in self._contenders:
            one.after()

    def _write(self, number: int) -> None:
        """The guest writes 1 %, and the raw file gets the same."""
        self._change = disk.change(self._prepared.size, number)
        new = list(self._change.contents(self.raw))
        self.guest.write(new)
        with self.raw.open("r+b") as file:
            for offset, content in new:
                file.seek(offset)
                file.write(content)

    def _all(self, row: str, number: int) -> None:
        able = {one.name: one for one in self._contenders if getattr(one, row, None)}
        for name in figures.order(list(able), number):
            try:
                self._one(row, able[name])
            except RuntimeError as error:
                if name == Rewind.name:
                    raise
                say(f"{row}: {name} is left out from now on: {error}")
                self.left_out[name] = f"{row}: {error}"
                self._contenders.remove(able[name])

    def _one(self, row: str, one: Contender) -> None:
        work = getattr(one, row)
        if row in self._wanted:
            self._measure(row, one.name, work)
        elif row in _FIRST and any(getattr(one, later, None) for later in self._later(row)):
            work()
        else:
            return
        self._look(row, one)

    def _later(self, row: str) -> list[str]:
        """What of the wanted rows needs this one; reverts are methods of another kind, that only rewind has."""
        known = {"revert_live": "revert", "revert_offline": "revert"}
        return [known.get(one, one) for one in self._wanted if ROWS.index(one) > ROWS.index(row)]

    def _measure(self, row: str, name: str, work: Callable[[], Any]) -> None:
        cost = measure(work, self.guest.lasting())
        say(f"{row}: {name}: {cost.seconds:.2f} s, {cost.cpu:.2f} s of processor, {cost.rss >> 20} MiB")
        self._costs.setdefault(row, {}).setdefault(name, []).append(cost)

    def _look(self, row: str, one: Contender) -> None:
        """What the row left behind: right, and how large?"""
        facts = self._facts.setdefault(row, {})
        if row in _FIRST:
            facts.setdefault("stored_bytes", {})[one.name] = one.stored()
        if row in one.facts:
            facts[one.name] = one.facts[row]
        if row == "restore":
            found = one.restored()
            if found is not None and not same(found, self.raw):
                raise RuntimeError(f"{one.name} restored something else")
            one.drop_restored()
        if row == "epoch" and isinstance(one, Rewind):
            assert self._change is not None
            moved = one.facts["epoch"]["moved_bytes"]
            facts |= {
                "changed_bytes": self._change.changed, "dirty_bytes": self._change.dirty,
                "moved_per_dirty": round(moved / self._change.dirty, 4),
            }  # fmt: skip

    def _reverts(self, ours: Rewind, number: int) -> None:
        """Back and, by undo, forward: two of each in a round."""
        for row in ("revert_live", "revert_offline"):
            if row not in self._wanted:
                continue
            if row == "revert_offline":
                self.guest.stop()
            self._revert(row, ours, ours.revert)
            if number == 0 and not self.guest.holds(self._prepared.raw):
                raise RuntimeError(f"{row}: the disk is not what it was")
            self._revert(row, ours, ours.undo)
            if not self.guest.holds(self.raw):
                raise RuntimeError(f"{row}: the disk is not what it was before it was reverted")
            if row == "revert_offline":
                self.guest.start()

    def _revert(self, row: str, ours: Rewind, verb: Callable[[str], None]) -> None:
        self._measure(row, ours.name, lambda: verb(row))
        assert self._change is not None
        told = ours.facts[row]
        self._facts.setdefault(row, {}).update(
            rewind=told, changed_bytes=self._change.changed,
            moved_per_changed=round(told["moved_bytes"] / self._change.changed, 4),
        )  # fmt: skip


def same(one: Path, other: Path) -> bool:
    """Whether two raw disks hold the same."""
    return subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", one, other]).returncode == 0
