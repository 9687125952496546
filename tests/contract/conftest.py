"""Places to keep objects in: the same contract is asked of each of them."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.store.backend.ahead import ReadingAhead
from appliance.store.backend.base import Backend
from appliance.store.backend.faulty import Fault, Faulty
from appliance.store.backend.local import LocalBackend
from appliance.store.backend.memory import MemoryBackend
from appliance.store.backend.s3 import S3Backend
from appliance.store.backend.wrap import Counting, Limited, Retrying
from tests.support.ceph import PACKAGES, Ceph, missing_tools


@dataclass(frozen=True)
class Place:
    """`open` gives a new backend of the same place each time; `url` is for other processes, None if they cannot."""

    name: str
    open: Callable[[], Backend]
    url: str | None


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """One real Ceph for the whole run: about 2 seconds and 150 MiB, stopped by the ids of its processes."""
    missing = missing_tools()
    if missing:
        reason = f"no {missing[0]} here: a real S3 store needs the packages {PACKAGES}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    # In memory where there is such a folder: the monitor syncs for everything, and disks of test machines are slow.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with Ceph(Path(tempfile.mkdtemp(prefix="rgw-", dir=memory))) as running, pytest.MonkeyPatch.context() as patch:
        for key, value in running.environment.items():
            patch.setenv(key, value)
        running.bucket("contract")
        yield running


def _local(tmp_path, **_) -> Place:
    return Place("local", lambda: LocalBackend(tmp_path / "store"), str(tmp_path / "store"))


def _local_without_links(tmp_path, monkeypatch, **_) -> Place:
    def link(*_, **__):
        raise OSError(errno.EPERM, "as on vfat")

    monkeypatch.setattr(os, "link", link)
    return Place("local-without-links", lambda: LocalBackend(tmp_path / "store"), None)


def _memory(**_) -> Place:
    name = secrets.token_hex(8)
    return Place("memory", lambda: MemoryBackend(name), None)


def _wrapped(tmp_path, **_) -> Place:
    folder = tmp_path / "store"
    return Place("wrapped", lambda: Retrying(Counting(Limited(LocalBackend(folder), rate=1 << 30))), None)


def _unreliable(**_) -> Place:
    """Every third call fails in one way or another; Retrying must make a good place of it."""
    name = secrets.token_hex(8)
    faults = (Fault.REFUSE, Fault.LOSE, Fault.REPEAT)

    def plan(operation):
        return faults[operation.number // 3 % 3] if operation.number % 3 == 0 else None

    return Place("unreliable", lambda: Retrying(Faulty(MemoryBackend(name), plan), sleep=lambda _: None), None)


def _reading_ahead(tmp_path, **_) -> Place:
    folder = tmp_path / "store"
    return Place("reading-ahead", lambda: ReadingAhead(LocalBackend(folder), memory=1 << 20), None)


_clients: dict = {}


def _s3(request, **_) -> Place:
    endpoint = request.getfixturevalue("ceph").endpoint
    url = f"s3://contract/{secrets.token_hex(8)}/Deep?endpoint={endpoint}"

    def opened() -> Backend:
        # Making a client of boto3 costs more than most tests: they share one, and its pool of connections.
        backend = S3Backend.from_url(url)
        backend._made = _clients[endpoint] = _clients.get(endpoint) or backend._client()
        return backend

    return Place("s3", opened, url)


_PLACES = (_local, _local_without_links, _memory, _wrapped, _unreliable, _reading_ahead, _s3)


@pytest.fixture(params=_PLACES, ids=lambda make: make.__name__.strip("_"))
def place(request, tmp_path, monkeypatch) -> Place:
    return request.param(request=request, tmp_path=tmp_path, monkeypatch=monkeypatch)


@pytest.fixture
def backend(place) -> Iterator[Backend]:
    opened = place.open()
    yield opened
    opened.close()
