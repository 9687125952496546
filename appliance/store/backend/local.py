"""Objects in a folder. A power cut at any instant leaves each object whole or absent.

    ROOT/packs/3f/3f0c…       the object `packs/3f0c…`: names of 32 and more hexadecimal digits are spread over 256
                              folders, because looking one up among 100 000 files is slow on some file systems and
                              listing them by hand is hopeless everywhere. The file keeps its whole name, so one that
                              ended in lost+found still says what it is
    ROOT/.tmp/PID-RANDOM      being written: no object yet

put: write to .tmp, fsync, link to the name (fails if it exists: this is what makes creation exclusive), remove the
temporary, fsync the folder. A crash in between leaves a temporary, removed by whoever opens the folder later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.errors import AlreadyExists, NoSpace, ObjectNotFound, PermissionDenied, StoreError, Temporary
from appliance.store.backend.base import Buffer, Capabilities, ObjectInfo, check_name, check_prefix, is_name

__all__ = ["LocalBackend"]

# A put lasts seconds; an hour leaves room for a suspended laptop. If a stepped clock makes us remove a temporary that
# is still being written, that put ends with Temporary and is repeated: nothing is lost.
TEMPORARY_SECONDS: Final = 3600.0

_TEMPORARIES = ".tmp"
_SPREAD = re.compile(r"[0-9a-f]{32,}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class LocalBackend:
    """Objects in the folder `root`, which the first put makes. Several processes may use it at once.

    Files belong to the user alone (0600, folders 0700). Thread-safe: no state but the root and the set of folders
    known to exist, whose entries are never wrong because nobody removes folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._root = str(self.root)
        self._folders: set[Path] = set()
        self._remove_old_temporaries()

    @property
    def url(self) -> str:
        return str(self.root)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._text(name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = _regular(os.fstat(file), path).st_size
                wanted = max(0, size - offset if length is None else min(length, size - offset))
                return _read(file, offset, wanted)
            finally:
                os.close(file)
        except OSError as error:
            raise self._named(error, name) from error

    def put(self, name: str, data: Buffer) -> None:
        path = self._path(name)
        temporary = self.root / _TEMPORARIES / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._make_folder(temporary.parent)
            try:
                # Before the object's folder: where the repository was moved or unmounted since our first object this
                # fails, and nothing of it is made anew in its place.
                _write(temporary, data)
                self._make_folder(path.parent)
                created = _create(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            # Also when somebody else was first: the caller may build on what is there, and that writer may not have
            # come to its own fsync yet.
            _sync_folder(path.parent)
        except OSError as error:
            raise self._named(error, name, writing=True) from error
        if not created:
            raise AlreadyExists(url=self.url, name=name)

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
            # A point whose deletion was forgotten by a power cut must not come back when its packs do not.
            if path.parent.exists():
                _sync_folder(path.parent)
        except NotADirectoryError:
            return
        except OSError as error:
            raise self._named(error, name) from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = check_prefix(prefix).rpartition("/")[0]
        found: list[ObjectInfo] = []
        try:
            _collect(folder, self.root / folder, prefix, found)
        except OSError as error:
            raise self._named(error, prefix) from error
        found.sort(key=lambda info: info.name)
        return iter(found)

    def stat(self, name: str) -> ObjectInfo:
        try:
            path = self._path(name)
            status = _regular(path.stat(), path)
        except OSError as error:
            raise self._named(error, name) from error
        return ObjectInfo(name, status.st_size, status.st_mtime)

    def capabilities(self) -> Capabilities:
        return Capabilities()

    def close(self) -> None:
        pass

    def _path(self, name: str) -> Path:
        return Path(self._text(name))

    def _text(self, name: str) -> str:
        """The path; no Path, which takes longer to make than all the rest of a short read in our hands."""
        folder, _, leaf = check_name(name).rpartition("/")
        spread = leaf[:2] if _SPREAD.fullmatch(leaf) else ""
        return f"{self._root}/{folder}/{spread}/{leaf}"

    def _make_folder(self, folder: Path) -> None:
        """Make it and its parents durable: a synced file in a folder that is not synced is lost with it."""
        if folder in self._folders:
            return
        created = False
        if not folder.is_dir():
            self._make_folder(folder.parent)
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
                created = True
        if created or folder.is_relative_to(self.root):
            # Not only after our own mkdir: whoever made it may not have come to this line yet.
            _sync_folder(folder.parent)
        self._folders.add(folder)

    def _remove_old_temporaries(self) -> None:
        """A hint of what is wrong with the folder is not ours to give here: the first real call names it."""
        with contextlib.suppress(OSError):
            for path in (self.root / _TEMPORARIES).iterdir():
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
                        path.unlink()

    def _named(self, error: OSError, name: str, writing: bool = False) -> StoreError:
        reason = error.strerror or str(error)
        if error.errno in _NO_SPACE:
            return NoSpace(url=self.url, name=name)
        if error.errno in _NO_PERMISSION:
            return PermissionDenied(url=self.url, name=name, reason=reason)
        if not writing and isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            return ObjectNotFound(url=self.url, name=name)
        if isinstance(error, NotADirectoryError):
            return StoreError(reason=f"{self.url} has an object in the way of {name!r}")
        gone = writing and isinstance(error, FileNotFoundError) and not (self.root / _TEMPORARIES).is_dir()
        return Temporary(url=self.url, name=name, reason=reason, hint="is it mounted?" if gone else "")


def _collect(name: str, folder: Path, prefix: str, found: list[ObjectInfo]) -> None:
    """Append all objects below `folder`, whose name is `name`; a folder that vanished or is none holds nothing."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if not is_name(entry.name):
            continue
        full = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir():
            _collect(full, Path(entry.path), prefix, found)
            continue
        if _SPREAD.fullmatch(entry.name):
            full = "/".join([*full.split("/")[:-2], entry.name])
        if full.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                found.append(ObjectInfo(full, status.st_size, status.st_mtime))


def _regular(status: os.stat_result, path: Path | str) -> os.stat_result:
    """A folder of the same name is no object."""
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return status


def _read(file: int, offset: int, length: int) -> bytes:
    data = os.pread(file, length, offset)
    while len(data) < length:
        # pread returns at most 2 GiB, and less when a network file system feels like it.
        more = os.pread(file, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _write(path: Path, data: Buffer) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _create(temporary: Path, path: Path) -> bool:
    """Give the finished file its name unless that is taken. False: it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then refuses the link that it has itself made.
        return temporary.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        return _rename_without_replacing(temporary, path)  # vfat and some FUSE file systems know no links
    return True


def _rename_without_replacing(temporary: Path, path: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code))


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
