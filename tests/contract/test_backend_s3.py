"""What only an S3 store can do wrong, against a real Ceph and against servers that break off."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from signal import SIGCONT, SIGSTOP

import botocore.exceptions
import pytest

from appliance.errors import (
    AlreadyExists,
    ConfigError,
    NoSpace,
    ObjectNotFound,
    PermissionDenied,
    RepositoryNotFound,
    Temporary,
)
from appliance.store.backend import open_backend, s3
from appliance.store.backend.s3 import S3Backend, S3Place
from appliance.store.backend.wrap import Counting, Retrying


@pytest.fixture
def url(ceph):
    return f"s3://contract/{secrets.token_hex(8)}?endpoint={ceph.endpoint}"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(s3, "READ_SECONDS", 1)
    monkeypatch.setattr(s3, "CONNECT_SECONDS", 1)


@pytest.fixture
def anybody(monkeypatch):
    """Credentials for servers that ask nobody's name."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")


# --- URLs and credentials ---------------------------------------------------------------------------------------------


def test_a_url_says_everything():
    place = S3Place.parse(
        "s3://bucket/a/B?endpoint=http://rgw:7480&region=x&profile=p&retain=30d&retain-mode=governance"
    )
    assert (place.bucket, place.prefix, place.endpoint, place.region) == ("bucket", "a/B/", "http://rgw:7480", "x")
    assert (place.profile, place.style, place.retain, place.retain_mode) == ("p", "path", 30 * 86400, "GOVERNANCE")
    assert S3Place.parse("s3://bucket").style == "auto"
    assert S3Place.parse("s3://bucket").prefix == ""


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("s3://", "not an s3 URL"),
        ("s3://ab", "not an s3 URL"),
        ("s3://bucket/../x", "not an s3 URL"),
        ("s3://bucket/a//b", "not an s3 URL"),
        ("s3://key:hunter2@bucket/x", "credentials"),
        ("s3://bucket/x?endpoint=http://key:hunter2@rgw", "credentials"),
        ("s3://bucket/x?secret=hunter2", "'secret'"),
        ("s3://bucket/x?style=hunter", "style"),
        ("s3://bucket/x?retain=soon", "soon"),
        ("s3://bucket/x?retain-mode=never", "retain-mode"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_repeating_secrets(url, named):
    with pytest.raises(ConfigError, match=named) as caught:
        open_backend(url)
    assert "hunter2" not in caught.value.message + caught.value.hint


def test_credentials_come_from_a_file_or_profile_and_are_never_told(ceph, url, tmp_path, monkeypatch, caplog):
    """P5-09: no secret in messages or logs."""
    file = tmp_path / "credentials"
    file.write_text(
        f"[default]\naws_access_key_id={ceph.access_key}\naws_secret_access_key={ceph.secret_key}\n"
        "[wrong]\naws_access_key_id=somebody\naws_secret_access_key=hunter2hunter2\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    caplog.set_level(logging.DEBUG)
    with S3BackendOf(url + f"&credentials={file}") as backend:
        backend.put("x", b"content")
        assert backend.get("x") == b"content"
    with S3BackendOf(url + f"&credentials={file}&profile=wrong") as backend:
        with pytest.raises(PermissionDenied, match="'x'") as refused:
            backend.get("x")
    with S3BackendOf(url) as backend, pytest.raises(PermissionDenied, match="credentials") as missing:
        backend.get("x")
    with S3BackendOf(url + "&profile=nobody") as backend, pytest.raises(ConfigError, match="nobody"):
        backend.get("x")
    assert "AWS_ACCESS_KEY_ID" in missing.value.hint
    told = caplog.text + refused.value.message + refused.value.hint
    assert ceph.secret_key not in told
    assert "hunter2" not in told


class S3BackendOf:
    def __init__(self, url):
        self.backend = S3Backend.from_url(url)

    def __enter__(self):
        return self.backend

    def __exit__(self, *_):
        self.backend.close()


# --- what a store says ------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_missing_is_named(ceph):
    backend = S3Backend.from_url(f"s3://no-such-bucket?endpoint={ceph.endpoint}")
    for call in (lambda: backend.get("x"), lambda: list(backend.list()), lambda: backend.put("x", b"")):
        with pytest.raises(RepositoryNotFound, match="no-such-bucket") as caught:
            call()
        assert "bucket" in caught.value.hint


def test_a_wrong_key_is_told_apart_from_a_missing_object(url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    backend = S3Backend.from_url(url)
    for call in (
        lambda: backend.get("x"),
        lambda: backend.stat("x"),
        lambda: list(backend.list()),
        lambda: backend.put("x", b""),
        lambda: backend.delete("x"),
    ):
        with pytest.raises(PermissionDenied):
            call()


def test_a_quota_is_no_space(ceph, monkeypatch):
    for key, value in ceph.make_user("small").items():
        monkeypatch.setenv(key, value)
    ceph.admin("quota", "set", "--uid=small", "--quota-scope=user", "--max-size=100K")
    ceph.admin("quota", "enable", "--uid=small", "--quota-scope=user")
    client = ceph.client("small-access", "small-secret")
    client.create_bucket(Bucket="small")
    backend = open_backend(f"s3://small?endpoint={ceph.endpoint}")
    backend.put("fits", b"1")
    with pytest.raises(NoSpace, match="packs/large") as caught:
        backend.put("packs/large", bytes(1 << 20))
    assert "rewind gc" in caught.value.hint
    assert [info.name for info in backend.list()] == ["fits"]


REFUSALS = [
    ("SlowDown", 503, Temporary),
    ("InternalError", 500, Temporary),
    ("BadGateway", 502, Temporary),
    ("TooManyRequests", 429, Temporary),
    ("RequestTimeout", 400, Temporary),
    ("ConditionalRequestConflict", 409, Temporary),
    ("PreconditionFailed", 412, AlreadyExists),
    ("NoSuchKey", 404, ObjectNotFound),
    ("404", 404, ObjectNotFound),
    ("NoSuchBucket", 404, RepositoryNotFound),
    ("QuotaExceeded", 403, NoSpace),
    ("AccessDenied", 403, PermissionDenied),
    ("ExpiredToken", 400, PermissionDenied),
    ("RequestTimeTooSkewed", 403, PermissionDenied),
]


@pytest.mark.parametrize(("code", "status", "expected"), REFUSALS)
def test_every_refusal_has_its_error(code, status, expected):
    answer = {"Error": {"Code": code, "Message": "as said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = s3._translated(botocore.exceptions.ClientError(answer, "PutObject"), "s3://b", "packs/x")
    assert type(error) is expected
    if expected is not RepositoryNotFound:
        assert "packs/x" in error.message


# --- exclusive creation -----------------------------------------------------------------------------------------------


def test_a_store_that_ignores_the_condition_is_found_out(url):
    """Such stores overwrite without a word; the race stays, and is told, but nothing is overwritten knowingly."""
    backend = S3Backend.from_url(url)

    def forget(request, **_):
        del request.headers["If-None-Match"]

    backend._client().meta.events.register("before-sign.s3.PutObject", forget)
    assert backend.capabilities().create_only
    backend.put("points/1", b"first")
    assert not backend.capabilities().create_only
    with pytest.raises(AlreadyExists):
        backend.put("points/1", b"second")
    assert backend.get("points/1") == b"first"
    assert [info.name for info in backend.list()] == ["points/1"]


def test_the_proof_is_made_once(url):
    backend = S3Backend.from_url(url)
    sent = []
    backend._client().meta.events.register("before-send.s3", lambda request, **_: sent.append(request.method))
    backend.put("x", b"")
    assert sent == ["PUT", "PUT", "DELETE", "PUT"]
    backend.put("y", b"")
    assert sent[4:] == ["PUT"]


def test_a_listing_has_more_than_one_page(ceph, url):
    client, prefix = ceph.client(), url.split("/")[3].partition("?")[0]
    names = [f"points/{number:04d}" for number in range(53)]
    for name in names:
        client.put_object(Bucket="contract", Key=f"{prefix}/{name}", Body=b"x")
    client.put_object(Bucket="contract", Key=f"{prefix}/Not ours", Body=b"x")
    client.put_object(Bucket="contract", Key=f"{prefix}/points/", Body=b"")
    client.put_object(Bucket="contract", Key=f"{prefix}x/config", Body=b"")
    backend = S3Backend.from_url(url)
    events = backend._client().meta.events
    pages = []
    events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: {**params, "MaxKeys": 7})
    events.register("after-call.s3.ListObjectsV2", lambda parsed, **_: pages.append(len(parsed["Contents"])))
    assert len(list(backend.list("points/"))) == 53
    assert pages == [7] * 7 + [5]  # 53 and a folder marker that is none of ours
    assert [info.name for info in backend.list("points/")] == [info.name for info in backend.list()] == names


def test_object_lock_keeps_what_was_deleted(ceph):
    """P5-09: against ransomware. Deleting hides; the version stays until its time is over."""
    ceph.bucket("locked", ObjectLockEnabledForBucket=True)
    backend = open_backend(f"s3://locked/here?endpoint={ceph.endpoint}&retain=1d")
    assert backend.capabilities().retention == 86400
    backend.put("packs/1", b"content")
    backend.put("locks/1", b"holder")
    backend.delete("packs/1")
    with pytest.raises(ObjectNotFound):
        backend.get("packs/1")
    client = ceph.client()
    versions = client.list_object_versions(Bucket="locked")["Versions"]
    pack = next(version for version in versions if version["Key"] == "here/packs/1")
    with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
        client.delete_object(Bucket="locked", Key=pack["Key"], VersionId=pack["VersionId"])
    answer = client.get_object(Bucket="locked", Key=pack["Key"], VersionId=pack["VersionId"])
    assert answer["Body"].read() == b"content"
    until = answer["ObjectLockRetainUntilDate"] - datetime.now(UTC)
    assert timedelta(hours=23) < until <= timedelta(days=1)
    lock = next(version for version in versions if version["Key"] == "here/locks/1")
    client.delete_object(Bucket="locked", Key=lock["Key"], VersionId=lock["VersionId"])
    backend.put("packs/1", b"again")
    assert backend.get("packs/1") == b"again"


# --- stores that do not answer ----------------------------------------------------------------------------------------


def test_nobody_listens(impatient, anybody):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    backend = Counting(S3Backend.from_url(f"s3://bucket?endpoint=http://127.0.0.1:{port}"))
    pauses = []
    with pytest.raises(Temporary, match="'x'"):
        Retrying(backend, attempts=3, sleep=pauses.append).get("x")
    assert (backend.counts.requests, len(pauses)) == (3, 2)


def answering(answer: bytes):
    """A backend of a server that says `answer` to everything, in one connection each."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server:
            for _ in range(4):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return S3Backend.from_url(f"s3://bucket?endpoint=http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"not HTTP at all\r\n\r\n",
    ],
    ids=["closes", "breaks off", "busy", "broken head", "no head", "nonsense"],
)
def test_an_answer_that_breaks_off_is_worth_another_try(answer, anybody):
    """A9: it is never taken for an empty object, an empty listing, or a put that took effect."""
    calls = (
        lambda backend: backend.get("packs/x"),
        lambda backend: list(backend.list("packs/x")),
        lambda backend: backend._put("packs/x", backend._at("packs/x"), b"content"),
    )
    backend = answering(answer)
    for call in calls:
        with pytest.raises(Temporary, match="packs/x"):
            call(backend)
    backend.close()


def test_a_gateway_that_ignores_ranges_is_corrected(anybody):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n"
    backend = answering(head + b"0123456789")
    assert backend.get("x", 2, 3) == b"234"
    assert backend.get("x", 7) == b"789"
    assert backend.get("x", 11, 5) == b""


def test_a_gateway_that_hangs_and_comes_back(ceph, url, impatient):
    """P5-11: the store stands still for longer than a request's patience; the put ends well, once."""
    backend = open_backend(url)
    backend.put("config", b"")
    ceph.gateway.signal(SIGSTOP)
    timer = threading.Timer(2.5, lambda: ceph.gateway.signal(SIGCONT))
    start = time.monotonic()
    timer.start()
    try:
        backend.put("points/1", b"manifest")
        assert time.monotonic() - start > 2
    finally:
        timer.join()
    assert backend.get("points/1") == b"manifest"


def test_a_gateway_that_is_killed_and_restarted(ceph, url):
    """What was acknowledged before is there afterwards; what was under way ends well."""
    backend = open_backend(url)
    acknowledged = []

    def write() -> None:
        for number in range(30):
            backend.put(f"packs/{number:032x}", bytes([number]) * 100_000)
            acknowledged.append(number)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while len(acknowledged) < 5:
            time.sleep(0.005)
        ceph.gateway.kill()
        ceph.restart_gateway()
        writing.result()
    assert [info.size for info in backend.list("packs/")] == [100_000] * 30
    for number in range(30):
        assert backend.get(f"packs/{number:032x}", 99_999) == bytes([number])
