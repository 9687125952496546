"""Backups of a running domain by libvirt itself, as an admin or a backup program would make them, as raw files.

    full = push(scene, "c1")                       raw copies of all disks, and checkpoint c1
    later = push(scene, "c2", since="c1", on=full) only what changed since, laid over the earlier copies
    with pull(scene, "c3") as served: …            QEMU serves; `copy` reads all of it, `changes` what is dirty
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

from tests.support.shared import Scene, run
from tests.support.tiny import make_disk

__all__ = ["TARGETS", "Served", "drop_checkpoints", "equal", "new_image", "pull", "push"]

TARGETS = ("vda", "vdb", "vdc")


def _number(scene: Scene) -> int:
    return time.time_ns()


def _begin(scene: Scene, backup: str, checkpoint: str) -> None:
    stem = scene.folder / f"backup-{_number(scene)}"
    words = ["backup-begin", scene.name, "--backupxml", stem.with_suffix(".xml")]
    stem.with_suffix(".xml").write_text(backup)
    if checkpoint:
        described = stem.with_suffix(".check.xml")
        described.write_text(f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>")
        words += ["--checkpointxml", described]
    scene.virsh(*words)


def push(scene: Scene, checkpoint="", since="", on=None) -> dict[str, Path]:
    """Raw copies that libvirt pushed; with `since` only what changed, laid over the copies `on`."""
    began = _number(scene)
    files = {target: scene.folder / f"push-{target}-{began}.qcow2" for target in TARGETS}
    disks = "".join(
        f"<disk name='{target}' backup='yes' type='file'><driver type='qcow2'/><target file='{path}'/></disk>"
        for target, path in files.items()
    )
    incremental = f"<incremental>{since}</incremental>" if since else ""
    _begin(scene, f"<domainbackup mode='push'>{incremental}<disks>{disks}</disks></domainbackup>", checkpoint)
    _wait_done(scene)
    return {target: _flattened(path, on[target] if on else None) for target, path in files.items()}


def _wait_done(scene: Scene) -> None:
    limit = time.monotonic() + 60
    while "None" not in scene.virsh("domjobinfo", scene.name).split("Job type:")[1].splitlines()[0]:
        assert time.monotonic() < limit, "the backup does not end"
        time.sleep(0.05)
    assert "Completed" in scene.virsh("domjobinfo", scene.name, "--completed")


def _flattened(path: Path, below: Path | None) -> Path:
    out = path.with_suffix(".raw")
    if below is not None:
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", below, path)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    path.unlink()
    return out


class Served:
    """A pull backup: QEMU serves the disks as of its start."""

    def __init__(self, folder: Path, socket: Path, number: int) -> None:
        self.folder, self.socket, self.number = folder, socket, number

    def uri(self, target: str) -> str:
        return f"nbd+unix:///{target}?socket={self.socket}"

    def copy(self) -> dict[str, Path]:
        """All of each disk."""
        found = {target: self.folder / f"pull-{target}-{self.number}.raw" for target in TARGETS}
        for target, path in found.items():
            run("nbdcopy", self.uri(target), path)
        return found

    def changes(self, on: dict[str, Path]) -> dict[str, Path]:
        """What is dirty, laid over the copies `on`."""
        found = {}
        for target, below in on.items():
            out = self.folder / f"inc-{target}-{self.number}.raw"
            shutil.copy(below, out)
            context = f"qemu:dirty-bitmap:backup-{target}"
            extents = json.loads(run("nbdinfo", "--json", f"--map={context}", self.uri(target)))
            whole = self.folder / "whole.raw"
            run("nbdcopy", self.uri(target), whole)
            with whole.open("rb") as source, out.open("r+b") as copy:
                for extent in (one for one in extents if one["type"]):
                    source.seek(extent["offset"])
                    copy.seek(extent["offset"])
                    copy.write(source.read(extent["length"]))
            found[target] = out
        return found


@contextlib.contextmanager
def pull(scene: Scene, checkpoint="", since=""):
    """A pull backup while the context lasts."""
    number = _number(scene)
    socket = scene.folder / f"pull-{number}.sock"
    disks = "".join(
        f"<disk name='{target}' backup='yes' type='file'><scratch file='{scene.folder}/scratch-{target}-{number}'/>"
        "</disk>"
        for target in TARGETS
    )
    incremental = f"<incremental>{since}</incremental>" if since else ""
    server = f"<server transport='unix' socket='{socket}'/>"
    _begin(
        scene, f"<domainbackup mode='pull'>{incremental}{server}<disks>{disks}</disks></domainbackup>", checkpoint
    )
    try:
        yield Served(scene.folder, socket, number)
    finally:
        scene.virsh("domjobabort", scene.name)


def drop_checkpoints(scene: Scene) -> None:
    """Forget them all; libvirt merges and removes their bitmaps."""
    for name in scene.virsh("checkpoint-list", scene.name, "--name").split():
        scene.virsh("checkpoint-delete", scene.name, name)


def equal(one: Path, other: Path) -> bool:
    """Byte for byte."""
    return subprocess.run(["cmp", "-s", str(one), str(other)]).returncode == 0


def new_image(path: Path, size: int) -> Path:
    """An empty image for a disk that is attached later."""
    return make_disk(path, size)
