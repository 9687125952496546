"""nbdkit plugin: takes the disks of one domain into a repository. Manual: nbdkit-rewind-intake-plugin(1).

    nbdkit python plugin.py order=FILE       FILE is what `appliance.capture.intake.Intake` wrote

Everything is done in nbdkit's own threads: its number of threads is the memory bound, and a slow repository slows the
client by itself. nbdkit 1.32 calls `cleanup`, never `unload`.
"""

from __future__ import annotations

from pathlib import Path

import nbdkit

from appliance.capture.ingest import Ingest, errno_of
from appliance.capture.intake import read_order
from appliance.nbdkit import keep_thread, settle_parents_death
from appliance.store import Repository, RepositorySpec
from appliance.units import CHUNK

API_VERSION = 2

_MAX_REQUEST = 32 << 20

_order: Path | None = None
_repo: Repository | None = None
_ingest: Ingest | None = None


def config(key: str, value: str) -> None:
    global _order
    if key != "order":
        raise ValueError(f"unknown parameter {key!r}")
    _order = Path(value)


def config_complete() -> None:
    if _order is None:
        raise ValueError("parameter order=FILE is missing")


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def get_ready() -> None:
    settle_parents_death()


def after_fork() -> None:
    # Not earlier: threads of the repository would not survive a fork.
    global _repo, _ingest
    assert _order is not None
    repository, disks, results = read_order(_order)
    _repo = RepositorySpec.from_json(repository).open()
    _ingest = Ingest(_repo, disks, results)


def cleanup() -> None:
    if _ingest is not None:
        _ingest.close()
    if _repo is not None:
        _repo.close()


def open(readonly: bool) -> str:
    disk = str(nbdkit.export_name())
    try:
        _disks().size(disk)
    except KeyError:
        raise ValueError(f"no disk {disk!r} is taken in here") from None
    return disk


def get_size(disk: str) -> int:
    return _disks().size(disk)


def block_size(disk: str) -> tuple[int, int, int]:
    # The preferred size makes QEMU send whole chunks.
    return 512, CHUNK, _MAX_REQUEST


def can_write(disk: str) -> bool:
    return True


def can_flush(disk: str) -> bool:
    return True


def can_trim(disk: str) -> bool:
    return True


def can_zero(disk: str) -> bool:
    return True


def can_fast_zero(disk: str) -> bool:
    return True


def can_multi_conn(disk: str) -> bool:
    return True


def pread(disk: str, buf: bytearray, offset: int, flags: int) -> None:
    with _Telling():
        buf[:] = _disks().read(disk, offset, len(buf))


def pwrite(disk: str, buf: bytearray, offset: int, flags: int) -> None:
    keep_thread()
    with _Telling():
        _disks().write(disk, offset, memoryview(buf))


def zero(disk: str, count: int, offset: int, flags: int) -> None:
    with _Telling():
        _disks().zero(disk, offset, count)


def trim(disk: str, count: int, offset: int, flags: int) -> None:
    zero(disk, count, offset, flags)


def flush(disk: str, flags: int) -> None:
    with _Telling():
        _disks().flush(disk)


class _Telling:
    """Gives the client the errno that fits; the sentence goes to nbdkit's log."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            nbdkit.set_error(errno_of(error))


def _disks() -> Ingest:
    assert _ingest is not None, "nbdkit serves before after_fork"
    return _ingest
