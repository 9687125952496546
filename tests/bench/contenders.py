"""Who does the work: Rewind through its command line, floors, and tools from Debian where they do the same work.

    rewind              the product, from the guest's QEMU              virtnbdbackup   from the same QEMU
    rewind-intake       only its intake, fed by nbdcopy from a file     restic, borg    from a raw file that holds the
    nbdcopy, disk       floors: the bytes moved; the bytes written                      same bytes: they know no bitmap

A contender has a method for each row it takes part in, named like the row. `before` makes it new for a round.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.disk import data_bytes
from tests.bench.guest import Guest

__all__ = ["ALL", "Contender", "run"]


def run(command: list[Any], **more: Any) -> str:
    """Its standard output. Raises RuntimeError with its last words; 1 is a warning for rewind and for borg."""
    words = [str(one) for one in command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, **more)
    if done.returncode not in (0, 1) or (done.returncode and words[0] not in ("rewind", "borg")):
        raise RuntimeError(f"{' '.join(words)} ({done.returncode}): {done.stderr[-2000:] or done.stdout[-2000:]}")
    return done.stdout


class Contender:
    """Works in `folder`, which is its own. `guest` is its source, or `raw`, with the same bytes."""

    name = ""
    program = ""  # without it the contender is left out

    def __init__(self, folder: Path, guest: Guest, raw: Path) -> None:
        self.folder, self.guest, self.raw = folder, guest, raw
        self.facts: dict[str, dict[str, Any]] = {}  # by row, of the last round

    def before(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o755)

    def after(self) -> None:
        """The round is over: give back room and bitmaps."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def stored(self) -> int:
        """Bytes that its folder takes."""
        return sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def into(self) -> Path:
        """A new folder to restore into."""
        folder = self.folder.with_name(f"{self.folder.name}-restored")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o755)
        return folder

    def restored(self) -> Path | None:
        """The raw disk that `restore` wrote, to be compared."""
        return None

    def drop_restored(self) -> None:
        shutil.rmtree(self.folder.with_name(f"{self.folder.name}-restored"), ignore_errors=True)


class Rewind(Contender):
    """A home and a repository, encrypted and compressed as `init` makes it."""

    name = "rewind"
    program = "rewind"

    def before(self) -> None:
        super().before()
        self._base = ["rewind", "--home", self.folder / "home", "--connect", self.guest.uri, "--json"]
        self.rewind("init")
        self.rewind("protect", self.guest.name)
        self.points: list[str] = []

    def after(self) -> None:
        self.rewind("unprotect", self.guest.name)
        super().after()

    def rewind(self, *words: Any) -> dict[str, Any]:
        """The last object it printed."""
        return json.loads(run([*self._base, *words]).splitlines()[-1])

    def _point(self, row: str) -> None:
        told = self.rewind("point", self.guest.name)
        self.points.append(told["id"])
        names = ("moved_bytes", "stored_bytes", "changed_bytes", "pause_seconds", "notes")
        self.facts[row] = {name: told[name] for name in names}

    def first_full(self) -> None:
        self._point("first_full")

    def epoch(self) -> None:
        self._point("epoch")

    def diff(self) -> None:
        self.facts["diff"] = self._chosen(self.rewind("diff", self.guest.name, *self.points[:2]))

    def diff_exact(self) -> None:
        told = self.rewind("diff", "--exact", self.guest.name, *self.points[:2])
        self.facts["diff_exact"] = self._chosen(told)

    @staticmethod
    def _chosen(told: dict[str, Any]) -> dict[str, Any]:
        return {name: told[name] for name in ("extents", "changed_bytes")}

    def check(self) -> None:
        found = self.rewind("check", "--read-data")
        if found["problems"]:
            raise RuntimeError(f"check: {found}")

    def restore(self) -> None:
        words = ("--at", self.points[-1], "--into", self.into(), "--format", "raw")
        self.facts["restore"] = {"written_bytes": self.rewind("restore", self.guest.name, *words)["written_bytes"]}

    def restored(self) -> Path | None:
        (found,) = self.folder.with_name(f"{self.folder.name}-restored").glob("*.raw")
        return found

    def export_read(self) -> None:
        """A whole point, read through its export by nbdcopy."""
        words = [*self._base, "export", self.guest.name, "--at", self.points[-1]]
        argv = [str(one) for one in words]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        try:
            run(["nbdcopy", json.loads(server.stdout.readline())["uri"], "null:"])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            server.stdout.close()

    def revert(self, row: str) -> None:
        """To the first point, with what the bitmap says that the disk has gained."""
        self._reverted(row, self.rewind("revert", self.guest.name, "--to", self.points[0], "--yes"))

    def undo(self, row: str) -> None:
        self._reverted(row, self.rewind("undo", self.guest.name, "--yes"))

    def _reverted(self, row: str, told: dict[str, Any]) -> None:
        if told["state"] != "done":
            raise RuntimeError(f"{row}: {told}")
        names = ("mode", "moved_bytes", "changed_bytes", "pause_seconds", "notes")
        self.facts[row] = {name: told[name] for name in names}


class RewindIntake(Contender):
    """The part of `first_full` behind QEMU, as close to nbdcopy as it gets: nbdkit's file plugin → nbdcopy → intake.
    What it lacks: the map, the commit, the command line."""

    name = "rewind-intake"
    program = "rewind"

    def before(self) -> None:
        from appliance.store import Key, Repository, open_backend

        super().before()
        Key.generate().save(self.folder / "key")
        backend = open_backend(str(self.folder / "repo"))
        Repository.create(backend, cache=self.folder / "cache", key=Key.load(self.folder / "key")).close()

    def first_full(self) -> None:
        from appliance.capture.intake import Intake
        from appliance.store import RepositorySpec

        spec = RepositorySpec(str(self.folder / "repo"), self.folder / "cache", self.folder / "key")
        home = self.folder / "run"
        home.mkdir()
        with file_server(self.raw, self.folder) as source:
            with Intake(home, spec, {"vda": (self.raw.stat().st_size, None)}) as intake:
                target = f"nbd+unix:///vda?socket={intake.socket}"
                run(["nbdcopy", "--flush", "--destination-is-zero", source, target])
                self.facts["first_full"] = intake.counters("vda")


class NbdCopy(Contender):
    """The floor: the bytes moved once, nothing compressed, hashed, encrypted or kept in more than one state."""

    name = "nbdcopy"
    program = "nbdcopy"

    def first_full(self) -> None:
        self._copy(self.raw, self.folder / "copy.raw")

    def restore(self) -> None:
        self._copy(self.folder / "copy.raw", self.into() / "disk.raw")

    def export_read(self) -> None:
        with file_server(self.raw, self.folder) as source:
            run(["nbdcopy", source, "null:"])

    def _copy(self, source: Path, target: Path) -> None:
        with target.open("wb") as file:
            file.truncate(source.stat().st_size)
        with file_server(source, self.folder) as uri:
            run(["nbdcopy", "--flush", "--destination-is-zero", uri, target])


class Disk(Contender):
    """The disk itself: as many bytes as the source has written in order, and synced."""

    name = "disk"
    program = "fio"

    def first_full(self) -> None:
        size = data_bytes(self.raw) // 65536 * 65536
        run(["fio", "--name=disk", f"--filename={self.folder / 'written'}", f"--size={size}", "--rw=write", "--bs=1M",
             "--ioengine=psync", "--end_fsync=1", "--refill_buffers", "--randrepeat=0"])  # fmt: skip


class VirtNbdBackup(Contender):
    """From the same QEMU by libvirt's own backup job and checkpoints, as its manual says. Neither compressed nor
    encrypted, which is its default."""

    name = "virtnbdbackup"
    program = "virtnbdbackup"
    level = "full"
    more: tuple[str, ...] = ()

    def before(self) -> None:
        super().before()
        (self.folder / "scratch").mkdir()

    def after(self) -> None:
        self.guest.forget_checkpoints()
        super().after()

    def _backup(self, level: str) -> None:
        run(["virtnbdbackup", "-U", self.guest.uri, "-n", "-d", self.guest.name, "-l", level, *self.more,
             "-S", self.folder / "scratch", "-o", self.folder / "backup"])  # fmt: skip

    def first_full(self) -> None:
        self._backup(self.level)

    def epoch(self) -> None:
        self._backup("inc")

    def restore(self) -> None:
        run(["virtnbdrestore", "-U", self.guest.uri, "-n", "-i", self.folder / "backup", "-o", self.into(),
             "-L", self.folder / "restore.log"])  # fmt: skip


class VirtNbdBackupLz4(VirtNbdBackup):
    """Compressed, and without a checkpoint, because a domain has only one chain of them."""

    name = "virtnbdbackup-lz4"
    level = "copy"
    more = ("-z",)
    epoch = restore = None  # type: ignore[assignment]

    def after(self) -> None:
        Contender.after(self)


class Restic(Contender):
    """Compressed (its format 2) and encrypted."""

    name = "restic"
    program = "restic"

    def before(self) -> None:
        super().before()
        self._environment = os.environ | {
            "RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(self.folder / "repository"),
            "RESTIC_CACHE_DIR": str(self.folder / "cache"),
        }  # fmt: skip
        self._restic("init", "--repository-version", "2")

    def _restic(self, *words: Any) -> None:
        run(["restic", "-q", *words], env=self._environment)

    def first_full(self) -> None:
        self._restic("backup", self.raw)

    epoch = first_full

    def restore(self) -> None:
        self._restic("restore", "latest", "--target", self.into())

    def check(self) -> None:
        self._restic("check", "--read-data")


class Borg(Contender):
    """Compressed by zstd 1 and encrypted, otherwise as it comes."""

    name = "borg"
    program = "borg"

    def before(self) -> None:
        super().before()
        self._number = 0
        self._environment = os.environ | {"BORG_PASSPHRASE": "bench", "BORG_BASE_DIR": str(self.folder / "base")}
        self._borg("init", "-e", "repokey-blake2", self._repository)

    @property
    def _repository(self) -> Path:
        return self.folder / "repository"

    def _borg(self, *words: Any, cwd: Path | None = None) -> None:
        run(["borg", *words], env=self._environment, cwd=cwd)

    def first_full(self) -> None:
        self._number += 1
        self._borg("create", "--compression", "zstd,1", f"{self._repository}::{self._number}", self.raw)

    epoch = first_full

    def diff(self) -> None:
        self._borg("diff", f"{self._repository}::1", "2")

    def restore(self) -> None:
        self._borg("extract", "--sparse", f"{self._repository}::{self._number}", cwd=self.into())

    def check(self) -> None:
        self._borg("check", "--verify-data", self._repository)


ALL = (Rewind, RewindIntake, NbdCopy, Disk, VirtNbdBackup, VirtNbdBackupLz4, Restic, Borg)


@contextmanager
def file_server(image: Path, folder: Path):
    """URI of nbdkit's file plugin on a raw file, which is what nbdcopy reads from."""
    socket = folder / "source.sock"
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", str(socket), "file", str(image)])
    try:
        while not socket.exists():
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait(10)
        socket.unlink(missing_ok=True)
