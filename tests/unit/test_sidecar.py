"""UEFI variables and TPM state of a shut-off domain are taken back with its disks."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace

import pytest

from appliance.capture.commit import read_sidecars, store_sidecar
from appliance.config import Home
from appliance.errors import RestoreError
from appliance.restore import intent as intents
from appliance.restore import sidecar
from appliance.store import Repository, open_backend
from tests.support.store import point
from tests.unit.test_intent import made


class Domain:
    """Only the places of its files."""

    def __init__(self, folder):
        self.folder = folder

    def nvram(self):
        return self.folder / "vars.fd"

    def tpm_state(self):
        return self.folder / "tpm"


class World:
    def __init__(self, folder):
        self.home = Home(folder / "home")
        self.home.create()
        self.repo = Repository.create(open_backend(str(folder / "repo")), cache=self.home.cache, key=None)
        self.domain = Domain(folder)
        (folder / "tpm" / "tpm2").mkdir(parents=True)
        (folder / "tpm" / "tpm2" / ".lock").touch()
        self.intent = intents.save(self.home, made())

    def write(self, variables, **states):
        """The files become so; a state is the content of a file of the TPM."""
        self.domain.nvram().write_bytes(variables)
        for path in (self.domain.tpm_state() / "tpm2").glob("[!.]*"):
            path.unlink()
        for name, content in states.items():
            path = self.domain.tpm_state() / "tpm2" / name
            path.write_bytes(content)
            path.chmod(0o640)

    def now(self):
        files = (path for path in self.domain.tpm_state().rglob("*") if path.is_file())
        return self.domain.nvram().read_bytes(), {path.name: path.read_bytes() for path in files}

    def point(self, name):
        with self.repo.writer() as writer:
            disks = tuple(store_sidecar(self.repo, writer, one, None) for one in read_sidecars(self.domain))
        return replace(point(name, {}), disks=disks)

    def keep(self, wanted, safety, **facts):
        given = replace(self.intent, **facts)
        self.intent = sidecar.keep(self.home, self.repo, self.domain, given, wanted, safety)


VARS = bytes(64 << 10) + b"\xff" * 5000 + bytes(100_000) + b"old"


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    yield found
    found.repo.close()


@pytest.fixture
def two(world):
    """(world, wanted, safety), the files being as in the safety point."""
    world.write(VARS, permall=b"seed" * 1000, volatile=b"v")
    wanted = world.point("wanted")
    world.domain.nvram().chmod(0o604)
    world.write(VARS.replace(b"old", b"new!"), permall=b"other", extra=b"x")
    return world, wanted, world.point("safety")


def test_both_are_taken_back_and_can_be_repeated(two):
    """P5-15: variables with zero chunks in them, a file of the TPM that came later, modes and all."""
    world, wanted, safety = two
    world.keep(wanted, safety)
    for _ in range(2):
        sidecar.put_back(world.home, world.intent)
        assert world.now() == (VARS, {"permall": b"seed" * 1000, "volatile": b"v", ".lock": b""})
    assert world.domain.nvram().stat().st_mode & 0o777 == 0o604
    assert (world.domain.tpm_state() / "tpm2" / "permall").stat().st_mode & 0o777 == 0o640
    assert not list(world.domain.folder.rglob("*.rewind"))


def test_rolled_back_they_are_as_in_the_safety_point(two):
    world, wanted, safety = two
    before = world.now()
    world.keep(wanted, safety)
    sidecar.put_back(world.home, world.intent)
    world.intent = replace(world.intent, extra={**world.intent.extra, "turned": True})
    sidecar.put_back(world.home, world.intent)
    assert world.now() == before


def test_interrupted_it_is_whole_after_the_next_try(two, monkeypatch):
    world, wanted, safety = two
    world.keep(wanted, safety)
    calls = []

    def die(path):
        calls.append(path)
        if len(calls) == 4:
            raise OSError("power cut")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="power cut"):
        patched.setattr(sidecar, "_durable", die)
        sidecar.put_back(world.home, world.intent)
    sidecar.put_back(world.home, world.intent)
    assert world.now() == (VARS, {"permall": b"seed" * 1000, "volatile": b"v", ".lock": b""})
    assert not list(world.domain.folder.rglob("*.rewind"))


def test_a_revert_of_some_disks_leaves_them(two):
    world, wanted, safety = two
    before = world.now()
    world.keep(wanted, safety, whole=False)
    sidecar.put_back(world.home, world.intent)
    assert world.now() == before


def test_a_link_in_the_folder_is_not_followed(two, tmp_path):
    world, wanted, safety = two
    world.keep(wanted, safety)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    place = world.domain.tpm_state() / "tpm2" / "permall"
    place.unlink()
    place.symlink_to(elsewhere)
    sidecar.put_back(world.home, world.intent)
    assert elsewhere.read_bytes() == b"mine" and place.read_bytes() == b"seed" * 1000


def test_an_archive_that_leaves_its_folder_is_refused(world, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"), io.BytesIO())
    (world.home.revert("u-1") / "tpm-wanted").write_bytes(out.getvalue())
    intent = replace(world.intent, extra={"tpm": os.fspath(tmp_path / "tpm")})
    with pytest.raises(RestoreError, match="outside"):
        sidecar.put_back(world.home, intent)
    assert not (tmp_path / "escaped").exists()


def test_they_go_with_the_revert(two):
    world, wanted, safety = two
    world.keep(wanted, safety)
    assert sorted(path.name for path in world.home.revert("u-1").glob("[nt]*-*")) == [
        "nvram-safety", "nvram-wanted", "tpm-safety", "tpm-wanted",
    ]  # fmt: skip
    intents.tidy(world.home, "u-1")
    assert list(world.home.revert("u-1").glob("[nt]*-*")) == []
