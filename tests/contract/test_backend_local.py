"""What only a folder can do wrong: durability, leftovers, full and forbidden disks, file systems without links."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from appliance.errors import (
    AlreadyExists,
    ConfigError,
    NoSpace,
    ObjectNotFound,
    PermissionDenied,
    StoreError,
    Temporary,
)
from appliance.store.backend import local, open_backend
from appliance.store.backend.local import LocalBackend

HEX = "3f0c" + "5a" * 14


@pytest.fixture
def root(tmp_path):
    return tmp_path / "made" / "store"


@pytest.fixture
def backend(root):
    return LocalBackend(root)


class Disk:
    """Watches the calls that decide what a power cut leaves: contents and names that were synced, and in what order."""

    def __init__(self, patch):
        self.synced_files: set[int] = set()  # by inode
        self.unsynced_names: set[Path] = set()
        self._real = {name: getattr(os, name) for name in ("fsync", "link", "mkdir", "unlink")}
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "link", self._link)
        patch.setattr(os, "mkdir", self._mkdir)
        patch.setattr(os, "unlink", self._unlink)

    def _fsync(self, file):
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.is_dir():
            self.unsynced_names = {name for name in self.unsynced_names if name.parent != path}
        else:
            self.synced_files.add(os.fstat(file).st_ino)
        self._real["fsync"](file)

    def _link(self, source, target, **options):
        assert Path(source).stat().st_ino in self.synced_files, "the name came before the content was durable"
        self._real["link"](source, target, **options)
        self.unsynced_names.add(Path(target))

    def _mkdir(self, path, *arguments, **options):
        self._real["mkdir"](path, *arguments, **options)
        self.unsynced_names.add(Path(path))

    def _unlink(self, path, **options):
        self._real["unlink"](path, **options)
        if ".tmp" not in str(path):
            self.unsynced_names.add(Path(path))


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_what_was_put_survives_a_power_cut(backend, disk):
    """P5-09: content before name, name and every new folder above it before put returns."""
    for name in ("config", f"packs/{HEX}", "points/2026/11/x"):
        backend.put(name, b"content")
        assert disk.unsynced_names == set()
    assert len(disk.synced_files) == 3


def test_folders_that_another_process_has_just_made_are_synced_too(root, disk):
    """It may not have come to its own fsync."""
    Path(root / "points").mkdir(parents=True)
    disk.unsynced_names.discard(root.parent)
    disk.unsynced_names.discard(root)
    assert disk.unsynced_names == {root / "points"}
    LocalBackend(root).put("points/x", b"")
    assert disk.unsynced_names == set()


def test_an_object_that_somebody_else_created_is_durable_when_we_hear_of_it(backend, root, disk):
    backend.put("points/other", b"")
    (root / "points" / "x").write_bytes(b"theirs")
    disk.unsynced_names.add(root / "points" / "x")
    with pytest.raises(AlreadyExists):
        backend.put("points/x", b"ours")
    assert disk.unsynced_names == set()


def test_what_was_deleted_stays_deleted(backend, disk):
    """A point that came back after its packs are gone would be a lie."""
    backend.put("points/x", b"")
    backend.delete("points/x")
    assert disk.unsynced_names == set()


def test_objects_are_nobody_elses(backend, root):
    backend.put(f"packs/{HEX}", b"")
    assert {path.stat().st_mode & 0o077 for path in [root, *root.rglob("*")]} == {0}


def test_packs_are_spread_over_folders(backend, root):
    backend.put(f"packs/{HEX}", b"content")
    assert (root / "packs" / "3f" / HEX).read_bytes() == b"content"
    assert [info.name for info in backend.list()] == [f"packs/{HEX}"]


def test_foreign_files_are_no_objects(backend, root):
    backend.put("x", b"")
    (root / ".hidden").touch()
    (root / ".Trash").mkdir()
    (root / ".Trash" / "y").touch()
    (root / "lost+found").mkdir()
    (root / "lost+found" / "#123").touch()
    (root / "Thumbs.db").touch()
    (root / "dangling").symlink_to("nowhere")
    assert [info.name for info in backend.list()] == ["x"]


def test_only_old_temporaries_are_removed(backend, root):
    backend.put("x", b"")
    old, young = root / ".tmp" / "1-old", root / ".tmp" / "2-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - local.TEMPORARY_SECONDS - 1,) * 2)
    assert [info.name for info in LocalBackend(root).list()] == ["x"]
    assert not old.exists()
    assert young.exists()


def test_a_stepped_clock_costs_a_put_that_is_under_way_not_more(backend, root, monkeypatch):
    """A9: another process thinks that our temporary is old."""
    real = os.link

    def link(source, target, **options):
        monkeypatch.setattr(os, "link", real)
        os.utime(source, (0, 0))
        LocalBackend(root)
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(Temporary):
        backend.put("x", b"content")
    backend.put("x", b"content")
    assert backend.get("x") == b"content"


def test_nothing_is_left_behind_by_a_put_that_fails(backend, root, monkeypatch):
    backend.put("first", b"")
    with pytest.raises(AlreadyExists):
        backend.put("first", b"2")
    for call, code, expected in [
        ("write", errno.ENOSPC, NoSpace),
        ("write", errno.EDQUOT, NoSpace),
        ("fsync", errno.EIO, Temporary),
        ("link", errno.EROFS, PermissionDenied),
        ("link", errno.ENOSPC, NoSpace),
        ("open", errno.EACCES, PermissionDenied),
        ("open", errno.EMFILE, Temporary),
        ("open", errno.ESTALE, Temporary),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(code))
            with pytest.raises(expected, match="packs/x"):
                backend.put("packs/x", b"content")
        assert list((root / ".tmp").iterdir()) == []
        assert [info.name for info in backend.list()] == ["first"]
    backend.put("packs/x", b"content")


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_disk_that_is_full_in_the_middle(backend):
    """The kernel's own refusal after a part was written, by a limit on file sizes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(NoSpace, match="packs/x"):
            backend.put("packs/x", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(backend.list()) == []
    backend.put("packs/x", bytes(2 << 20))


def test_a_read_that_fails_is_not_a_missing_object(backend, monkeypatch):
    """Never lie: gc and heal would take it for gone."""
    backend.put("x", b"content")
    for call, code, expected in [
        ("pread", errno.EIO, Temporary),
        ("open", errno.ESTALE, Temporary),
        ("open", errno.EACCES, PermissionDenied),
        ("stat", errno.EIO, Temporary),
        ("scandir", errno.EIO, Temporary),
        ("scandir", errno.EACCES, PermissionDenied),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(code))
            with pytest.raises(expected) as caught:
                {"stat": lambda: backend.stat("x"), "scandir": lambda: list(backend.list())}.get(
                    call, lambda: backend.get("x")
                )()
        assert not isinstance(caught.value, ObjectNotFound)
        assert str(backend.root) in caught.value.message


def test_a_read_in_pieces_is_whole(backend, monkeypatch):
    backend.put("x", bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: real(file, min(length, 7), offset))
    assert backend.get("x", 3, 90) == bytes(range(3, 93))


def test_a_write_in_pieces_is_whole(backend, monkeypatch):
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: real(file, data[:7]))
        backend.put("x", bytes(range(100)))
    assert backend.get("x") == bytes(range(100))


def test_nfs_repeats_a_link_whose_answer_was_lost(backend, monkeypatch):
    real = os.link

    def link(source, target, **options):
        real(source, target, **options)
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    backend.put("x", b"ours")
    assert backend.get("x") == b"ours"
    with pytest.raises(AlreadyExists):
        backend.put("x", b"more")


def test_an_object_in_the_way_of_a_folder(backend):
    backend.put("a", b"")
    with pytest.raises(StoreError, match="in the way of 'a/b'") as caught:
        backend.put("a/b", b"")
    assert type(caught.value) is StoreError
    backend.delete("a/b")


def test_urls_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("with space", f"file://{tmp_path}/with%20space", f"{tmp_path}/with space"):
        assert open_backend(url).url == f"{tmp_path}/with space"
    for url in ("file://host/x", "file:x", "ftp://x", "file:///x?y"):
        if url == "file:x":
            assert open_backend(url).url == f"{tmp_path}/file:x"
            continue
        with pytest.raises(ConfigError):
            open_backend(url)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_made_where_the_folder_was_unmounted(backend, root):
    """The mount point stays: an empty folder."""
    backend.put("config", b"x")
    root.rename(root.with_name("moved"))
    root.mkdir()
    with pytest.raises(Temporary) as caught:
        backend.put("packs/" + 32 * "0", b"x")
    assert caught.value.hint == "is it mounted?"
    assert list(root.iterdir()) == []


def test_threads_make_folders_at_the_same_time(backend):
    failures = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        try:
            for turn in range(5):
                backend.put(f"new/{turn}/folder/{number}", b"")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list(backend.list())) == 40
