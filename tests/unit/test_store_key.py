"""The key file: plain, locked by a passphrase, exported, wrong."""

from __future__ import annotations

import os
import stat

import pytest

from appliance.errors import AlreadyExists, RepositoryNotFound, TargetExists, VersionUnsupported, WrongKey
from appliance.store import Key, Repository, RepositorySpec, open_backend
from appliance.store.backend.memory import MemoryBackend
from tests.support.store import chunk


def test_a_key_file_is_the_owners_alone_and_never_replaced(tmp_path):
    key = Key.generate()
    key.save(tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert Key.load(tmp_path / "key") == key
    with pytest.raises(TargetExists):
        Key.generate().save(tmp_path / "key")
    assert Key.load(tmp_path / "key") == key


def test_the_secret_is_not_shown(tmp_path):
    key = Key(b"s" * 32)
    assert "73" not in repr(key)
    assert "ssss" not in repr(key)


def test_a_passphrase_locks_it(tmp_path):
    key = Key.generate()
    key.save(tmp_path / "key", passphrase="correct horse")
    assert key.secret.hex() not in (tmp_path / "key").read_text()
    assert Key.load(tmp_path / "key", lambda: "correct horse") == key
    with pytest.raises(WrongKey, match="passphrase is wrong"):
        Key.load(tmp_path / "key", lambda: "battery staple")
    with pytest.raises(WrongKey, match="none was given"):
        Key.load(tmp_path / "key")


def test_an_exported_key_is_a_key_file(tmp_path):
    key = Key.generate()
    assert Key.parse(key.export()) == key


@pytest.mark.parametrize("text", ["", "{}", "[]", "hello", '{"rewind_key": 1, "secret": "zz"}', '{"rewind_key": 1}'])
def test_what_is_no_key_file_is_refused(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(WrongKey):
        Key.load(tmp_path / "key")


def test_a_key_file_of_a_newer_version_is_refused():
    with pytest.raises(VersionUnsupported):
        Key.parse('{"rewind_key": 2}')


def test_a_missing_key_file_is_a_wrong_key(tmp_path):
    with pytest.raises(WrongKey):
        Key.load(tmp_path / "nothing")


def test_only_the_right_key_opens_a_repository(tmp_path):
    """P5-11: encrypted by default means unreadable without the key."""
    place = MemoryBackend("key-right")
    key = Key.generate()
    Repository.create(place, cache=tmp_path, key=key).close()
    Repository.open(place, cache=tmp_path, key=key).close()
    for wrong in (None, Key.generate()):
        with pytest.raises(WrongKey) as caught:
            Repository.open(place, cache=tmp_path, key=wrong)
        assert caught.value.exit_code == 33


def test_nothing_of_the_content_is_in_the_clear(tmp_path):
    """P5-11."""
    place = MemoryBackend("key-clear")
    secret = b"the quick brown fox jumps over the lazy dog "
    with Repository.create(place, cache=tmp_path, key=Key.generate()) as repo, repo.writer() as writer:
        writer.put(secret * 1000)
        writer.put(chunk(3))
    everything = b"".join(place.get(info.name) for info in place.list())
    assert secret[:12] not in everything
    assert chunk(3)[:12] not in everything


def test_equal_chunks_have_other_ids_in_other_repositories(tmp_path):
    """Whoever reads two repositories' ids learns nothing from them, with one key and without."""
    ids = set()
    key = Key.generate()
    for number, used in enumerate((key, key, None, None)):
        place = MemoryBackend(f"key-ids-{number}")
        with Repository.create(place, cache=tmp_path, key=used) as repo, repo.writer() as writer:
            ids.add(writer.put(b"x"))
    assert len(ids) == 4


def test_there_is_no_repository(tmp_path):
    with pytest.raises(RepositoryNotFound):
        Repository.open(open_backend(str(tmp_path / "r")), cache=tmp_path, key=None)
    Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path, key=None)
    with pytest.raises(AlreadyExists):
        Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path, key=None)


def test_a_child_opens_the_repository_from_a_spec(tmp_path):
    key = Key.generate()
    key.save(tmp_path / "key")
    with Repository.create(open_backend(str(tmp_path / "r")), cache=tmp_path / "c", key=key) as repo:
        with repo.writer() as writer:
            one = writer.put(chunk(1))
    spec = RepositorySpec(str(tmp_path / "r"), tmp_path / "c", tmp_path / "key", None)
    assert RepositorySpec.from_json(spec.to_json()) == spec
    with spec.open() as repo:
        assert repo.read_chunk(one) == chunk(1)
    memory = os.memfd_create("key")
    os.write(memory, key.export().encode())
    with RepositorySpec(str(tmp_path / "r"), tmp_path / "c", None, memory).open() as repo:
        assert repo.read_chunk(one) == chunk(1)
    assert key.secret.hex() not in spec.to_json()
