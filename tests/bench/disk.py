"""The disk that is measured: real Debian files, random data, and much that is sparse; and 1 % scattered changes.

    0      ext4 with files of this machine's /usr, up to 3/8 of the disk
    4/8    random data, 1/16 of the disk
    5/8    islands of 64 KiB of random data, one every 16 MiB; between them, and elsewhere, nothing

Made once and kept in the cache. A change is a list of granules; their contents look like the files' but occur nowhere
else, so that nobody can store them by reference.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.world import cache_folder

__all__ = ["Change", "Prepared", "data_bytes", "prepare"]

KiB, MiB = 1 << 10, 1 << 20
CHUNK = 64 * KiB
_VERSION = 1  # of the layout: a new one makes old caches useless
_FOLDERS = ("lib", "bin", "sbin", "share", "libexec")


@dataclass(frozen=True, slots=True)
class Prepared:
    """`raw` and `qcow2` hold the same; copy them, do not write to them. `files` is what the ext4 was filled with."""

    raw: Path
    qcow2: Path
    size: int
    files: int


@dataclass(frozen=True, slots=True)
class Change:
    """Granules as (offset, length), ascending, disjoint. `changed` are their bytes, `dirty` those of the 64 KiB blocks
    they touch: what a bitmap knows."""

    granules: tuple[tuple[int, int], ...]
    seed: int

    @property
    def changed(self) -> int:
        return sum(length for _, length in self.granules)

    @property
    def dirty(self) -> int:
        return CHUNK * len({offset // CHUNK for offset, _ in self.granules})

    def contents(self, raw: Path) -> Iterator[tuple[int, bytes]]:
        """(offset, new bytes): what lies elsewhere on the disk, with a stamp in every 2 KiB."""
        dice = random.Random(self.seed)
        filled = _filled(raw.stat().st_size)
        with raw.open("rb", buffering=0) as file:
            for offset, length in self.granules:
                content = bytearray(os.pread(file.fileno(), length, dice.randrange(filled // CHUNK) * CHUNK))
                for at in range(0, length, 2 * KiB):
                    content[at : at + 16] = dice.randbytes(16)
                yield offset, bytes(content)


def change(size: int, seed: int, share: float = 0.01) -> Change:
    """`share` of the disk, half of it in granules of 4 KiB and half in granules of 64 KiB, where there is data."""
    dice = random.Random(seed)
    half = int(size * share / 2)
    blocks = dice.sample(range(_filled(size) // CHUNK), half // CHUNK + half // (4 * KiB))
    large, small = blocks[: half // CHUNK], blocks[half // CHUNK :]
    granules = [(block * CHUNK, CHUNK) for block in large]
    granules += [(block * CHUNK + dice.randrange(16) * 4 * KiB, 4 * KiB) for block in small]
    return Change(tuple(sorted(granules)), seed)


def _filled(size: int) -> int:
    """Where data ends: the files and the random part. 1 % of 4 KiB granules needs an eighth of the disk for itself."""
    return size * 9 // 16


def data_bytes(raw: Path) -> int:
    """Bytes that the file system keeps for the image."""
    return raw.stat().st_blocks * 512


def prepare(size: int) -> Prepared:
    """From the cache, or made: takes a minute or two for 8 GiB. `size` is a multiple of 128 MiB."""
    folder = cache_folder() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"disk-{size // MiB}-{_VERSION}"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix=".disk-", dir=folder))
            try:
                _make(scratch, size)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return Prepared(target / "disk.raw", target / "disk.qcow2", size, int((target / "files").read_text()))


def _make(folder: Path, size: int) -> None:
    raw = folder / "disk.raw"
    staged = folder / "usr"
    staged.mkdir()
    files = _stage(staged, size * 3 // 8 * 9 // 10)  # the rest is for inodes and the journal
    with raw.open("wb") as file:
        file.truncate(size // 2)
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", options, "-d", staged, raw], check=True)
    shutil.rmtree(staged)
    dice = random.Random(size)
    with raw.open("r+b") as file:
        file.truncate(size)
        file.seek(size // 2)
        for _ in range(size // 16 // MiB):
            file.write(dice.randbytes(MiB))
        for offset in range(size // 8 * 5, size, 16 * MiB):
            file.seek(offset)
            file.write(dice.randbytes(CHUNK))
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, folder / "disk.qcow2"], check=True)
    (folder / "files").write_text(str(files))


def _stage(staged: Path, budget: int) -> int:
    """Link or copy files of /usr until the budget is used; how many bytes it became."""
    used = 0
    for path in _files():
        length = -(-path.lstat().st_size // 4096) * 4096 + 256
        if used + length > budget:
            continue
        target = staged / path.relative_to("/usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
        used += length
        if used > budget - MiB:
            break
    return used


def _files() -> Iterator[Path]:
    """Files of packages, in an order that mixes programs, libraries and texts the same way on every run."""
    found = []
    for name in _FOLDERS:
        for folder, _, names in os.walk(f"/usr/{name}"):
            found += [Path(folder, one) for one in names]
    random.Random(1).shuffle(found)
    return (path for path in found if not path.is_symlink() and path.is_file())
